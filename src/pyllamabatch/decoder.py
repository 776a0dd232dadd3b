"""The decoder thread: the only one that touches the context.

One turn of its loop: take in what other threads have asked for, ask the scheduler for a step, fill
the rows, one native call, hand out the tokens. Everything that ends a request early (cancel, a
failed row, a failed decode, no cells left) ends it here, between two steps, so that the cache, the
ledger and the counters always agree.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import EngineClosed, KvCacheFull, PyllamabatchError, SamplingError, decode_error
from .sampling import SamplingParams
from .scheduler import Scheduler, Step
from .stepper import SAMPLE, Finish
from .stream import FinishReason, Stream
from .text import Pieces

log = logging.getLogger(__name__)

LENGTH = int(Finish.LENGTH)

Tokens = npt.NDArray[np.int32]


class StepperLike(Protocol):
    """What the decoder needs of a `Stepper`."""

    @property
    def rows(self) -> Any: ...
    def step(self, n_rows: int) -> Any: ...
    def clear_slot(self, seq_id: int) -> None: ...
    def take_slot(self, seq_id: int) -> Any: ...
    def put_slot(self, seq_id: int, slot: Any) -> None: ...
    def slot_error(self, seq_id: int) -> str: ...


class MemoryLike(Protocol):
    """What the decoder needs of a `Memory`."""

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None: ...
    def pos_max(self, seq_id: int) -> int: ...


class Request:
    """What the decoder knows of a request. `tokens`: what is to be computed, int32: its prompt,
    and after a preemption what it had generated too. `sampler`: its sampling state while it has no
    slot."""

    __slots__ = ("id", "params", "prompt", "sampler", "stream", "tokens")

    def __init__(
        self, prompt: Tokens, params: SamplingParams, stream: Stream, sampler: object
    ) -> None:
        self.id = stream.id
        self.prompt = prompt
        self.tokens = prompt
        self.params = params
        self.stream = stream
        self.sampler = sampler


class Decoder:
    """Runs requests on one context. `close` frees the context; it is called at the very end, by
    the decoder's own thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: StepperLike,
        memory: MemoryLike,
        pieces: Pieces,
        close: Callable[[], None],
    ) -> None:
        n = scheduler.limits.n_seq_max
        self.scheduler = scheduler
        self.finished: dict[str, int] = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self.n_submitted = 0
        self.error: BaseException | None = None  # what ended the thread, if it was not `close`
        self._stepper = stepper
        self._memory = memory
        self._pieces = pieces
        self._close = close
        self._open: dict[int, Request] = {}  # by id, from `submit` to the end
        self._at: list[Request | None] = [None] * n  # by slot
        self._next_token = np.zeros(n, dtype=np.int32)  # by slot: the token sampled last
        self._mail: list[Callable[[], None]] = []
        self._closing = False
        self._n_visitors = 0  # threads that prepare a request
        self._wake = threading.Condition(threading.Lock())  # guards mail and closing
        # Guards the state between two steps. Whoever needs both takes `_wake` second.
        self.state = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="pyllamabatch-decoder", daemon=True)

    # -- from any thread

    def start(self) -> None:
        self._thread.start()

    @contextmanager
    def visit(self) -> Iterator[None]:
        """The model and the stepper stay open inside. EngineClosed when they are closed already."""
        with self._wake:
            if self._closing:
                raise self._closed()
            self._n_visitors += 1
        try:
            yield
        finally:
            with self._wake:
                self._n_visitors -= 1
                self._wake.notify()

    def submit(self, requests: list[Request]) -> None:
        """All of them or none: EngineClosed."""

        def take() -> None:
            for request in requests:
                self._open[request.id] = request
                self.scheduler.add(
                    request.id,
                    len(request.prompt),
                    request.params.max_tokens,
                    arrival=request.stream.submitted_at,
                )

        with self._wake:
            if self._closing:
                raise self._closed()
            self.n_submitted += len(requests)
            self._mail.append(take)
            self._wake.notify()

    def cancel(self, stream: Stream) -> None:
        self._post(lambda: self._cancel(stream.id))

    def close(self, *, wait: bool, timeout: float | None) -> None:
        """No more requests; those that are open are finished (`wait`, but no longer than
        `timeout` seconds) or cancelled. Returns when the thread has ended, unless it is its own."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if not wait:
            self._post(self._cancel_all)
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout if wait else None)
        if self._thread.is_alive():
            self._post(self._cancel_all)
            self._thread.join()

    @property
    def closed(self) -> bool:
        return self._closing

    @property
    def n_mail(self) -> int:
        """Requests that the thread has not taken in yet. With `state` held."""
        with self._wake:
            return self.n_submitted - sum(self.finished.values()) - len(self._open)

    # -- the loop

    def _run(self) -> None:
        try:
            while self._take_mail():
                self._turn()
        except BaseException as error:
            log.exception("the decoder thread failed; its engine is closed")
            self._fail_all(error)
        finally:
            with self._wake:
                self._wake.wait_for(lambda: self._n_visitors == 0)
            self._close()

    def _take_mail(self) -> bool:
        """Do what other threads have asked for; wait for it when there is nothing else to do.
        False: closed, and nothing is left to do."""
        if not self._mail and not self.scheduler.idle:
            return True
        with self._wake:
            while not self._mail and self.scheduler.idle:
                if self._closing:
                    return False
                self._wake.wait()
        with self.state:
            with self._wake:
                mail, self._mail = self._mail, []
            for act in mail:
                act()
        return True

    def _turn(self) -> None:
        with self.state:
            step = self.scheduler.plan(perf_counter())
            if step is None:
                return
            self._place(step)
            n_rows = self._fill(step)
        try:
            result = self._stepper.step(n_rows)
        except (PyllamabatchError, MemoryError) as problem:
            error = problem
            with self.state:
                self._fail_step(step, lambda: error)
            return
        with self.state:
            code = result.code
            if code == 0:
                self.scheduler.advance(step)
                self._deliver(result)
            elif code == 1:
                self._make_room(step)
            else:
                self._fail_step(step, lambda: decode_error(code))

    def _place(self, step: Step) -> None:
        """Move sequences out of and into the slots that the step says."""
        for id, slot in step.preempted:
            self._leave(self._open[id], slot)
        for id, slot in step.admitted:
            request = self._open[id]
            self._stepper.put_slot(slot, request.sampler)
            request.sampler = None
            self._at[slot] = request

    def _fill(self, step: Step) -> int:
        rows = self._stepper.rows
        token, pos, seq, flags = rows.token, rows.pos, rows.seq, rows.flags
        slots = step.decode
        n = len(slots)
        if n:
            token[:n] = self._next_token[slots]
            pos[:n] = self.scheduler.positions[slots]
            seq[:n] = slots
            flags[:n] = SAMPLE
        for chunk in step.chunks:
            request = self._at[chunk.slot]
            assert request is not None
            first, n = n, n + chunk.n
            end = chunk.start + chunk.n
            token[first:n] = request.tokens[chunk.start : end]
            pos[first:n] = np.arange(chunk.start, end)
            seq[first:n] = chunk.slot
            flags[first:n] = 0
            if chunk.last:
                flags[n - 1] = SAMPLE
            else:
                self._next_token[chunk.slot] = request.tokens[end]
        return n

    def _deliver(self, result: Any) -> None:
        """Hand out the tokens of a step."""
        now = perf_counter()
        slots, tokens = result.seq, result.token
        self._next_token[slots] = tokens
        pieces, at = self._pieces, self._at
        columns = (slots, tokens, result.finish, result.logprob)
        records = zip(*(column.tolist() for column in columns), strict=True)
        for i, (slot, token, finish, logprob) in enumerate(records):
            request = at[slot]
            assert request is not None
            if finish and finish != LENGTH:
                self._last(request, slot, token, finish)
                continue
            top = _top_of(result, i) if request.params.logprobs else None
            if request.stream._push(token, pieces[token], now, logprob, top):
                self._end(request, "stop")
            elif finish:
                self._end(request, "length")

    def _last(self, request: Request, slot: int, token: int, finish: int) -> None:
        """A sampled row that gives no token to show."""
        if finish == Finish.ERROR:
            self.scheduler.counters.tokens -= 1
            error = SamplingError(self._stepper.slot_error(slot))
            self._end(request, "error", error=error)
        else:  # an end-of-generation or stop token
            self._end(request, "stop", stop=token)

    # -- when a step fails

    def _make_room(self, step: Step) -> None:
        """libllama found no cells although the ledger has them: the newest sequence gives way. A
        sequence that is alone can't be helped."""
        shed = self.scheduler.shed()
        if shed is None:
            self._fail_step(step, lambda: KvCacheFull(1))
            return
        id, slot = shed
        log.warning("llama_decode found no KV cells: request %d is preempted", id)
        self._leave(self._open[id], slot)

    def _fail_step(self, step: Step, error: Callable[[], Exception]) -> None:
        """The sequences of the step fail, each with an error of its own. The others go on from
        what the cache really holds of them."""
        slots = {*step.decode.tolist(), *(chunk.slot for chunk in step.chunks)}
        for slot in slots:
            request = self._at[slot]
            if request is not None:
                self._end(request, "error", error=error())
        scheduler = self.scheduler
        for id in scheduler.running_ids():
            slot = scheduler.slot(id)
            if slot is not None and self._memory.pos_max(slot) != scheduler.computed(slot) - 1:
                scheduler.preempt(id)
                self._leave(self._open[id], slot)

    def _fail_all(self, error: BaseException) -> None:
        """The thread is about to end: nobody may be left waiting."""
        self.error = error
        with self.state:
            with self._wake:
                self._closing = True
                mail, self._mail = self._mail, []
            for act in mail:
                with suppress(Exception):  # the first error is the one to report
                    act()
            cause = error if isinstance(error, Exception) else self._closed()
            for request in list(self._open.values()):
                self._retire(request, "error", error=cause)

    def _closed(self) -> EngineClosed:
        if self.error is None:
            return EngineClosed("the engine is closed")
        return EngineClosed(f"the engine is closed: its thread ended with {self.error!r}")

    # -- the life of one request

    def _post(self, act: Callable[[], None]) -> None:
        with self._wake:
            self._mail.append(act)
            self._wake.notify()

    def _cancel(self, id: int) -> None:
        request = self._open.get(id)
        if request is not None:
            self._end(request, "cancelled")

    def _cancel_all(self) -> None:
        for request in list(self._open.values()):
            self._end(request, "cancelled")

    def _leave(self, request: Request, slot: int) -> None:
        """Preempted: cells and slot are given up, the sampling state is kept, and what was
        generated is to be computed again behind the prompt."""
        request.sampler = self._stepper.take_slot(slot)
        self._memory.seq_rm(slot)
        self._at[slot] = None
        generated = np.array(request.stream._tokens, dtype=np.int32)
        request.tokens = np.concatenate((request.prompt, generated))

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop: int | None = None,
        error: Exception | None = None,
    ) -> None:
        slot = self.scheduler.remove(request.id)
        if slot is not None:
            self._stepper.clear_slot(slot)
            self._memory.seq_rm(slot)
            self._at[slot] = None
        self._retire(request, reason, stop=stop, error=error)

    def _retire(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop: int | None = None,
        error: Exception | None = None,
    ) -> None:
        del self._open[request.id]
        self.finished[reason] += 1
        request.stream._finish(reason, stop, error)


def _top_of(result: Any, i: int) -> dict[int, float]:
    n = int(result.n_top[i])
    tokens, logprobs = result.top_token[i, :n].tolist(), result.top_logprob[i, :n].tolist()
    return dict(zip(tokens, logprobs, strict=True))
