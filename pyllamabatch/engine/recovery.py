"""When a step fails: what the memory holds of it is taken out, and who can't be helped ends.

A step that fails once is tried again. When that fails, too, with an error of the backend, the
context itself is not trusted any more: a fresh one takes its place, and all that ran in it is
computed again, but for those that were in such steps too often.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..errors import (
    ContextCreateError,
    DecodeAborted,
    DecodeError,
    FatalDecodeError,
    KvCacheFull,
    PyllamabatchError,
    UnsupportedOperation,
    decode_error,
)
from ..scheduler import Scheduler, Step
from .hand import Hand
from .interactive import InteractiveRunner
from .protocols import MemoryLike
from .request import Request
from .slot_table import SlotTable

log = logging.getLogger(__name__)

RETRIES = 1  # of a step that failed for no reason that could be helped


class Recovery:
    """The core thread's; called between two native calls. `renew()`: a fresh context in place of
    the one that failed. `max_restarts`: how often a request, or a call of a interactive sequence,
    may be in a step that costs one."""

    def __init__(
        self,
        scheduler: Scheduler,
        memory: MemoryLike,
        slot_table: SlotTable,
        hands: InteractiveRunner,
        renew: Callable[[], None],
        max_restarts: int,
    ) -> None:
        self.n_restarts = 0
        self._renew = renew
        self._max_restarts = max_restarts
        self._scheduler = scheduler
        self._memory = memory
        self._slot_table = slot_table
        self._hands = hands
        self._n_failures = 0  # of llama_decode, one after the other

    def computed(self) -> None:
        """A step was."""
        self._n_failures = 0

    def failed(self, step: Step, error: Exception, *, any_done: bool = False) -> None:
        """`step` was not computed. It is tried again with more room, or once more as it is, or on a
        fresh context; who can't be helped fails. `any_done`: steps before it were computed in the
        same call, so some may have ended. ContextCreateError when nobody can be helped."""
        occupants = [
            occupant for slot in step.slots if (occupant := self._slot_table.at[slot]) is not None
        ]
        self._reconcile()
        if isinstance(error, KvCacheFull) and (any_done or self._make_room()):
            return
        if isinstance(error, (KvCacheFull, DecodeAborted, FatalDecodeError)):
            self._n_failures += 1
            if self._n_failures <= RETRIES:
                log.warning("%s; the step is tried again", error)
                return
        self._n_failures = 0
        helped: list[Request | Hand] = []
        if isinstance(error, FatalDecodeError):
            helped = [
                occupant for occupant in occupants if occupant.n_restarts < self._max_restarts
            ]
        for occupant in occupants:
            if occupant not in helped:
                self._fail(occupant, error)
        if helped:
            for occupant in helped:
                occupant.n_restarts += 1
            self._restart(error)

    def _fail(self, occupant: Request | Hand, error: Exception) -> None:
        own = decode_error(error.code) if isinstance(error, DecodeError) else error
        if isinstance(occupant, Hand):
            self._hands.failed(occupant, own)
        elif occupant.id in self._slot_table.open:
            self._slot_table.end(occupant, "error", error=own)

    def _restart(self, error: Exception) -> None:
        """Everything that runs waits to be computed again on a fresh context, in the order in which
        it was admitted; samplers, and what was handed out, are as they were."""
        scheduler = self._scheduler
        log.error("%s; a fresh context, and %d sequences again", error, scheduler.n_running)
        try:
            self._renew()
        except PyllamabatchError as problem:
            raise ContextCreateError(f"{error}; and there is no fresh context: {problem}") from None
        self.n_restarts += 1
        for id in reversed(scheduler.running_ids()):
            self._slot_table.leave(id, scheduler.preempt(id, worth=False))
        scheduler.drop_cached()

    def _make_room(self) -> bool:
        """libllama found no cells although the accounting has them: what is kept goes, and if
        there is
        nothing the newest sequence gives way. False: a sequence that is alone can't be helped."""
        if self._scheduler.drop_cached():
            log.warning("llama_decode found no KV cells: kept prefixes are dropped")
            return True
        shed = self._scheduler.preempt_newest()
        if shed is None:
            return False
        log.warning("llama_decode found no KV cells: sequence %d is preempted", shed[0])
        self._slot_table.leave(*shed)
        return True

    def _reconcile(self) -> None:
        """What libllama holds of each running sequence is what the accounting says: rows that are
        there
        without having counted are taken out, and who has lost some is computed again."""
        scheduler, memory = self._scheduler, self._memory
        for id in scheduler.running_ids():
            slot = scheduler.slot(id)
            assert slot is not None
            n, held = scheduler.computed(slot), memory.pos_max(slot) + 1
            if held == n:
                continue
            try:
                if held > n:
                    memory.seq_rm(slot, n)
                    continue
            except UnsupportedOperation as problem:
                log.info("request %d is computed again: %s", id, problem)
            scheduler.preempt(id, worth=False)
            self._slot_table.leave(id, slot)
