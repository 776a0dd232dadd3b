"""KvExecutor: carries out in the memory what the scheduler has decided."""

import logging
from time import perf_counter

from ..errors import PyllamabatchError, StateError
from ..kv import KvOperation, SwapSpace
from ..llama.lora import LoraNames
from ..scheduler import Scheduler
from .protocols import Device
from .request import Request
from .slot_table import SlotTable

log = logging.getLogger(__name__)


class KvExecutor:
    """The core thread's. `space`: where the states of swapped sequences lie."""

    def __init__(
        self, scheduler: Scheduler, table: SlotTable, device: Device, space: SwapSpace
    ) -> None:
        self.space = space
        self._scheduler = scheduler
        self._table = table
        self._memory = device.memory
        self._states = device.states
        self._loras = device.loras
        self._renewed = device.renewed

    def flush(self) -> None:
        """Carry out what no step has brought yet."""
        self.carry_out(self._scheduler.take_kv_operations())

    def carry_out(self, operations: tuple[KvOperation, ...]) -> bool:
        """In their order. False when a sequence could not go on from there: it waits to be
        computed again, and a step that has rows of it is void."""
        failed: set[int] = set()
        for operation in operations:
            if operation.id in failed and operation.kind in ("copy", "trim", "load"):
                continue
            if operation.kind in ("pool", "streams"):
                self._become(operation.kind, operation.n)
                continue
            try:
                self._carry_out(operation)
            except (PyllamabatchError, MemoryError, OSError) as problem:
                log.warning("%s of slot %d failed: %s", operation.kind, operation.slot, problem)
                preempted = self._scheduler.kv_failed(operation)
                if preempted is not None:
                    self._table.leave(*preempted)
                    failed.add(preempted[0])
        return not failed

    def _carry_out(self, operation: KvOperation) -> None:
        id, slot, n = operation.id, operation.slot, operation.n
        request = self._table.requests.get(id)  # None: it has ended since then
        match operation.kind:
            case "remove":
                self._memory.seq_rm(slot)
            case "trim" | "cut":
                self._memory.seq_rm(slot, n)
            case "copy":
                self._memory.seq_cp(operation.source, slot, *(() if operation.whole else (0, n)))
                self._check(slot, n)
            case "store" if request is not None:
                state, request.state = request.state, b""
                self.space.put(id, state)
            case "save" if request is not None:
                self._save(request, slot, n)
            case "load" if request is not None:
                self._load(request, slot, n)
            case "discard":
                self.space.drop(id)

    def _become(self, kind: str, n_cells: int) -> None:
        """Where streams can't be had, the pool stays. ContextCreateError when there is no context
        any more."""
        why = "a sequence needs more cells than a stream has"
        if kind == "streams":
            why = "no sequence needs more cells than a stream has any more"
        log.info("%s: a %s of %d cells from now on", why, kind, n_cells)
        began = perf_counter()
        problem = self._states.renew(n_cells if kind == "pool" else 0)
        if problem is not None:
            log.warning("there is a pool as before: %s", problem)
            self._scheduler.stay_pool()
        self._renewed(perf_counter() - began)

    def _save(self, request: Request, slot: int, n: int) -> None:
        began = perf_counter()
        state = self._states.state_seq_get(slot, self.adapters_of(request))
        self.space.put(request.id, state)
        self._scheduler.copied(len(state), perf_counter() - began, n)

    def _load(self, request: Request, slot: int, n: int) -> None:
        if request.id not in self.space:
            raise StateError("its saved state was not stored")
        began = perf_counter()
        state = self.space.take(request.id)
        self._states.state_seq_set(state, slot, self.adapters_of(request))
        self._check(slot, n)
        self._scheduler.copied(len(state), perf_counter() - began, n)

    def adapters_of(self, request: Request) -> LoraNames:
        """The names of files and the scales of the adapters that it is computed with."""
        return self._loras.files(request.options.lora)

    def _check(self, slot: int, n: int) -> None:
        held = self._memory.pos_max(slot) + 1
        if held != n:
            raise StateError(f"{held} positions came instead of {n}")
