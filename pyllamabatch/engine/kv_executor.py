"""KvExecutor: carries out in the memory what the scheduler has decided."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter

from ..errors import PyllamabatchError, StateError
from ..kv import KvOperation, SwapSpace
from ..llama.lora import LoraNames
from ..scheduler import Scheduler
from .protocols import ContextLike, MemoryLike

log = logging.getLogger(__name__)


class KvExecutor:
    """The core thread's. `space`: where the states of swapped sequences lie. `loras_of(id)`: the
    adapters that a sequence is computed with."""

    def __init__(
        self,
        scheduler: Scheduler,
        memory: MemoryLike,
        states: ContextLike,
        space: SwapSpace,
        loras_of: Callable[[int], LoraNames],
        state_of: Callable[[int], bytes],
    ) -> None:
        self._state_of = state_of
        self._loras_of = loras_of
        self._scheduler = scheduler
        self._memory = memory
        self._states = states
        self._space = space

    def carry_out(self, operations: tuple[KvOperation, ...]) -> dict[int, int]:
        """Returns the sequences that could not go on from there, id -> slot: they wait again, to be
        computed, and a step that has them is void."""
        failed: dict[int, int] = {}
        for operation in operations:
            if operation.id in failed and operation.kind in ("copy", "trim", "load"):
                continue
            try:
                self._carry_out(operation)
            except (PyllamabatchError, OSError) as problem:
                log.warning("%s of slot %d failed: %s", operation.kind, operation.slot, problem)
                preempted = self._scheduler.kv_failed(operation)
                if preempted is not None:
                    failed[preempted[0]] = preempted[1]
        return failed

    def _carry_out(self, operation: KvOperation) -> None:
        memory, space, states = self._memory, self._space, self._states
        id, slot, n = operation.id, operation.slot, operation.n
        start = perf_counter()
        match operation.kind:
            case "remove":
                memory.seq_rm(slot)
            case "trim" | "cut":
                memory.seq_rm(slot, n)
            case "copy":
                memory.seq_cp(operation.source, slot, *(() if operation.whole else (0, n)))
                self._check(slot, n)
            case "store":
                space.put(id, self._state_of(id))
            case "discard":
                space.drop(id)
            case "save":
                state = states.state_seq_get(slot, self._loras_of(id))
                space.put(id, state)
                self._scheduler.copied(len(state), perf_counter() - start, n)
            case "load":
                state = space.take(id)
                states.state_seq_set(state, slot, self._loras_of(id))
                self._check(slot, n)
                self._scheduler.copied(len(state), perf_counter() - start, n)

    def _check(self, slot: int, n: int) -> None:
        held = self._memory.pos_max(slot) + 1
        if held != n:
            raise StateError(f"{held} positions came instead of {n}")
