"""The arm that is the engine: a thread per client, which reads its stream token by token."""

from __future__ import annotations

import time
from dataclasses import replace

from pyllamabatch.compare.case import Case, sampling_params
from pyllamabatch.compare.clients import at_once, sleep_until
from pyllamabatch.compare.inside import Inside
from pyllamabatch.compare.job import BURST, Job, Outcome, Served
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Plan, Policy, StepView, sarathi

SOON_S = 0.001


class StartTogether:
    """A policy that asks another one and, when told to, lets nobody decode before all of `n`
    sequences have their first token; `begin` is when they are let go (perf_counter, s)."""

    def __init__(self, policy: Policy) -> None:
        self.begin = 0.0
        self._policy = policy
        self._expected = 0  # how many are held back until all are there; 0: nobody is
        self._all_came = False

    def hold(self, n: int) -> None:
        """The next `n` sequences; nobody else must be there."""
        self._expected, self._all_came = n, False

    def plan(self, view: StepView) -> Plan:
        plan = self._policy.plan(view)
        if not self._expected:
            return plan
        present = len(view.running) + len(view.waiting)
        self._all_came |= present == self._expected
        if self._all_came and len(view.decoding) == present:  # one that failed has left
            self._expected = 0
            self.begin = time.perf_counter()
            return plan
        prompts = {id: n for id, n in plan.tokens.items() if id not in view.decoding}
        wake = None if prompts else view.now + SOON_S  # an empty plan says how long it waits
        return replace(plan, tokens=prompts, repeat=1, wake=wake)


class WithEngine(Inside):
    """`Engine` with its own choices: device sampling, scheduling, delivery. No cache of prompts, so
    that it computes as many rows as the others."""

    def __init__(self, model: Model, case: Case) -> None:
        super().__init__(model, case)
        self._policy = StartTogether(sarathi())
        self._engine = Engine(
            model, policy=self._policy, prefix_cache=False, **case.context_params()
        )

    def run(self, job: Job) -> Outcome:
        case, n = self.case, len(job.arrivals)
        prompts = job.prompts(case, self.model.n_vocab)
        served = [Served() for _ in range(n)]
        if job.protocol == BURST:
            self._policy.hold(n)

        def client(i: int, began: float) -> None:
            one = served[i]
            one.arrived = began + job.arrivals[i]
            sleep_until(one.arrived)
            params = sampling_params(case.sampling, case.seed + i, job.tokens)
            stream = self._engine.submit(prompts[i], params)
            try:
                for _ in stream:
                    one.times.append(time.perf_counter())
            except PyllamabatchError as error:
                one.error = str(error)

        began, _ = at_once(n, client, self.close)
        return Outcome(self._policy.begin if job.protocol == BURST else began, served)

    def close(self) -> None:
        self._engine.close(wait=False)
