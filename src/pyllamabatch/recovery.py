"""When a step fails: what the memory holds of it is taken out, and who can't be helped ends."""

from __future__ import annotations

import logging

from .errors import (
    DecodeAborted,
    DecodeError,
    FatalDecodeError,
    KvCacheFull,
    UnsupportedOperation,
    decode_error,
)
from .hand import Hand
from .hands import Hands
from .machine import MemoryLike
from .scheduler import Scheduler, Step
from .seats import Seats

log = logging.getLogger(__name__)

RETRIES = 1  # of a step that failed for no reason that could be helped


class Recovery:
    """The decoder thread's; called between two native calls."""

    def __init__(
        self, scheduler: Scheduler, memory: MemoryLike, seats: Seats, hands: Hands
    ) -> None:
        self._scheduler = scheduler
        self._memory = memory
        self._seats = seats
        self._hands = hands
        self._n_failures = 0  # of llama_decode, one after the other

    def computed(self) -> None:
        """A step was."""
        self._n_failures = 0

    def failed(self, step: Step, error: Exception, *, any_done: bool = False) -> None:
        """`step` was not computed. It is tried again with more room, or once more as it is; who
        can't be helped fails. `any_done`: steps before it were computed in the same call, so some
        may have ended."""
        guests = [self._seats.at[slot] for slot in step.slots]
        self._reconcile()
        if isinstance(error, KvCacheFull) and (any_done or self._make_room()):
            return
        if isinstance(error, (KvCacheFull, DecodeAborted, FatalDecodeError)):
            self._n_failures += 1
            if self._n_failures <= RETRIES:
                log.warning("%s; the step is tried again", error)
                return
        self._n_failures = 0
        for guest in guests:
            own = decode_error(error.code) if isinstance(error, DecodeError) else error
            if isinstance(guest, Hand):
                self._hands.failed(guest, own)
            elif guest is not None and guest.id in self._seats.open:
                self._seats.end(guest, "error", error=own)

    def _make_room(self) -> bool:
        """libllama found no cells although the ledger has them: what is kept goes, and if there is
        nothing the newest sequence gives way. False: a sequence that is alone can't be helped."""
        if self._scheduler.drop_kept():
            log.warning("llama_decode found no KV cells: kept prefixes are dropped")
            return True
        shed = self._scheduler.shed()
        if shed is None:
            return False
        log.warning("llama_decode found no KV cells: sequence %d is preempted", shed[0])
        self._seats.leave(*shed)
        return True

    def _reconcile(self) -> None:
        """What libllama holds of each running sequence is what the ledger says: rows that are there
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
            self._seats.leave(id, slot)
