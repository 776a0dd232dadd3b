"""The scheduler's own time: plan and advance, every policy, no model."""

from __future__ import annotations

import argparse
import itertools
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from bench import schema
from bench.options import add_run, numbers, out_file
from bench.quiet import undisturbed
from bench.targets import Figure, Target, judged
from pyllamabatch.scheduler import Limits, Scheduler, make_policy, policy_names

QUICK = ("--quick", "--waiting", "1000")
RUNNING, WAITING = 256, 1000  # what the targets are about
NOBODY_MAKES_WAY = {"mlfq": "mlfq:quantum=1000000000"}  # each has a long first turn
AT_ONCE = 64  # steps that one plan stands for in a run
N_BATCH, N_UBATCH = 2048, 512
SCENARIOS = {
    "steady": "everybody decodes, planned at each step",
    "run": f"everybody decodes, planned once for {AT_ONCE} steps",
    "join": "at each step one sequence ends, one arrives and one is admitted; all three are timed",
    "chunk": "a long prompt goes on in chunks beside those that decode",
}
Step = Callable[[], int]  # makes at least one step; how many


class LinearCost:
    """Stands for a device: 5 ms a step and 0.1 ms a row."""

    def predict(self, rows: int, prefill: int, kv: int, n_seqs: int) -> float:
        return 5e-3 + 1e-4 * rows


def per_step(rows: Sequence[schema.Row], scenario: str, n_running: int, n_waiting: int) -> float:
    """Seconds of a step, the slowest policy's median; 0 when there is none."""
    by_policy: dict[str, list[float]] = {}
    for row in rows:
        policy, _, what = row.arm.partition(": ")
        if (what, row.pl, row.detail["waiting"]) == (scenario, n_running, n_waiting):
            by_policy.setdefault(policy, []).append(row.t_tg / row.tg)
    return max(map(median, by_policy.values()), default=0.0)


def slowest_us(scenario: str) -> Figure:
    def figure(rows: Sequence[schema.Row]) -> float | None:
        return 1e6 * per_step(rows, scenario, RUNNING, WAITING) or None

    return figure


def growth(scenario: str, small: tuple[int, int], large: tuple[int, int]) -> Figure:
    """Time of a step with (running, waiting) `large` over that with `small`."""

    def figure(rows: Sequence[schema.Row]) -> float | None:
        base = per_step(rows, scenario, *small)
        return per_step(rows, scenario, *large) / base or None if base else None

    return figure


def runs_per_second(rows: Sequence[schema.Row]) -> float | None:
    seconds = per_step(rows, "run", 32, WAITING)
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
    parser.add_argument("--policies", default="", help="comma separated; all by default")
    parser.add_argument("--running", default="32,256", help="sequences, comma separated")
    parser.add_argument("--waiting", default="1000,10000", help="sequences, comma separated")
    parser.add_argument("--repeats", type=int, help="of each measurement (3; --quick 2)")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    names = options.policies.split(",") if options.policies else policy_names()
    out: Path = out_file(options, "scheduler", "all")
    rows = []
    for row in measure(options, names, numbers(options.running), numbers(options.waiting)):
        schema.append(out, [row])
        rows.append(row)
    print(view(rows))
    print(judged(TARGETS, rows, ".1f"), end="")
    print(f"\nrows: {out}")
    return 0


def measure(
    options: argparse.Namespace, names: Sequence[str], running: list[int], waiting: list[int]
) -> Iterator[schema.Row]:
    run_id = uuid.uuid4().hex[:12]
    facts = schema.build()
    least = 0.02 if options.quick else 0.1
    for repeat in range(options.repeats or (2 if options.quick else 3)):
        for name, scenario, n_running, n_waiting in itertools.product(
            names, SCENARIOS, running, waiting
        ):
            moment = schema.now()
            run = partial(timed, name, scenario, n_running, n_waiting, least)
            (n_steps, seconds), others = undisturbed(run, options.undisturbed)
            yield schema.Row(
                bench="scheduler",
                arm=f"{name}: {scenario}",
                includes=f"Scheduler.plan and advance: {SCENARIOS[scenario]}",
                run_id=run_id,
                repeat=repeat,
                sampling="none",
                **schema.machine(),
                **facts,
                **moment,
                model_filename="",
                model_type="",
                model_size=0,
                model_n_params=0,
                model_seed=None,
                seed=options.seed,
                n_kv_max=0,
                n_batch=N_BATCH,
                n_ubatch=N_UBATCH,
                flash_attn=-1,
                kv_unified=True,
                type_k="",
                type_v="",
                n_gpu_layers=0,
                n_threads=1,
                n_threads_batch=1,
                pp=0,
                tg=n_steps,
                pl=n_running,
                n_kv=0,
                detail={"waiting": n_waiting, "other_cpu": round(others, 3)},
                **schema.speeds(pp=0, tg=n_steps, pl=n_running, t_pp=0.0, t_tg=seconds),
            )


def timed(
    name: str, scenario: str, n_running: int, n_waiting: int, least: float
) -> tuple[int, float]:
    """Steps, and the CPU seconds of this thread for them, `least` of them at least: others who
    use the same cores do not count, but for what they do to its caches."""
    _, step = prepare(name, scenario, n_running, n_waiting)
    for _ in range(20):
        step()
    n_steps = 0
    began = time.thread_time()
    while (seconds := time.thread_time() - began) < least:
        for _ in range(50):
            n_steps += step()
    return n_steps, seconds


def prepare(name: str, scenario: str, n_running: int, n_waiting: int) -> tuple[Scheduler, Step]:
    """A scheduler in which `n_running` sequences decode and `n_waiting` wait, of 8 tenants."""
    limits = Limits(N_BATCH, N_UBATCH, n_running, n_cells=2**40, n_cells_seq=2**40)
    scheduler = Scheduler(limits, make_policy(NOBODY_MAKES_WAY.get(name, name)), cost=LinearCost())
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
        # Long prompts, where they are not to run: nobody makes way for them in any policy.
        add(20 if scenario == "join" else 10**5)
    return scheduler, {"steady": step, "run": run, "join": join, "chunk": step}[scenario]


def view(rows: Sequence[schema.Row]) -> str:
    """Microseconds of a step, medians of the repeats, by policy and scenario."""
    sizes = sorted({(row.pl, int(row.detail["waiting"])) for row in rows})
    heads = [f"{pl} + {waiting}" for pl, waiting in sizes]
    lines = [
        "us a step; columns: running + waiting\n",
        f"| {'policy: scenario':<24} | " + " | ".join(f"{head:>11}" for head in heads) + " |",
        f"|{'-' * 26}|" + "------------:|" * len(heads),
    ]
    for arm in dict.fromkeys(row.arm for row in rows):
        cells = []
        for size in sizes:
            mine = [
                row.t_tg / row.tg
                for row in rows
                if row.arm == arm and (row.pl, row.detail["waiting"]) == size
            ]
            cells.append(f"{1e6 * median(mine):11.1f}")
        lines.append(f"| {arm:<24} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
