"""LoneDecode: one step after another of an interactive sequence that runs alone.

Such a sequence asks for a token, computes one row, and asks again. Nothing else comes or goes, and
the plan stands for more steps (`Step.stands`). So the next of them needs no command, no view and no
plan; they are accounted together, before anything looks at the scheduler."""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..errors import decode_error
from ..scheduler import Scheduler, Step
from ..step.trace import StepTrace
from ..step.types import Finish, Run
from .cost_observer import CostObserver
from .interactive import InteractiveSink, Token
from .protocols import StepRunner
from .request import NO_TOKENS, Request
from .thread_watch import ThreadWatch

ERROR = int(Finish.ERROR)
STEPS = 1024  # at most, before the policy is asked again


class LoneDecode:
    """The leader's; `settle` is for any thread with the core's `state` held. What fails here is the
    leader's to mend, and ends it."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: StepRunner,
        observe: CostObserver,
        trace: StepTrace | None,
        threads: ThreadWatch | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._stepper = stepper
        self._observe = observe
        self._trace = trace
        self._threads = threads
        self.request: Request | None = None
        self._step: Step | None = None
        self._n_left = 0  # steps that the plan stands for, those that are not accounted included
        self._n_changes = 0  # of the scheduler's sequences, when it began
        self._tokens = NO_TOKENS  # the request's, and room for more
        # Of the steps that are not accounted yet.
        self._n = self._n_reused = 0
        self._seconds = self._first_seconds = 0.0

    def begin(self, step: Step, request: Request) -> None:
        """`step` was computed once, of this request, and is accounted."""
        self._step, self.request = step, request
        self._n_left = min(step.stands - 1, STEPS)
        if self._threads is not None:
            self._n_left = self._threads.begin(step, self._n_left)
        self._tokens = np.concatenate((request.tokens, np.zeros(self._n_left, np.int32)))
        self._n_changes = self._scheduler.sequences.n_changes

    def goes_on(self) -> bool:
        """Whether the next token of `request` is another one of these."""
        return self._n < self._n_left and self._scheduler.sequences.n_changes == self._n_changes

    def compute(self, sink: InteractiveSink, state: AbstractContextManager[Any]) -> Token:
        """The next token. Raises SamplingError after a step, any other error instead of one.
        `state`: the core's, not held."""
        step, stepper = self._step, self._stepper
        assert step is not None
        if self._trace is not None:
            used = self._scheduler.accounting.used + self._n
            self._trace.begin(stepper.n_recorded, 1, used, step.decode, (), step.reasons)
        try:
            run = stepper.compute(step.decode, 1, 0, step.n_pad)
            if run.n_steps == 0:
                raise decode_error(run.code) if run.code else TimeoutError("no token was read")
        except BaseException:
            self.request = None
            raise
        ((slot, token, finish, logprob),) = run.results
        with state:
            if self._n == 0:
                self._first_seconds = run.seconds
            self._n += 1
            self._n_reused += run.n_reused
            self._seconds += run.seconds
            if finish == ERROR:
                self.request = None
                self._scheduler.counters.tokens -= 1
                raise stepper.slot_error(slot)
            known = len(sink.request.tokens)
            self._tokens[known] = token
            return sink.given(self._tokens[: known + 1], token, finish, logprob)

    def settle(self, now: float) -> int:
        """Account for the steps so far, the last of which ended at `now`. Returns how many graphs
        they reused."""
        n, n_reused, seconds, step = self._n, self._n_reused, self._seconds, self._step
        if n == 0 or step is None:
            return 0
        self._n_left -= n  # first: the leader looks at both at any moment
        self._n, self._n_reused, self._seconds = 0, 0, 0.0
        run = Run(0, n, n_reused, seconds, (), self._first_seconds)
        self._observe(step, run)
        if self._threads is not None and not self._threads.took(step, run, seconds):
            self._n_left = 0
        self._scheduler.advance_alone(step, n, now, seconds / n)
        return n_reused
