"""The arm that is the engine: a thread for each client, which reads its stream token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from pyllamabatch.compare.case import Case, sampling_params
from pyllamabatch.compare.clients import ask_all
from pyllamabatch.compare.workload import BURST, Timings, Workload
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Token
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Plan, Policy, StepView, sarathi

SOON_S = 0.001


class StartTogether:
    """A policy that asks another one. Told to `hold`, it lets no sequence decode before all of
    `n` have their first token. `begin`: when it let them go (perf_counter, s)."""

    def __init__(self, policy: Policy) -> None:
        self.begin = 0.0
        self._policy = policy
        self._held = 0  # sequences that are held back until all are there
        self._all_came = False

    def hold(self, n: int) -> None:
        """The next `n` sequences; no other may be there."""
        self._held, self._all_came = n, False

    def plan(self, view: StepView) -> Plan:
        plan = self._policy.plan(view)
        if not self._held:
            return plan
        present = len(view.running) + len(view.waiting)
        self._all_came |= present == self._held
        if self._all_came and len(view.decoding) == present:  # one that failed has left
            self._held = 0
            self.begin = time.perf_counter()
            return plan
        prompts = {id: n for id, n in plan.tokens.items() if id not in view.decoding}
        wake = None if prompts else view.now + SOON_S  # an empty plan says how long it waits
        return replace(
            plan, tokens=prompts, decode_all=False, sit_out=frozenset(), repeat=1, wake=wake
        )


class EngineArm:
    """`Engine` with its own choices of sampling, scheduling and delivery. Without a prefix cache:
    it computes as many rows as the other arms."""

    def __init__(self, model: Model, case: Case) -> None:
        self._case = case
        self._n_vocab = model.n_vocab
        self._policy = StartTogether(sarathi())
        self._engine = Engine(
            model, policy=self._policy, prefix_cache=False, **case.context_params()
        )

    def run(self, workload: Workload) -> Timings:
        case = self._case
        prompts = workload.prompts(case, self._n_vocab)

        def ask(i: int) -> Iterator[Token]:
            params = sampling_params(case.sampling, case.seed + i, workload.tokens)
            yield from self._engine.submit(prompts[i], params)

        if workload.protocol == BURST:
            self._policy.hold(len(prompts))
        timings = ask_all(workload, ask, lambda: self._engine.close(wait=False))
        if workload.protocol == BURST:
            timings.begin = self._policy.begin
        return timings
