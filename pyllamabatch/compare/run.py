"""The comparison: every number of sequences, every repeat, every arm in turn."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from pyllamabatch.compare.arms import Arm, Hosted, Serving
from pyllamabatch.compare.case import Case, Measured, case_row
from pyllamabatch.compare.child import interrupts_later
from pyllamabatch.compare.job import BENCHES, BURST, POISSON, Job, figures, poisson_arrivals
from pyllamabatch.compare.processes import Processes
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.report import facts
from pyllamabatch.report.meters import Meter
from pyllamabatch.report.records import Record

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """What to run. `cases`: one per number of sequences, in which `n_threads` are the machine's.

    tokens: of a request, the first sample included; requests: of each sequence (poisson); rate: of
    arrivals, 1/s (poisson). limit_s: of one run. process_memory, total_memory: bytes that each
    worker, or all of them together in equal shares, may take; 0: no limit. keep_loaded: all arms of
    a case stay open until its last repeat.
    """

    protocol: str
    arms: Sequence[Arm]
    cases: Sequence[Case]
    tokens: int
    requests: int = 1
    rate: float = 0.0
    repeats: int = 1
    oversubscribe: bool = False
    process_memory: int = 0
    total_memory: int = 0
    limit_s: float = 600.0
    keep_loaded: bool = False
    verbose: bool = False

    def runs(self) -> Iterator[tuple[Case, int, Arm]]:
        """In order: cases, in each the repeats, in each the arms, backwards in odd repeats so that
        no arm always comes after the same one. `single` has one sequence, whatever the others
        have: it runs with the first case."""
        for i, case in enumerate(self.cases):
            for repeat in range(self.repeats):
                for arm in self.arms if repeat % 2 == 0 else self.arms[::-1]:
                    if arm.kind != "single":
                        yield case, repeat, arm
                    elif i == 0:
                        yield replace(case, pl=1), repeat, arm

    def job(self, case: Case, repeat: int) -> Job:
        n, which = case.pl * self.requests, 1 + repeat
        arrivals = (0.0,) * n
        if self.protocol == POISSON:
            arrivals = poisson_arrivals(n, self.rate, [case.seed, which])
        return Job(self.protocol, which, self.tokens, arrivals)

    def warm_up(self, case: Case) -> Job:
        """What the first run would else pay for: connections, buffers, graphs."""
        return Job(BURST, 0, min(WARM_UP_TOKENS, max(2, self.tokens)), (0.0,) * case.pl)


def measure(
    plan: Plan, about: dict[str, Any], running: Callable[[str], None] = lambda words: None
) -> Generator[Record, None, None]:
    """Rows as they are measured; `about`: `arms.probe`; `running` is told what runs next. An arm
    that fails gives a row that says why, and is left out of the case's other repeats; the others go
    on. Closing the generator ends every process."""
    run_id = uuid.uuid4().hex[:12]
    failed: set[tuple[Arm, Case]] = set()
    with closing(_Opened(plan)) as opened:
        for case, repeat, arm in plan.runs():
            if (arm, case) in failed:
                continue
            running(f"{case.pl} × {arm.name}, repeat {repeat + 1} of {plan.repeats}")
            moment = facts.now()
            try:
                measured = opened.run(arm, case, repeat)
            except Exception as error:
                words = str(error) if isinstance(error, PyllamabatchError) else error
                measured = Measured.failed(words or type(error).__name__)
            if measured.error:
                failed.add((arm, case))
            own = arm.case_of(case, plan.oversubscribe)
            detail = {"n_threads_each": own.n_threads} | measured.detail
            if plan.protocol == POISSON:
                detail["rate"] = plan.rate
            yield case_row(
                BENCHES[plan.protocol],
                arm,
                _in_row(own, plan.requests),
                replace(measured, detail=detail, settings={"n_kv_max": own.n_ctx}),
                about | moment,
                run_id,
                repeat,
            )


def _in_row(case: Case, requests: int) -> Case:
    """A row counts the tokens of a sequence: of all its requests."""
    return replace(case, pp=case.pp * requests, tg=case.tg * requests)


class _Opened:
    """The arms that are open: the one that runs, or with keep_loaded those of its case."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._stack = ExitStack()
        self._open: dict[Arm, tuple[Case, Serving]] = {}

    def run(self, arm: Arm, case: Case, repeat: int) -> Measured:
        plan = self._plan
        if not plan.keep_loaded or any(other != case for other, _ in self._open.values()):
            self.close()
        if arm in self._open:
            serving = self._open[arm][1]
            meter = Meter(serving.pids)
        else:
            with interrupts_later():
                serving = open_arm(plan, arm, case)
                self._stack.callback(serving.close)
            self._open[arm] = case, serving
            meter = Meter(serving.pids)  # before anything is loaded
            serving.load()
            warm_up = plan.warm_up(case)
            done = figures(warm_up, serving.run(warm_up, plan.limit_s))
            if done.error:
                return Measured.failed(f"warm-up: {done.error}")
        job = plan.job(case, repeat)
        meter.start()
        try:
            outcome = serving.run(job, plan.limit_s)
        finally:
            taken = meter.stop()
        found = figures(job, outcome)
        time = 0.0 if found.error else found.elapsed
        return Measured(0.0, time, detail=found.detail | taken, error=found.error)

    def close(self) -> None:
        self._open.clear()
        self._stack.close()


def open_arm(plan: Plan, arm: Arm, case: Case) -> Serving:
    """Its processes, with nothing loaded."""
    own = arm.case_of(case, plan.oversubscribe)
    if arm.kind != "processes":
        return Hosted(arm.kind, arm.sampler, own, plan.verbose)
    limits = [b for b in (plan.process_memory, plan.total_memory // case.pl) if b]
    return Processes(own, arm.sampler, min(limits, default=0), plan.verbose)
