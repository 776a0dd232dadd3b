"""The scheduler's own time: plan and advance, every policy, no model."""

import argparse
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from bench import harness
from bench.case import NO_CONTEXT, NO_MODEL, Arm, Case, Measured
from bench.options import add_run, numbers
from bench.targets import Figure, Target
from bench.views import Column, failures
from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import Table
from pyllamabatch.scheduler import Limits, Scheduler, make_policy, policy_names

QUICK = {"waiting": "1000", "repeats": 2, "least": 0.02}
RUNNING, WAITING = 256, 1000  # what the targets are about
NO_PREEMPTION = {"mlfq": "mlfq:quantum=1000000000"}  # each has a long first turn
AT_ONCE = 64  # steps that one plan stands for in a run
N_BATCH, N_UBATCH = 2048, 512
SCENARIOS = {
    "steady": "all decode, planned at each step",
    "run": f"all decode, planned once for {AT_ONCE} steps",
    "join": "at each step one sequence ends, one arrives and one is admitted; all three are timed",
    "chunk": "a long prompt goes on in chunks beside those that decode",
}
Step = Callable[[], int]  # makes at least one step; how many


@dataclass(frozen=True)
class QueueCase(Case):
    """`pl` sequences decode."""

    waiting: int = 0


class LinearCost(StepCost):
    """Stands for a device: 5 ms a step and 0.1 ms a row."""

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        return 5e-3 + 1e-4 * rows


def per_step(records: Sequence[Record], scenario: str, n_running: int, n_waiting: int) -> float:
    """Seconds of a step, the slowest policy's median; 0 when there is none."""
    by_policy: dict[str, list[float]] = {}
    for record in records:
        policy, _, what = record.arm.partition(": ")
        if (what, record.pl, record.detail["waiting"]) == (scenario, n_running, n_waiting):
            by_policy.setdefault(policy, []).append(record.t_tg / record.tg)
    return max(map(median, by_policy.values()), default=0.0)


def slowest_us(scenario: str) -> Figure:
    def figure(records: Sequence[Record]) -> float | None:
        return 1e6 * per_step(records, scenario, RUNNING, WAITING) or None

    return figure


def growth(scenario: str, small: tuple[int, int], large: tuple[int, int]) -> Figure:
    """Time of a step with (running, waiting) `large` over that with `small`."""

    def figure(records: Sequence[Record]) -> float | None:
        base = per_step(records, scenario, *small)
        return per_step(records, scenario, *large) / base or None if base else None

    return figure


def runs_per_second(records: Sequence[Record]) -> float | None:
    seconds = per_step(records, "run", 32, WAITING)
    return 1 / seconds if seconds else None


TARGETS = (
    *(
        Target(
            f"{name}: us a step, {RUNNING} running, {WAITING} waiting, slowest policy",
            slowest_us(name),
            at_most=100.0,
        )
        for name in ("steady", "join", "chunk")
    ),
    Target(
        "join: time of a step with 256 running over that with 32",
        growth("join", (32, WAITING), (256, WAITING)),
        at_most=8.0,
    ),
    Target(
        "join: time of a step with 10,000 waiting over that with 1,000",
        growth("join", (RUNNING, 1000), (RUNNING, 10000)),
        at_most=10.0,
    ),
    Target("run: decode steps a second, 32 running", runs_per_second, at_least=100000.0),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policies", default=",".join(policy_names()), help="comma separated; all by default"
    )
    parser.add_argument("--running", default="32,256", help="sequences, comma separated")
    parser.add_argument("--waiting", default="1000,10000", help="sequences, comma separated")
    parser.set_defaults(least=0.1)  # CPU seconds of a run
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    names = options.policies.split(",")
    for name in names:
        make_policy(name)  # ArgumentError for one that there is not
    arms = [
        Arm(
            f"{name}: {scenario}",
            f"Scheduler.plan and advance: {what}",
            partial(timed, name, scenario, options.least),
            sampling=False,
        )
        for name in names
        for scenario, what in SCENARIOS.items()
    ]
    cases = [
        QueueCase(NO_MODEL, 0, 1, n, 1, "none", options.seed, kv_unified=True, waiting=waiting)
        for n in numbers(options.running)
        for waiting in numbers(options.waiting)
    ]
    return harness.run(
        options,
        arms,
        cases,
        harness.facts_of(),
        "us a step; columns: running + waiting",
        subject="all",
    )


def timed(name: str, scenario: str, least: float, case: QueueCase) -> Measured:
    """CPU time of this thread for a step, over at least so many seconds of it. Other processes on
    the same cores do not count, but for what they do to its caches."""
    _, step = prepare(name, scenario, case.pl, case.waiting)
    for _ in range(20):
        step()
    n_steps = 0
    began = time.thread_time()
    while (seconds := time.thread_time() - began) < least:
        for _ in range(50):
            n_steps += step()
    detail = {"waiting": float(case.waiting), "n_steps": float(n_steps)}
    return Measured(0.0, seconds / n_steps, NO_CONTEXT, detail)


def prepare(name: str, scenario: str, n_running: int, n_waiting: int) -> tuple[Scheduler, Step]:
    """A scheduler in which `n_running` sequences decode and `n_waiting` wait, of 8 tenants."""
    limits = Limits(N_BATCH, N_UBATCH, n_running, n_cells=2**40, n_cells_seq=2**40)
    scheduler = Scheduler(limits, make_policy(NO_PREEMPTION.get(name, name)), cost=LinearCost())
    ids = itertools.count()
    admitted: deque[tuple[int, int]] = deque()

    def add(n_prompt: int) -> None:
        id = next(ids)
        scheduler.add(
            id,
            n_prompt,
            2**30 - id % 100,
            arrival=float(id),
            tenant=f"tenant {id % 8}",
            deadline=1e9 + id % 50,
            itl_target=0.05,
        )

    def step() -> int:
        planned = scheduler.plan(0.0)
        assert planned is not None
        scheduler.advance(planned)
        admitted.extend(planned.admitted)
        return 1

    def run() -> int:
        planned = scheduler.plan(0.0)
        assert planned is not None
        n = min(AT_ONCE, planned.repeat)
        scheduler.advance(planned, n)
        return n

    def join() -> int:
        scheduler.remove(admitted.popleft()[0])
        add(20)
        return step()

    for _ in range(n_running):
        add(20)
    while len(scheduler.view(0.0).decoding) < n_running:
        step()
    if scenario == "chunk":
        scheduler.remove(0)
        add(2**39)
        step()
    for _ in range(n_waiting):
        # Long prompts, where they are not to run: no policy preempts a sequence for them.
        add(20 if scenario == "join" else 10**5)
    return scheduler, {"steady": step, "run": run, "join": join, "chunk": step}[scenario]


def view(records: Sequence[Record]) -> str:
    """Microseconds of a step, medians of the repeats, by policy and scenario."""
    column = Column("", lambda record: record.t_tg / record.tg, ".1f", 1e6)
    groups: dict[tuple[int, float], dict[str, list[Record]]] = {}
    good = [record for record in records if not record.error]
    for record in good:
        size = record.pl, record.detail["waiting"]
        groups.setdefault(size, {}).setdefault(record.arm, []).append(record)
    sizes = sorted(groups)
    arms = dict.fromkeys(record.arm for record in good)
    lines = [[arm, *(column.cell(groups[size].get(arm, [])) for size in sizes)] for arm in arms]
    heads = [f"{running} + {waiting:.0f}" for running, waiting in sizes]
    return "\n".join([Table(["policy: scenario", *heads], lines).markdown(), *failures(records)])
