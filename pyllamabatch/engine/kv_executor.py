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
    ) -> None:
        self._loras_of = loras_of
        self._scheduler = scheduler
        self._memory = memory
        self._states = states
        self._space = space

    def carry_out(self) -> set[int]:
        """All that has been decided. Returns the sequences that could not start from what they were
        to: they wait again, to be computed, and a step that has them is void."""
        failed: set[int] = set()
        while moves := self._scheduler.take_kv_operations():
            for move in moves:
                if move.id in failed and move.kind in ("copy", "trim", "load"):
                    continue
                try:
                    self._carry_out(move)
                except (PyllamabatchError, OSError) as problem:
                    log.warning("%s of slot %d failed: %s", move.kind, move.slot, problem)
                    if self._failed(move):
                        failed.add(move.id)
        return failed

    def _carry_out(self, move: KvOperation) -> None:
        memory, slot, n = self._memory, move.slot, move.n
        if move.kind == "remove":
            memory.seq_rm(slot)
        elif move.kind == "trim":
            memory.seq_rm(slot, n)
        elif move.kind == "copy":
            memory.seq_cp(move.source, slot, *(() if move.whole else (0, n)))
            self._check(slot, n)
        elif move.kind == "discard":
            self._space.drop(move.id)
        else:
            start = perf_counter()
            if move.kind == "save":
                state = self._states.state_seq_get(slot, self._loras_of(move.id))
                self._space.put(move.id, state)
            else:
                state = self._space.take(move.id)
                self._states.state_seq_set(state, slot, self._loras_of(move.id))
                self._check(slot, n)
            self._scheduler.admission.swap.copied(len(state), perf_counter() - start, n)

    def _check(self, slot: int, n: int) -> None:
        held = self._memory.pos_max(slot) + 1
        if held != n:
            raise StateError(f"{held} positions came instead of {n}")

    def _failed(self, move: KvOperation) -> bool:
        """What it was for is given up. True when a sequence was to start from it."""
        if move.kind == "remove":
            raise RuntimeError(f"sequence {move.slot} can't be removed")
        if move.kind == "save":
            self._scheduler.admission.drop_saved(move.id)
        elif move.id:
            self._scheduler.start_failed(move.id)
            return True
        else:  # of what is kept
            self._memory.seq_rm(move.slot)
            self._scheduler.admission.cache.drop(move.slot)
        return False
