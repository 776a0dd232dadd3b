"""The decoder thread: the only one that touches the context.

One turn of its loop: take in what other threads have asked for, ask the scheduler for a step, one
native call, hand out the tokens. While the plan stays the same the call makes several steps of it;
whoever wants something rings the stepper's bell, and it comes back after the step that it is in.
Everything that ends a request early (cancel, a failed row, a failed decode, no cells left, a stop
string) ends it here, between two calls, so that the cache, the ledger and the counters always
agree.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

from .errors import EngineClosed, KvCacheFull, PyllamabatchError, SamplingError, decode_error
from .machine import MemoryLike, Pace, StepperLike
from .request import Request, logprobs_of
from .scheduler import Scheduler, Step
from .stepper import SAMPLE, Finish
from .stream import FinishReason, Stream
from .text import Pieces
from .trace import StepTrace

log = logging.getLogger(__name__)

LENGTH = int(Finish.LENGTH)


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
        trace: StepTrace | None = None,
    ) -> None:
        n = scheduler.limits.n_seq_max
        self.scheduler = scheduler
        self.finished: dict[str, int] = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self.n_submitted = 0
        self.error: BaseException | None = None  # what ended the thread, if it was not `close`
        self._stepper = stepper
        self._memory = memory
        self._pieces = pieces
        self._pace = Pace()
        self._close = close
        self.trace = trace
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
        self._stepper.ring()

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
            if not self._mail and self.scheduler.idle and not self._wait():
                return False
        with self.state:
            with self._wake:
                mail, self._mail = self._mail, []
            for act in mail:
                act()
        return True

    def _wait(self) -> bool:
        """Until there is mail; False when the engine is closed. With `_wake` held."""
        start = perf_counter_ns()
        while not self._mail:
            if self._closing:
                return False
            self._wake.wait()
        if self.trace is not None:
            self.trace.idle_ns += perf_counter_ns() - start
        return True

    def _turn(self) -> None:
        with self.state:
            step = self.scheduler.plan(perf_counter())
            if step is None:
                return
            self._place(step)
        if step.n_rows == 0:
            return
        try:
            result = self._compute(step)
        except (PyllamabatchError, MemoryError) as problem:
            error = problem
            with self.state:
                self._fail_step(step, lambda: error)
            return
        with self.state:
            code = result.code
            if result.n_steps:
                if self.trace is not None:
                    self.trace.record(step, result.steps, self.scheduler.ledger.used)
                self.scheduler.advance(step, result.n_steps)
                self._deliver(result)
            if code == 1:
                if not result.n_steps:  # else some may have ended: it is planned anew
                    self._make_room(step)
            elif code:
                self._fail_step(step, lambda: decode_error(code))

    def _compute(self, step: Step) -> Any:
        """The native call: one step, or as many of the same as the scheduler and the pace allow."""
        stepper, pace = self._stepper, self._pace
        if step.chunks:
            return stepper.step(self._fill(step))
        n_steps = min(step.repeat, pace.n_steps, stepper.n_steps_max)
        start = perf_counter()
        result = stepper.run(step.decode, n_steps)
        pace.took(perf_counter() - start, result.n_steps)
        return result

    def _place(self, step: Step) -> None:
        """Move sequences out of and into the slots that the step says."""
        for id, slot in step.preempted:
            self._leave(self._open[id], slot)
        for id, slot in step.admitted:
            request = self._open[id]
            self._stepper.put_slot(slot, request.sampler)
            request.sampler = None
            self._at[slot] = request
            if self.trace is not None:
                self.trace.ids[slot] = id

    def _fill(self, step: Step) -> int:
        """Write the rows of a step; how many they are."""
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
        """Hand out the tokens of the steps that were computed, each request's in one go. Every
        step sampled the same sequences, and only in the last one some of them finished."""
        now = perf_counter()
        n_steps = result.n_steps
        n = len(result.seq) // n_steps
        if n == 0:
            return
        slots, columns = result.seq[:n], result.token.reshape(n_steps, n)
        self._next_token[slots] = columns[-1]
        piece, at = self._pieces.__getitem__, self._at
        each = zip(slots.tolist(), columns.T.tolist(), result.finish[-n:].tolist(), strict=True)
        for i, (slot, tokens, finish) in enumerate(each):
            request = at[slot]
            assert request is not None
            last = tokens.pop() if finish and finish != LENGTH else None
            if tokens:
                logprobs = top = None
                if request.params.logprobs is not None:
                    logprobs, top = logprobs_of(result, slice(i, n * len(tokens), n))
                taken = request.stream._push(tokens, [*map(piece, tokens)], now, logprobs, top)
                if taken is not None:  # what came behind the stop string never was
                    self.scheduler.counters.tokens -= n_steps - taken
                    self._end(request, "stop")
                    continue
            if last is not None:
                self._last(request, slot, last, finish)
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
        self._stepper.ring()

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
