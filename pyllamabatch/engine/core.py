"""EngineCore: the loop that computes steps.

`step` reads: take commands, schedule, carry out KV operations, run, update. One native call goes on
for as many steps as the plan stands for. The output processor, a second thread, reads what is
sampled meanwhile, and a command of any thread interrupts the call after the step that it is in.

One thread at a time leads: it alone touches the context. That is the core thread, or one that asks
for a token while no other leads: so a lone interactive sequence waits for no other thread to wake.

Whatever ends a request early (a cancel, a deadline, an error, a stop string) ends it between two
calls, so that the cache, the accounting and the counters always agree."""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import Any

from ..errors import (
    CellsUnavailable,
    ContextCreateError,
    PyllamabatchError,
    SamplingError,
    UnsupportedOperation,
    decode_error,
)
from ..kv import SwapSpace
from ..scheduler import Scheduler, Step
from ..step.stepper import Finish
from ..step.trace import StepTrace
from ..step.types import Run
from .command_queue import CommandQueue
from .cost_observer import CostObserver
from .interactive import Call, InteractiveSink, Token
from .kv_executor import KvExecutor
from .lone_decode import LoneDecode
from .output_processor import OutputProcessor
from .protocols import Device, StepRunner
from .recovery import Recovery
from .request import Request
from .results import FinishReason
from .signals import DeferredSignals
from .slot_table import SlotTable
from .step_calls import StepCalls
from .stream import Stream
from .stream_sink import StreamSink

log = logging.getLogger(__name__)


@dataclass(slots=True)
class CoreOptions:
    """`space`: for the states of swapped sequences. For the others see `Engine`."""

    trace: StepTrace | None = None
    space: SwapSpace = field(default_factory=lambda: SwapSpace(0))
    max_waiting: int | None = None
    max_restarts: int = 0


class EngineCore:
    """Runs requests on one device, which its thread closes at the very end."""

    def __init__(
        self, scheduler: Scheduler, device: Device, options: CoreOptions | None = None
    ) -> None:
        options = options or CoreOptions()
        stepper: StepRunner = device.stepper
        self.scheduler = scheduler
        self.trace = options.trace
        self.n_reused = 0  # graphs
        self.commands = CommandQueue(stepper.interrupt, options.max_waiting)
        self.output_processor = OutputProcessor(device.stepper, scheduler.n_slots, self, self.trace)
        self.table = SlotTable(scheduler, stepper, self.trace, device.feed)
        self.kv = KvExecutor(scheduler, self.table, device, options.space)
        self.calls = StepCalls(scheduler, self.table, device, self.trace)
        self.recovery = Recovery(
            scheduler, self.table, device.memory, device.states.renew, options.max_restarts
        )
        self._observe = CostObserver(scheduler, asynchronous=device.asynchronous)
        self._signals = DeferredSignals(self._wake)
        self._lone = LoneDecode(scheduler, stepper, self._observe, self.trace, device.threads)
        self._stepper = stepper
        self._device = device
        self.n_taken = 0  # of the requests submitted; with `state` held
        self._shrunk = False  # the context, until the next request
        self._step_s = 0.0  # the last step's time
        self._led_until = perf_counter_ns()
        # Guards the state between two steps. A thread that needs the commands' lock, too, takes
        # that one second.
        self.state = threading.RLock()
        self.thread = threading.Thread(target=self._loop, name="pyllamabatch-core", daemon=True)

    # -- from any thread

    def start(self) -> None:
        self.output_processor.thread.start()
        self.thread.start()

    def stream_to(self, request: Request, stream: Stream) -> StreamSink:
        """The request's tokens go to `stream`, and it ends by itself."""
        sink = StreamSink(
            request, stream, self.table, self.output_processor, self.commands.left_queue
        )
        request.sink, request.arrival = sink, stream.submitted_at
        return sink

    def interactive(self, request: Request) -> InteractiveSink:
        """The request stays, and its owner tells it what to do: see `call`."""
        sink = InteractiveSink(request, self.table, self.kv, self._device.states)
        request.sink = sink
        return sink

    def submit(self, sinks: Sequence[StreamSink], timeout: float | None = None) -> None:
        """All of them or none. They have one deadline, and wait for room until then at most; not at
        all in a callback, whose thread makes room. Raises as `CommandQueue.submit`."""
        deadline = sinks[0].request.options.deadline if sinks else None
        anyway = False
        if self.is_own_thread():
            timeout = 0
        if deadline is not None:
            left = min(max(0.0, deadline - perf_counter()), threading.TIMEOUT_MAX)
            if timeout is None or left <= timeout:
                timeout, anyway = left, True
        self.commands.submit(partial(self._add, sinks), len(sinks), timeout, anyway=anyway)

    def groups(self, sinks: list[StreamSink]) -> list[list[StreamSink]]:
        """What is best submitted together: all, or where there is no room for that each alone."""
        return [sinks] if self.commands.fits(len(sinks)) else [[sink] for sink in sinks]

    def call(self, act: Callable[[Call], None], call: Call, *, more: bool = False) -> None:
        """`act(call)`, of an interactive sequence, between two steps: it finishes the call, or
        raises what that fails with. Raises as `CommandQueue.ask`."""
        self.commands.ask(partial(self._act, act, call), more=more)

    def call_without_cells(self, act: Callable[[Call], None], call: Call) -> None:
        """`call`, but what was given up is not needed for it."""
        self.commands.ask(partial(self._act, act, call, cells=False))

    def call_for_token(self, act: Callable[[Call], None], call: Call) -> None:
        """`call`, which asks for a token. While no other thread leads, the caller does, until the
        call is finished. A signal's handler may raise then, behind the step."""
        with self._signals as noted:
            if self.commands.ask_or_lead(partial(self._act, act, call)):
                self._lead(lambda: call.pending and not noted)

    def next_token(self, sink: InteractiveSink) -> Token | None:
        """The next token of a sequence that is alone. None: it takes `call_for_token`. Otherwise as
        that, and SamplingError when none can be chosen."""
        lone = self._lone
        if sink.request is not lone.request:
            return None
        with self._signals:
            if not self.commands.lead_at_once():
                return None
            try:
                if not lone.goes_on():
                    return None
                self._note_idle()
                try:
                    return lone.compute(sink, self.state)
                except (PyllamabatchError, MemoryError, TimeoutError) as error:
                    self._lone_failed(sink, error)
                    if isinstance(error, SamplingError):
                        raise
                    return None
                finally:
                    self._led_until = perf_counter_ns()
            except SamplingError:
                raise
            except BaseException as error:
                self._fail_all(error)
                return None
            finally:
                self.commands.stop_leading(rest=False)

    def _lone_failed(self, sink: InteractiveSink, error: Exception) -> None:
        with self.state:
            self.settle()
            if isinstance(error, SamplingError):
                sink.refused()
            else:
                self.recovery.failed_once(error)

    def settle(self) -> None:
        """All that was computed is in the counters, unless a call goes on. With `state` held."""
        self.n_reused += self._lone.settle(self._led_until * 1e-9)

    def cancel(self, id: int, reason: FinishReason = "cancelled") -> None:
        """Soon; nothing happens when it has ended by then."""
        self.commands.post(partial(self._cancel, id, reason))

    def shrink(self) -> None:
        """A command: where no request is open, give up the memory of cells, also of cached ones,
        until one comes."""
        if self._shrunk or self.table.requests or self.commands.n_submitted > self.n_taken:
            return
        if self._device.states.shrink():
            self._shrunk = True
            self.scheduler.drop_cached()

    def _grow(self) -> CellsUnavailable | None:
        """The cells that were given up are there again. Returns why not, where the next request may
        find them."""
        if not self._shrunk:
            return None
        problem = self._device.states.grow()
        self._shrunk = problem is not None
        if problem is None:
            return None
        log.warning("the cells that were given up can't be had again yet: %s", problem)
        return CellsUnavailable(str(problem))

    def fail(self, error: BaseException) -> None:
        """The engine ends because of this."""

        def fail() -> None:
            raise error

        self.commands.error = error  # also where the core thread has ended already
        self.commands.post(fail)

    def ended(self) -> None:
        """A request has, and its reader knows."""
        self.commands.ended()

    def drain(self, *, cancel: bool = False) -> Future[bool]:
        """See `CommandQueue.drain`. `cancel`: what is open is cancelled."""
        drained = self.commands.drain()
        if cancel:
            self.commands.post(self._cancel_all)
        return drained

    def close(self, *, wait: bool, timeout: float | None) -> None:
        """No more requests. Those that are open are finished (`wait`, but no longer than
        `timeout` seconds) or cancelled. Returns when the threads have ended, unless it is called
        by one of them."""
        self.commands.close(self._close_all)
        if not wait:
            self.commands.post(self._cancel_all)
        if self.is_own_thread():
            return
        self.thread.join(timeout if wait else None)
        if self.thread.is_alive():
            self.commands.post(self._cancel_all)
            self.thread.join()

    def seen(self) -> AbstractContextManager[Any]:
        """`state`, for those who only look. EngineClosed in a forked child, where it may be held
        for ever."""
        self.commands.process.check()
        return self.state

    def is_own_thread(self) -> bool:
        """Whether the caller would wait for itself."""
        own = threading.current_thread() in (self.thread, self.output_processor.thread)
        return own or self.commands.leads_here

    def may_wait(self) -> None:
        """UnsupportedOperation where the caller would wait for itself."""
        if self.is_own_thread():
            why = (
                "a callback can't wait for a stream or sequence: its thread brings what that needs"
            )
            raise UnsupportedOperation(why)

    # -- a step

    def step(self) -> None:
        """Take commands, schedule, carry out KV operations, run, update."""
        with self.state:
            self._take_commands()
            began = perf_counter()
            step = self.scheduler.plan(began)
            if step is None:  # a policy waits: what it waits for may be a reader
                self._stepper.flush()
                return
            drafting = self.scheduler.drafting
            if drafting is not None and step.drafts and self._device.feed.each_step:
                step.repeat = 1  # the drafter's doing, no command's
                drafting.cuts = min(drafting.cuts, 1)
            step.behind &= not self.recovery.tries_again  # or whose fault it is can't be told
            self._place(step)
            planned = perf_counter()
            if step.kv_operations and not self.kv.carry_out(step.kv_operations):
                return
            others = perf_counter() - planned  # seconds that are none of Python's
        if step.n_rows == 0:
            return
        for call in self.calls.of(step):
            try:
                run = self._run(call)
            except (PyllamabatchError, MemoryError) as error:
                self._failed(call, error)
                return
            self._update(call, run)
            if run.code or not run.n_steps:  # the next call may go on from this one
                return
            others += run.seconds
        if drafting is not None:
            drafting.turned(perf_counter() - began - others, prompts=bool(step.chunks))

    def _take_commands(self) -> None:
        """Do what other threads have asked for, and what the clock does."""
        if self.commands:
            commands = iter(self.commands.take())
            try:
                for command in commands:
                    command()
            except BaseException:  # `_fail_all` does the rest
                self.commands.put_back(list(commands))
                raise
        if self.scheduler.deadlines.next is not None:
            for id in self.scheduler.deadlines.due(perf_counter()):
                self.table.requests[id].sink.cancel("deadline")

    def _place(self, step: Step) -> None:
        for id, slot in step.preempted:
            self.table.leave(id, slot)
        for moved in step.moved:
            self.table.move(*moved)
        for id, slot in step.admitted:
            self.table.admit(id, slot)

    def _run(self, call: Step) -> Run:
        """One native call."""
        with self.state:
            n_before = self.calls.write(call)
        if self.output_processor.has_events:
            self._stepper.flush()
        return self.calls.compute(call, self._n_steps(call), n_before)

    def _n_steps(self, step: Step) -> int:
        """How many times the step may be computed: not beyond a deadline, and once where a command
        has come."""
        deadline = self.scheduler.deadlines.next
        if step.repeat > 1 and self.commands:
            return 1
        if deadline is None or step.repeat == 1:
            return step.repeat
        seconds = deadline - perf_counter()
        return max(1, int(min(step.repeat, seconds / max(self._step_s, 1e-6))))

    def _update(self, step: Step, run: Run) -> None:
        """The counters, and the requests that have ended in the call's last step, or whose tokens
        are reported."""
        with self.state:
            self.calls.ended()
            self.n_reused += run.n_reused
            if run.n_steps:
                self.recovery.computed()
                self._step_s = run.seconds / run.n_steps
                threads = self._device.threads
                if threads is None or not threads.tries:
                    self._observe(step, run)
                self.scheduler.advance(
                    step, run.n_steps, perf_counter(), self.calls.drafted(step, run)
                )
                for chunk in step.chunks:
                    self.table.in_slot(chunk.slot).sink.computed()
                if run.n_drafted:
                    self.calls.tell_drafted(step)
            for slot, token, finish, logprob in run.results:
                error = None
                if finish == Finish.ERROR:
                    self.scheduler.counters.tokens -= 1
                    error = self._stepper.slot_error(slot)
                self.table.in_slot(slot).sink.sampled(token, Finish(finish), logprob, error)
            if run.code:
                failure = decode_error(run.code, self._stepper.last_error)
                self.recovery.failed(step, failure, any_done=run.n_steps > 0)
            elif step.stands > 1:
                self._lone.begin(step, self.table.in_slot(step.slots[0]))

    def _failed(self, step: Step, error: Exception) -> None:
        with self.state:
            self.calls.ended()
            self.recovery.failed(step, error)

    # -- the loop

    def _loop(self) -> None:
        """The core thread leads when there is something to do and no other thread leads."""
        try:
            while self.commands.lead():
                self._lead()
        finally:
            self.output_processor.close()
            self._stepper.flush()
            self.output_processor.thread.join()
            self.output_processor.finish_rest(self._cause())
            self.commands.end()
            self.kv.space.clear()
            self._device.close()

    def _lead(self, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Compute steps until there is nothing to do, or `goes_on()` is false."""
        rest = False
        try:
            with self.state:
                self.settle()
            self._note_idle()
            while goes_on() and self.wait_for_work(goes_on):
                self.step()
            rest = self._seconds_to_wait() is not None
            self._led_until = perf_counter_ns()
        except BaseException as error:
            self._fail_all(error)
        finally:
            self.commands.stop_leading(rest=rest)

    def _note_idle(self) -> None:
        """No thread has led until now."""
        if self.trace is not None:
            self.trace.idle_ns += perf_counter_ns() - self._led_until

    def wait_for_work(self, goes_on: Callable[[], bool] = lambda: True) -> bool:
        """Until there is something to compute, and its step had better begin. False: nothing is
        left to do, or `goes_on()` is false."""
        while True:
            if self.commands or self.scheduler.deadlines.next is not None:
                with self.state:
                    self._take_commands()
                if not goes_on():
                    return False
            seconds = self._seconds_to_wait()
            if seconds == 0:
                return True
            unread = self.output_processor.has_events or not self.commands.all_ended
            if unread and not self.commands:
                self._stepper.flush()
            if seconds is None:
                return False
            began = perf_counter_ns()
            self.commands.wait(seconds, self.scheduler.n_awaited)
            if self.trace is not None:
                self.trace.idle_ns += perf_counter_ns() - began

    def _seconds_to_wait(self) -> float | None:
        """Until the next step had better begin; None while there is nothing to do."""
        scheduler = self.scheduler
        if scheduler.idle:
            return 0.0 if scheduler.has_kv_operations else None
        now, deadline = perf_counter(), scheduler.deadlines.next
        seconds = scheduler.hold(now)
        return seconds if deadline is None else min(seconds, max(0.0, deadline - now))

    # -- commands

    def _act(self, act: Callable[[Call], None], call: Call, *, cells: bool = True) -> None:
        try:
            if cells and (problem := self._grow()) is not None:
                call.finish(error=problem)
                return
            act(call)
        except BaseException as error:
            if call.pending:
                call.finish(error=error if isinstance(error, Exception) else self._cause())
            own = isinstance(error, PyllamabatchError | MemoryError)
            if not own or isinstance(error, ContextCreateError):
                raise

    def _wake(self) -> None:
        """The thread that leads, so that it looks whether it goes on."""
        self.commands.post(lambda: None)

    def _add(self, sinks: Sequence[StreamSink]) -> None:
        for sink in sinks:
            self.n_taken += 1
            self.table.add(sink.request)
        if (problem := self._grow()) is not None:
            for sink in sinks:
                sink.failed(problem)

    def _cancel(self, id: int, reason: FinishReason) -> None:
        request = self.table.requests.get(id)
        if request is not None:
            request.sink.cancel(reason)

    def _cancel_all(self) -> None:
        for request in list(self.table.requests.values()):
            request.sink.cancel()

    def _close_all(self) -> None:
        for request in list(self.table.requests.values()):
            request.sink.close(self.commands.why_closed())

    # -- the end

    def _fail_all(self, error: BaseException) -> None:
        """The engine is about to end: no request may be left waiting."""
        log.error("a step failed; its engine is closed", exc_info=error)
        with self.state:
            for command in self.commands.fail(error):
                with suppress(Exception):  # the first error is the one to report
                    command()
            # As they are now: a reader that raises the error adds its own.
            lines = error.__traceback__ if isinstance(error, Exception) else None
            for request in list(self.table.requests.values()):
                request.sink.abandon(self._cause(), lines)
            self.table.at[:] = [None] * len(self.table.at)

    def _cause(self) -> Exception:
        """What requests end with that the engine leaves behind."""
        error = self.commands.error
        return error if isinstance(error, Exception) else self.commands.why_closed()
