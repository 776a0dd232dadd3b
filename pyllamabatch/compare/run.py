"""The comparison: every number of sequences, every repeat, every arm in turn."""

import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pyllamabatch.compare.arms import Serving, opened, threads_of
from pyllamabatch.compare.case import Arm, Case, Measured, record_of
from pyllamabatch.compare.workload import (
    BENCHES,
    BURST,
    POISSON,
    Workload,
    failure,
    figures,
    poisson_arrivals,
)
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.report import facts
from pyllamabatch.report.meters import BUSY, Meter
from pyllamabatch.report.records import Record

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Experiment:
    """What to run. `cases`: one per number of sequences, in which `n_threads` are the machine's.

    tokens: of a request, the first sample included; requests: of each sequence (poisson); rate: of
    arrivals, 1/s (poisson). limit_s: of one run. total_memory: bytes that all workers together may
    take, in equal shares; 0: no limit. tries: how often a run is made, at most, until others do
    not disturb it. quiet: cores that they may use; None: `BUSY` of all. keep_loaded: all arms of a
    case stay open until its last repeat."""

    protocol: str
    arms: Sequence[Arm]
    cases: Sequence[Case]
    tokens: int
    requests: int = 1
    rate: float = 0.0
    repeats: int = 1
    oversubscribe: bool = False
    total_memory: int = 0
    limit_s: float = 600.0
    tries: int = 1
    quiet: float | None = None
    keep_loaded: bool = False
    verbose: bool = False

    def runs(self) -> Iterator[tuple[Case, int, Arm]]:
        """In order: cases, in each the repeats, in each the arms, backwards in odd repeats so that
        no arm always comes after the same one. `single` has one sequence, whatever the others
        have: it runs with the first case."""
        for i, case in enumerate(self.cases):
            for repeat in range(self.repeats):
                for arm in self.arms if repeat % 2 == 0 else self.arms[::-1]:
                    if arm.name != "single":
                        yield case, repeat, arm
                    elif i == 0:
                        yield replace(case, pl=1), repeat, arm

    def workload(self, case: Case, repeat: int) -> Workload:
        n, which = case.pl * self.requests, 1 + repeat
        arrivals = (0.0,) * n
        if self.protocol == POISSON:
            arrivals = poisson_arrivals(n, self.rate, [case.seed, which])
        return Workload(self.protocol, which, self.tokens, arrivals)

    def warm_up(self, case: Case) -> Workload:
        """What the first run would else pay for: connections, buffers, graphs."""
        return Workload(BURST, 0, min(WARM_UP_TOKENS, max(2, self.tokens)), (0.0,) * case.pl)


def measure(
    experiment: Experiment,
    about: dict[str, Any],
    running: Callable[[str], None] = lambda words: None,
) -> Generator[Record, None, None]:
    """Records as they are measured. `about`: of `hosted.probe`; `running` is told what runs next,
    before each try of it.

    An arm that fails gives a record that says why, and is left out of the case's other repeats;
    the others go on. Closing the generator ends every process."""
    run_id = uuid.uuid4().hex[:12]
    failed: set[tuple[Arm, Case]] = set()
    loaded: dict[tuple[Arm, Case], Serving] = {}
    quiet = experiment.quiet
    if quiet is None:
        quiet = BUSY * facts.machine()["n_cores"]
    with ExitStack() as stack:
        for case, repeat, arm in experiment.runs():
            own = replace(case, n_threads=threads_of(arm, case, experiment.oversubscribe))
            if (arm, own) in failed:
                continue
            words = f"{case.pl} × {arm.name}, repeat {repeat + 1} of {experiment.repeats}"
            running(words)
            moment = facts.now()
            ended = any(
                c.pl != case.pl for one, c in loaded if "single" not in (one.name, arm.name)
            )
            if ended or not experiment.keep_loaded:
                stack.close()
                loaded.clear()
            try:
                run = partial(run_once, experiment, arm, own, repeat, loaded, stack)
                measured = steadiest(run, quiet, experiment.tries, partial(running, words))
            except PyllamabatchError as error:
                measured = Measured.failed(str(error))
            except Exception as error:
                measured = Measured.failed(error)
            if measured.error:
                failed.add((arm, own))
            detail = {"n_threads_each": own.n_threads} | measured.detail
            if experiment.protocol == POISSON:
                detail["rate"] = experiment.rate
            # a record counts the tokens of a sequence: of all its requests
            work = replace(own, pp=own.pp * experiment.requests, tg=own.tg * experiment.requests)
            yield record_of(
                BENCHES[experiment.protocol],
                arm,
                work,
                replace(measured, detail=detail, settings={"n_kv_max": own.n_ctx}),
                about | moment,
                run_id,
                repeat,
            )


def steadiest(
    run: Callable[[], Measured],
    limit: float,
    tries: int,
    again: Callable[[], None] = lambda: None,
) -> Measured:
    """The first of `tries` runs in which others use no more than `limit` cores, else the one in
    which they use least. `disturbed_runs`: how many more there were. `again`: before each but the
    first."""
    made: list[Measured] = []
    while len(made) < tries:
        if made:
            again()
        made.append(run())
        if made[-1].error or made[-1].detail.get("other_cpu", 0.0) <= limit:
            break
    best = made[-1]
    if not best.error:
        best = min(made, key=lambda one: one.detail.get("other_cpu", 0.0))
    detail = {"disturbed_runs": float(len(made) - 1)} if len(made) > 1 else {}
    return replace(best, detail=best.detail | detail)


def run_once(
    experiment: Experiment,
    arm: Arm,
    case: Case,
    repeat: int,
    loaded: dict[tuple[Arm, Case], Serving],
    stack: ExitStack,
) -> Measured:
    """One run of an arm that is in `loaded`, or is loaded and warmed up; `stack` closes it."""
    serving = loaded.get((arm, case))
    if serving is None:
        limit = experiment.total_memory // case.pl
        serving = loaded[arm, case] = opened(arm, case, limit, experiment.verbose)
        stack.callback(serving.close)
        meter = Meter(serving.pids)  # before anything is loaded
        serving.load()
        meter.now_of(serving.pids)
        warm_up = experiment.warm_up(case)
        if why := failure(warm_up, serving.run(warm_up, experiment.limit_s)):
            return Measured.failed(f"warm-up: {why}")
    else:
        meter = Meter(serving.pids)
    workload = experiment.workload(case, repeat)
    meter.start()
    try:
        timings = serving.run(workload, experiment.limit_s)
    finally:
        taken = meter.stop()
    if case.machine:  # its memory and its energy are of no model
        taken = {name: value for name, value in taken.items() if name == "other_cpu"}
    detail, error = figures(workload, timings), failure(workload, timings)
    time = 0.0 if error else detail["elapsed_seconds"]
    return Measured(0.0, time, detail=detail | taken, error=error)
