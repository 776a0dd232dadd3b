"""LoneDecode: one step after another of an interactive sequence that runs alone.

Such a sequence asks for a token, computes one row, and asks again. Nothing else comes or goes, and
the plan stands for more steps (`Step.stands`). So the next of them needs no command, no view and no
plan; they are accounted together, before anything looks at the scheduler.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..errors import PyllamabatchError, SamplingError, decode_error
from ..scheduler import Scheduler, Step
from ..step.trace import StepTrace
from ..step.types import Finish, Run
from .cost_observer import CostObserver
from .interactive import InteractiveSink, Token
from .protocols import StepRunner
from .request import NO_TOKENS, Request

STEPS = 1024  # at most, before the policy is asked again
Given = Token | Exception


class LoneDecode:
    """The leader's; `settle` is for any thread with the core's `state` held. What fails here is the
    leader's to mend, and ends it."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: StepRunner,
        observe: CostObserver,
        trace: StepTrace | None,
    ) -> None:
        self._scheduler = scheduler
        self._stepper = stepper
        self._observe = observe
        self._trace = trace
        self.request: Request | None = None
        self._step: Step | None = None
        self._n_left = 0  # steps that the plan stands for, without those in `_runs`
        self._n_changes = 0  # of the scheduler's sequences, when it began
        self._runs: list[Run] = []  # what is not accounted yet
        self._tokens = NO_TOKENS  # the request's, and room for more

    def begin(self, step: Step, request: Request) -> None:
        """`step` was computed once, of this request, and is accounted."""
        self._step, self.request = step, request
        self._n_left = min(step.stands - 1, STEPS)
        self._tokens = np.concatenate((request.tokens, np.zeros(self._n_left, np.int32)))
        self._n_changes = self._scheduler.sequences.n_changes

    def of(self, request: Request) -> bool:
        """Whether the next token of this request is another one of these."""
        return (
            request is self.request
            and len(self._runs) < self._n_left
            and self._scheduler.sequences.n_changes == self._n_changes
        )

    def compute(self, sink: InteractiveSink, state: AbstractContextManager[Any]) -> Given:
        """The next token, or why there is none: SamplingError after a step, any other error
        instead of it. `state`: the core's, not held."""
        step, stepper, scheduler = self._step, self._stepper, self._scheduler
        assert step is not None
        if self._trace is not None:
            used = scheduler.accounting.used + len(self._runs)
            self._trace.begin(stepper.n_recorded, step.n_rows, used, step.decode, (), step.reasons)
        try:
            run = stepper.compute(step.decode, 1, 0, step.n_pad)
        except (PyllamabatchError, MemoryError) as error:
            self.request = None
            return error
        if run.n_steps == 0:
            self.request = None
            return decode_error(run.code) if run.code else TimeoutError("no token was read")
        ((slot, token, finish, logprob),) = run.results
        with state:
            self._runs.append(run)
            if finish == Finish.ERROR:
                self.request = None
                scheduler.counters.tokens -= 1
                return SamplingError(stepper.slot_error(slot))
            known = len(sink.request.tokens)
            self._tokens[known] = token
            return sink.given(self._tokens[: known + 1], finish, logprob)

    def settle(self, now: float) -> int:
        """Account for the steps so far, the last of which ended at `now`. Returns how many graphs
        they reused."""
        runs, step = self._runs, self._step
        if not runs or step is None:
            return 0
        n, n_reused = len(runs), sum(run.n_reused for run in runs)
        seconds = sum(run.seconds for run in runs)
        self._runs = []
        self._n_left -= n
        self._observe(step, Run(0, n, n_reused, seconds, (), runs[0].first_seconds))
        self._scheduler.advance_alone(step, n, now, seconds / n)
        return n_reused
