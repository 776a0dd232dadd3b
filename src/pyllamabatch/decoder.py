"""The decoder thread: the only one that touches the context.

One turn of its loop: take in what other threads have asked for, ask the scheduler for a step, one
native call. While the plan stays the same the call goes on with it, and the delivery thread hands
out the tokens meanwhile; whoever wants something rings the stepper's bell, and the call comes back
after the step that it is in. Everything that ends a request early (cancel, a failed row, a failed
decode, no cells left, a stop string) ends it here, between two calls, so that the cache, the ledger
and the counters always agree.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

from ._stream_step import Run
from .delivery import Delivery
from .errors import (
    DecodeAborted,
    DecodeError,
    EngineClosed,
    FatalDecodeError,
    KvCacheFull,
    PyllamabatchError,
    SamplingError,
    UnsupportedOperation,
    decode_error,
)
from .kv import SwapSpace
from .machine import MemoryLike, StepperLike
from .moves import Mover, StatesLike
from .request import Request
from .scheduler import Scheduler, Step
from .seats import Seats
from .stepper import SAMPLE, Finish
from .stream import Stream
from .trace import StepTrace

log = logging.getLogger(__name__)

RETRIES = 1  # of a step that failed for no reason that could be helped


class Decoder:
    """Runs requests on one context. `close` frees the context; it is called at the very end, by
    the decoder's own thread, when the delivery thread has ended."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: Any,
        memory: MemoryLike,
        states: StatesLike,
        close: Callable[[], None],
        trace: StepTrace | None = None,
        space: SwapSpace | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.n_submitted = 0
        self.n_reused = 0  # graphs
        self.error: BaseException | None = None  # what ended the thread, if it was not `close`
        self.trace = trace
        self.delivery = Delivery(
            stepper, scheduler.n_slots, self._stopped, self._delivery_failed, trace
        )
        self.seats = Seats(scheduler, stepper, self.delivery, trace)
        scheduler.tokens_of = self.seats.tokens_of
        self._space = SwapSpace(0) if space is None else space
        self._mover = Mover(scheduler, memory, states, self._space)
        self._n_failures = 0  # of llama_decode, one after the other
        self._stepper: StepperLike = stepper
        self._memory = memory
        self._close = close
        self._running: tuple[Step, int] | None = None  # the call that goes on, and its first step
        self._n_taken = 0  # of `n_submitted`
        self._mail: list[Callable[[], None]] = []
        self._closing = False
        self._n_visitors = 0  # threads that prepare a request
        self._wake = threading.Condition(threading.Lock())  # guards mail and closing
        # Guards the state between two steps. Whoever needs both takes `_wake` second.
        self.state = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="pyllamabatch-decoder", daemon=True)

    # -- from any thread

    def start(self) -> None:
        self.delivery.thread.start()
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
                self._n_taken += 1
                self.seats.add(request)

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
        `timeout` seconds) or cancelled. Returns when the threads have ended, unless it is called
        by one of them."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if not wait:
            self._post(self._cancel_all)
        if threading.current_thread() in (self._thread, self.delivery.thread):
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
            return self.n_submitted - self._n_taken

    def progress(self) -> tuple[int, int]:
        """Of the call that goes on: steps that are done and in no counter yet, and the rows of
        each. With `state` held."""
        if self._running is None:
            return 0, 0
        step, first = self._running
        return max(0, self._stepper.n_published - first), step.n_rows

    # -- the loop

    def _run(self) -> None:
        try:
            while self._take_mail():
                self._turn()
        except BaseException as error:
            log.exception("the decoder thread failed; its engine is closed")
            self._fail_all(error)
        finally:
            self.delivery.close(self._stepper.n_recorded)
            self._stepper.flush()
            self.delivery.thread.join()
            self.delivery.finish_rest(self._cause())
            with self._wake:
                self._wake.wait_for(lambda: self._n_visitors == 0)
            self._space.clear()
            self._close()

    def _take_mail(self) -> bool:
        """Do what other threads have asked for; wait for it when there is nothing else to do.
        False: closed, and nothing is left to do."""
        if not self._mail and not self.scheduler.idle:
            return True
        if not self._mail:
            self._stepper.flush()
        with self._wake:
            if not self._mail and self.scheduler.idle and not self._wait():
                return False
        with self.state:
            with self._wake:
                mail, self._mail = self._mail, []
            for act in mail:
                act()
            self._mover.carry_out()
        if self.error is not None:
            raise self.error
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
            for id, slot in step.preempted:
                self.seats.leave(id, slot)
            failed = self._mover.carry_out()
            for id, slot in step.admitted:
                if id not in failed:
                    self.seats.admit(id, slot)
            if failed or step.n_rows == 0:
                return
        for part in (step,) if self.scheduler.limits.unified else step.parts():
            if not self._call(part):
                return

    def _call(self, step: Step) -> bool:
        """The native call for a step or a part of one. False if it failed: it is to be planned
        anew."""
        stepper = self._stepper
        with self.state:
            n_more = self._fill(step) if step.chunks else 0
            first = stepper.n_recorded
            if self.trace is not None:
                self.trace.begin(first, step, self.scheduler.ledger.used)
            self._running = step, first
        if self.delivery.has_events:
            stepper.flush()
        try:
            run = stepper.compute(step.decode, step.repeat, n_more)
        except (PyllamabatchError, MemoryError) as problem:
            error = problem
            with self.state:
                self._running = None
                self._failed(step, error)
                self._mover.carry_out()
            return False
        with self.state:
            self._running = None
            self._apply(step, run)
            self._mover.carry_out()
        return run.code == 0

    def _fill(self, step: Step) -> int:
        """Write the rows of prompts, behind those that the native call makes of `step.decode`; how
        many they are."""
        rows = self._stepper.rows
        first = end = len(step.decode)
        for chunk in step.chunks:
            request = self.seats.at[chunk.slot]
            assert request is not None
            start, end = end, end + chunk.n
            rows.token[start:end] = request.tokens[chunk.start : chunk.start + chunk.n]
            rows.pos[start:end] = np.arange(chunk.start, chunk.start + chunk.n)
            rows.seq[start:end] = chunk.slot
            rows.flags[start:end] = 0
            if chunk.last:
                rows.flags[end - 1] = SAMPLE
        return end - first

    def _apply(self, step: Step, run: Run) -> None:
        """What the call has done, and who has finished in its last step."""
        self.n_reused += run.n_reused
        if run.n_steps:
            self._n_failures = 0
            self._observe(step, run)
            self.scheduler.advance(step, run.n_steps)
        for slot, token, finish in run.finished:
            request = self.seats.at[slot]
            assert request is not None
            if finish == Finish.LENGTH:
                self.seats.end(request, "length")
            elif finish == Finish.ERROR:
                self.scheduler.counters.tokens -= 1
                error = SamplingError(self._stepper.slot_error(slot))
                self.seats.end(request, "error", error=error)
            else:  # an end-of-generation or stop token
                self.seats.end(request, "stop", stop=token)
        if run.code:
            self._failed(step, decode_error(run.code), any_done=run.n_steps > 0)

    def _observe(self, step: Step, run: Run) -> None:
        """The steps of one call, on average, to the cost model; prompts to the estimate of what a
        preemption costs."""
        n, n_decode = run.n_steps, len(step.decode)
        if step.n_rows - n_decode >= 16 + 8 * n_decode:
            self.scheduler.starts.swap.computed(step.n_rows, run.seconds)
        if self.scheduler.cost is None:
            return
        kv = self.scheduler.ledger.used + step.n_rows * (n - 1) / 2
        n_sequences = n_decode + len(step.chunks)
        prefill = step.n_rows - n_decode
        self.scheduler.cost.observe(step.n_rows, prefill, kv, n_sequences, run.seconds / n)

    # -- when a step fails

    def _failed(self, step: Step, error: Exception, *, any_done: bool = False) -> None:
        """`step` was not computed. What the memory holds of it is taken out; then it is tried again
        with more room, or once more as it is; who can't be helped fails."""
        requests = [self.seats.at[slot] for slot in step.slots]
        self._reconcile()
        if isinstance(error, KvCacheFull) and (any_done or self._make_room()):
            return  # `any_done`: some may have ended, it is planned anew
        if isinstance(error, (KvCacheFull, DecodeAborted, FatalDecodeError)):
            self._n_failures += 1
            if self._n_failures <= RETRIES:
                log.warning("%s; the step is tried again", error)
                return
        self._n_failures = 0
        for request in requests:
            if request is not None and request.id in self.seats.open:
                own = decode_error(error.code) if isinstance(error, DecodeError) else error
                self.seats.end(request, "error", error=own)

    def _make_room(self) -> bool:
        """libllama found no cells although the ledger has them: what is kept goes, and if there is
        nothing the newest sequence gives way. False: a sequence that is alone can't be helped."""
        if self.scheduler.drop_kept():
            log.warning("llama_decode found no KV cells: kept prefixes are dropped")
            return True
        shed = self.scheduler.shed()
        if shed is None:
            return False
        log.warning("llama_decode found no KV cells: request %d is preempted", shed[0])
        self.seats.leave(*shed)
        return True

    def _reconcile(self) -> None:
        """What libllama holds of each running sequence is what the ledger says: rows that are there
        without having counted are taken out, and who has lost some is computed again."""
        scheduler, memory = self.scheduler, self._memory
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
            self.seats.leave(id, slot)

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
            for request in list(self.seats.open.values()):
                self.seats.retire(request, "error", error=self._cause())

    def _cause(self) -> Exception:
        """What requests end with that the thread leaves behind."""
        return self.error if isinstance(self.error, Exception) else self._closed()

    def _closed(self) -> EngineClosed:
        if self.error is None:
            return EngineClosed("the engine is closed")
        return EngineClosed(f"the engine is closed: its thread ended with {self.error!r}")

    # -- what other threads ask for

    def _post(self, act: Callable[[], None]) -> None:
        with self._wake:
            self._mail.append(act)
            self._wake.notify()
        self._stepper.ring()

    def _cancel(self, id: int) -> None:
        request = self.seats.open.get(id)
        if request is not None:
            self.seats.end(request, "cancelled")

    def _cancel_all(self) -> None:
        for request in list(self.seats.open.values()):
            self.seats.end(request, "cancelled")

    def _stopped(self, id: int) -> None:
        """A stop string has been found in a request's text; what was sampled behind it does not
        count."""

        def end() -> None:
            request = self.seats.open.get(id)
            if request is not None:
                self.seats.end(request, "stop")

        self._post(end)

    def _delivery_failed(self, error: BaseException) -> None:
        self.error = error
        self._post(lambda: None)
