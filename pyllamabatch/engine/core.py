"""The core thread: the only one that touches the context.

One turn of its loop: take in what other threads have asked for, ask the scheduler for a step, one
native call. While the plan stays the same the call goes on with it, and the delivery thread hands
out the tokens meanwhile; whoever wants something rings the stepper's bell, and the call comes back
after the step that it is in. Everything that ends a request early (cancel, a failed row, a failed
decode, no cells left, a stop string) ends it here, between two calls, so that the cache, the
accounting
and the counters always agree.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

from ..errors import PyllamabatchError, SamplingError, decode_error
from ..kv import SwapSpace
from ..llama.lora import LoraNames
from ..scheduler import Scheduler, Step
from ..step.stepper import Finish
from ..step.trace import StepTrace
from ..step.types import Run
from .command_queue import CommandQueue
from .cost_observer import CostObserver
from .hand import Call, Hand
from .interactive import InteractiveRunner
from .kv_executor import KvExecutor
from .output_processor import OutputProcessor
from .protocols import ContextLike, LorasLike, MemoryLike, StepperLike
from .recovery import Recovery
from .request import Request
from .slot_table import SlotTable
from .stream import Stream

log = logging.getLogger(__name__)


class EngineCore:
    """Runs requests on one context. `close` frees the context; it is called at the very end, by
    the core's own thread, when the delivery thread has ended."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: Any,
        memory: MemoryLike,
        states: ContextLike,
        close: Callable[[], None],
        trace: StepTrace | None = None,
        space: SwapSpace | None = None,
        max_waiting: int | None = None,
        max_restarts: int = 0,
        loras: LorasLike | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.commands = CommandQueue(stepper.interrupt, max_waiting)
        self.n_reused = 0  # graphs
        self.trace = trace
        self.output_processor = OutputProcessor(
            stepper,
            scheduler.n_slots,
            self._stopped,
            self._delivery_failed,
            self.commands.ended,
            trace,
        )
        self.slot_table = SlotTable(
            scheduler, stepper, self.output_processor, trace, self.commands.left_line
        )
        self._space = SwapSpace(0) if space is None else space
        self._loras = loras if loras is not None and loras.names else None

        def loras_of(id: int) -> LoraNames:
            return [] if self._loras is None else self._loras.files(self.slot_table.lora(id))

        def state_of(id: int) -> bytes:
            hand = self.slot_table.hands[id]
            state, hand.state = hand.state, b""
            return state

        self.hands = InteractiveRunner(
            scheduler, stepper, memory, self.slot_table, states, self._space, loras_of
        )
        self._kv_executor = KvExecutor(scheduler, memory, states, self._space, loras_of, state_of)
        self._observe = CostObserver(scheduler)
        self.recovery = Recovery(
            scheduler, memory, self.slot_table, self.hands, states.renew, max_restarts
        )
        self._stepper: StepperLike = stepper
        self._memory = memory
        self._close = close
        self._running: tuple[Step, int] | None = None  # the call that goes on, and its first step
        self._n_taken = 0  # of `n_submitted`
        self._step_s = 0.0  # the last step's
        # Guards the state between two steps. Whoever needs the commands, too, takes that second.
        self.state = threading.RLock()
        self._thread = threading.Thread(target=self._run, name="pyllamabatch-core", daemon=True)

    # -- from any thread

    def start(self) -> None:
        self.output_processor.thread.start()
        self._thread.start()

    def submit(self, requests: list[Request], timeout: float | None = None) -> None:
        """All of them or none: EngineClosed, EngineDraining, and QueueFull when the line has no
        room within `timeout` seconds (None: however long it takes)."""

        def take() -> None:
            for request in requests:
                self._n_taken += 1
                self.slot_table.add(request)

        self.commands.submit(take, len(requests), timeout)

    def call_hands(
        self,
        act: Callable[[InteractiveRunner], None],
        call: Call | None = None,
        *,
        more: bool = False,
        ask: bool = False,
    ) -> None:
        """`act(hands)` between two steps. `call`: fails with it. For the rest see
        `CommandQueue.ask`."""

        def take() -> None:
            try:
                act(self.hands)
            except Exception as error:
                if call is not None and call.pending:
                    call.finish(error=error)
                raise

        self.commands.ask(take, more=more, awaited=ask)

    def cancel(self, stream: Stream) -> None:
        self.commands.post(lambda: self._cancel(stream.id))

    def drain(self, *, cancel: bool = False) -> Future[bool]:
        """See `CommandQueue.drain`. `cancel`: what is open is cancelled."""
        drained = self.commands.drain()
        if cancel:
            self.commands.post(self._cancel_all)
        return drained

    def close(self, *, wait: bool, timeout: float | None) -> None:
        """No more requests; those that are open are finished (`wait`, but no longer than
        `timeout` seconds) or cancelled. Returns when the threads have ended, unless it is called
        by one of them."""
        self.commands.close(self._drop_hands)
        if not wait:
            self.commands.post(self._cancel_all)
        if self.is_own_thread():
            return
        self._thread.join(timeout if wait else None)
        if self._thread.is_alive():
            self.commands.post(self._cancel_all)
            self._thread.join()

    def is_own_thread(self) -> bool:
        """Whether the caller would wait for itself."""
        return threading.current_thread() in (self._thread, self.output_processor.thread)

    @property
    def n_mail(self) -> int:
        """Requests that the thread has not taken in yet. With `state` held."""
        return self.commands.n_submitted - self._n_taken

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
            log.exception("the core thread failed; its engine is closed")
            self._fail_all(error)
        finally:
            self.output_processor.close(self._stepper.n_recorded)
            self._stepper.flush()
            self.output_processor.thread.join()
            self.output_processor.finish_rest(self._cause())
            self.commands.end()
            self._space.clear()
            self._close()

    def _take_mail(self) -> bool:
        """Do what other threads have asked for, and wait for as long as there is nothing else to
        do, or the scheduler would. False: closed, and nothing is left to do."""
        scheduler = self.scheduler
        while True:
            news = bool(self.commands)
            if news:
                self._do_mail()
            if scheduler.deadlines.next is not None:
                self._end_overdue()
            seconds = self._seconds_to_wait()
            if seconds == 0 or (seconds is None and news):
                return True
            if not self.commands and (self.output_processor.has_events or self.slot_table.open):
                self._stepper.flush()
            if not self._wait(seconds):
                return False

    def _seconds_to_wait(self) -> float | None:
        """Until the next step had better begin; None while there is nothing to compute."""
        if self.scheduler.idle:
            return None
        now, deadline = perf_counter(), self.scheduler.deadlines.next
        seconds = self.scheduler.hold(now)
        return seconds if deadline is None else min(seconds, max(0.0, deadline - now))

    def _do_mail(self) -> None:
        with self.state:
            mail = iter(self.commands.take())
            try:
                for act in mail:
                    act()
            except BaseException:  # `_fail_all` does the rest
                self.commands.put_back(list(mail))
                raise
            self._carry_out()

    def _wait(self, seconds: float | None) -> bool:
        """Until there is mail, or for so many seconds. False when there is nothing to wait for: the
        engine is closed."""
        start = perf_counter_ns()
        open = self.commands.wait(seconds, 0 if seconds is None else self.scheduler.n_awaited)
        if open and self.trace is not None:
            self.trace.idle_ns += perf_counter_ns() - start
        return open

    def _end_overdue(self) -> None:
        with self.state:
            for id in self.scheduler.deadlines.due(perf_counter()):
                self.slot_table.end(self.slot_table.open[id], "deadline")
            self._carry_out()

    def _carry_out(self) -> None:
        failed = self._kv_executor.carry_out(self.scheduler.take_kv_operations())
        for id, slot in failed.items():
            self.slot_table.leave(id, slot)

    def _turn(self) -> None:
        with self.state:
            step = self.scheduler.plan(perf_counter())
            if step is None:
                return
            for id, slot in step.preempted:
                self.slot_table.leave(id, slot)
            for id, slot in step.admitted:
                self.slot_table.admit(id, slot)
            failed = self._kv_executor.carry_out(step.kv_operations)
            for id, slot in failed.items():
                self.slot_table.leave(id, slot)
            if failed or step.n_rows == 0:
                return
        for part in self._parts(step):
            if not self._call(part):
                return

    def _parts(self, step: Step) -> tuple[Step, ...]:
        """The native calls that a step is made of: rows with different adapters can't share one."""
        parts: tuple[Step, ...] = (step,)
        if self._loras is not None:
            parts = step.by_group(self.slot_table.lora_at, self._loras.applied)
        if not self.scheduler.limits.unified:
            parts = tuple(call for part in parts for call in part.parts())
        return parts

    def _call(self, step: Step) -> bool:
        """The native call for a step or a part of one. False if it failed: it is to be planned
        anew."""
        stepper = self._stepper
        with self.state:
            n_more = self._fill(step) if step.chunks else 0
            first = stepper.n_recorded
            if self.trace is not None:
                prompts = [(chunk.slot, chunk.id, chunk.n) for chunk in step.chunks]
                used = self.scheduler.accounting.used
                self.trace.begin(first, step.n_rows, used, step.decode, prompts)
            self._running = step, first
        if self.output_processor.has_events:
            stepper.flush()
        try:
            if self._loras is not None:
                self._loras.apply(self.slot_table.lora_at(step.slots[0]))
            run = stepper.compute(step.decode, self._n_steps(step), n_more)
        except (PyllamabatchError, MemoryError) as problem:
            error = problem
            with self.state:
                self._running = None
                self.recovery.failed(step, error)
                self._carry_out()
            return False
        with self.state:
            self._running = None
            self._apply(step, run)
            self._carry_out()
        return run.code == 0

    def _n_steps(self, step: Step) -> int:
        """How many times the step may be computed before somebody's deadline has passed, or news
        that a call before it in this turn was ended for."""
        deadline = self.scheduler.deadlines.next
        if step.repeat > 1 and self.commands:
            return 1
        if deadline is None or step.repeat == 1:
            return step.repeat
        seconds = deadline - perf_counter()
        return max(1, int(min(step.repeat, seconds / max(self._step_s, 1e-6))))

    def _fill(self, step: Step) -> int:
        """Write the rows of prompts, behind those that the native call makes of `step.decode`; how
        many they are."""
        rows = self._stepper.rows
        first = end = len(step.decode)
        for chunk in step.chunks:
            occupant = self.slot_table.at[chunk.slot]
            assert occupant is not None
            start, end = end, end + chunk.n
            rows.token[start:end] = occupant.tokens[chunk.start : chunk.start + chunk.n]
            rows.pos[start:end] = np.arange(chunk.start, chunk.start + chunk.n)
            rows.seq[start:end] = chunk.slot
            rows.flags[start:end] = 0
            if chunk.last:
                rows.flags[end - 1] = occupant.flags
        return end - first

    def _apply(self, step: Step, run: Run) -> None:
        """What the call has done, and who has finished in its last step."""
        self.n_reused += run.n_reused
        if run.n_steps:
            self.recovery.computed()
            self._step_s = run.seconds / run.n_steps
            self._observe(step, run)
            self.scheduler.advance(step, run.n_steps, perf_counter())
            if self.slot_table.hands:
                self.hands.stepped(step)
        for slot, token, finish, logprob in run.reported:
            hand = self.slot_table.at[slot]
            assert isinstance(hand, Hand)
            self.hands.sampled(hand, token, finish, logprob)
        for slot, token, finish in run.finished:
            request = self.slot_table.at[slot]
            assert isinstance(request, Request)
            if finish == Finish.LENGTH:
                self.slot_table.end(request, "length")
            elif finish == Finish.ERROR:
                self.scheduler.counters.tokens -= 1
                error = SamplingError(self._stepper.slot_error(slot))
                self.slot_table.end(request, "error", error=error)
            else:  # an end-of-generation or stop token
                self.slot_table.end(request, "stop", stop=token)
        if run.code:
            self.recovery.failed(step, decode_error(run.code), any_done=run.n_steps > 0)

    # -- the end

    def _fail_all(self, error: BaseException) -> None:
        """The thread is about to end: nobody may be left waiting."""
        with self.state:
            for act in self.commands.fail(error):
                with suppress(Exception):  # the first error is the one to report
                    act()
            for request in list(self.slot_table.open.values()):
                self.slot_table.retire(request, "error", error=self._cause())
            for hand in self.slot_table.hands.values():
                if hand.call is not None:
                    hand.call.finish(error=self._cause())

    def _cause(self) -> Exception:
        """What requests end with that the thread leaves behind."""
        error = self.commands.error
        return error if isinstance(error, Exception) else self.commands.why_closed()

    # -- what other threads ask for

    def _cancel(self, id: int) -> None:
        request = self.slot_table.open.get(id)
        if request is not None:
            self.slot_table.end(request, "cancelled")

    def _drop_hands(self) -> None:
        for hand in list(self.slot_table.hands.values()):
            self.hands.drop(hand, self.commands.why_closed())

    def _cancel_all(self) -> None:
        for request in list(self.slot_table.open.values()):
            self.slot_table.end(request, "cancelled")
        for hand in list(self.slot_table.hands.values()):
            self.hands.cancel(hand)

    def _stopped(self, id: int) -> None:
        """A stop string has been found in a request's text; what was sampled behind it does not
        count."""

        def end() -> None:
            request = self.slot_table.open.get(id)
            if request is not None:
                self.slot_table.end(request, "stop")

        self.commands.post(end)

    def _delivery_failed(self, error: BaseException) -> None:
        def fail() -> None:
            raise error

        self.commands.error = error  # also where this thread has ended already
        self.commands.post(fail)
