"""Recovery: what happens when a step fails.

What the memory holds of the step is taken out. The step is tried again: with more room where there
were no cells, and once more as it is. When that fails, too, with an error of the backend, a fresh
context takes the place of the one that failed, and all that ran in it is computed again. A request
that was in such steps too often ends with the error."""

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
from .protocols import KvMemory
from .request import Request
from .slot_table import SlotTable

log = logging.getLogger(__name__)

RETRIES = 1  # of a step that failed for no reason that could be mended

_OF_THE_BACKEND = (KvCacheFull, DecodeAborted, FatalDecodeError)


class Recovery:
    """The core thread's; called between two native calls. `renew()`: a fresh context in place of
    the one that failed. `max_restarts`: of a request, or of a call of an interactive sequence."""

    def __init__(
        self,
        scheduler: Scheduler,
        table: SlotTable,
        memory: KvMemory,
        renew: Callable[[], object],
        max_restarts: int,
    ) -> None:
        self.n_restarts = 0
        self._scheduler = scheduler
        self._table = table
        self._memory = memory
        self._renew = renew
        self._max_restarts = max_restarts
        self._n_failures = 0  # of llama_decode, one after the other

    @property
    def tries_again(self) -> bool:
        """The last step failed, and comes again."""
        return self._n_failures > 0

    def computed(self) -> None:
        """A step was."""
        self._n_failures = 0

    def failed_once(self, error: Exception) -> None:
        """A step was not computed that no plan was made for. It comes again, with one."""
        self._reconcile()
        self._n_failures += isinstance(error, _OF_THE_BACKEND)

    def failed(self, step: Step, error: Exception, *, any_done: bool = False) -> None:
        """`step` was not computed. `any_done`: steps before it were, in the same call, so some
        requests may have ended. ContextCreateError when there is no fresh context."""
        requests = [one for slot in step.slots if (one := self._table.at[slot]) is not None]
        self._reconcile()
        if isinstance(error, KvCacheFull) and (any_done or self._make_room()):
            return
        if any_done and isinstance(error, FatalDecodeError):
            self._scheduler.drop_cached()  # what ended may hold rows that were to be taken back
        if isinstance(error, _OF_THE_BACKEND):
            self._n_failures += 1
            if self._n_failures <= RETRIES:
                log.warning("%s; the step is tried again", error)
                return
        self._n_failures = 0
        again: list[Request] = []
        if isinstance(error, FatalDecodeError):
            again = [one for one in requests if one.n_restarts < self._max_restarts]
        for request in requests:
            if request in again:
                request.n_restarts += 1
            else:
                own = error
                if isinstance(error, DecodeError):
                    own = decode_error(error.code, error.detail)
                request.sink.failed(own)
        if again:
            self._restart(error)

    def _restart(self, error: Exception) -> None:
        """All that runs waits to be computed again on a fresh context, in the order of its
        admission. Samplers are as they were."""
        scheduler = self._scheduler
        log.error("%s; a fresh context, and %d sequences again", error, scheduler.n_running)
        try:
            self._renew()
        except PyllamabatchError as problem:
            raise ContextCreateError(f"{error}; and there is no fresh context: {problem}") from None
        self.n_restarts += 1
        for id in reversed(scheduler.running_ids()):
            self._preempt(id)
        scheduler.drop_cached()

    def _make_room(self) -> bool:
        """libllama found no cells although the accounting has them: cached prefixes are dropped,
        and if there are none the newest sequence is preempted. False: one that runs alone."""
        if self._scheduler.drop_cached():
            log.warning("llama_decode found no KV cells: cached prefixes are dropped")
            return True
        shed = self._scheduler.preempt_newest()
        if shed is None:
            return False
        log.warning("llama_decode found no KV cells: sequence %d is preempted", shed[0])
        self._table.leave(*shed)
        return True

    def _reconcile(self) -> None:
        """libllama holds of each running sequence what the accounting says: rows that have not
        counted are taken out, and a sequence that has lost some is computed again."""
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
                log.info("sequence %d is computed again: %s", id, problem)
            self._preempt(id)

    def _preempt(self, id: int) -> None:
        self._table.leave(id, self._scheduler.preempt(id, worth=False))
