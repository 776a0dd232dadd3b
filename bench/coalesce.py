"""Threads that ask for one token at a time: rows per decode, and time per token beside a raw loop.

The engine waits for threads as it does by default, and in another arm for a fixed window. Every arm
computes the same prompts, which are outside the time, and then `tg` tokens per sequence.
"""

import argparse
import threading
import time
from collections.abc import Sequence
from functools import partial
from statistics import median

from bench import harness
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run, add_work, numbers
from bench.targets import Figure, Target, speed_ratio
from bench.views import speed_table
from pyllamabatch.compare.case import sampling_params
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stats import EngineStats
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import Table
from pyllamabatch.scheduler import Gather, Window

BASE = "stepper"
THREADS, WINDOW = "threads", "threads-window"
QUICK = {"model": "default", "tokens": 32, "repeats": 2}


def fill(pl: int) -> Figure:
    """Mean rows per decode over the threads that ask, the worst repeat of the default arm."""

    def figure(records: Sequence[Record]) -> float | None:
        return min((rows / pl for rows in rows_per_decode(records, THREADS, pl)), default=None)

    return figure


def rows_per_decode(records: Sequence[Record], arm: str, pl: int) -> list[float]:
    """Of each run."""
    mine = [record for record in records if (record.arm, record.pl) == (arm, pl)]
    return [record.detail["rows_per_decode"] for record in mine if not record.error]


TARGETS = (
    *(Target(f"{pl} threads: rows per decode / {pl}", fill(pl), at_least=0.95) for pl in (2, 4, 8)),
    Target(
        "one thread: tokens per s over the raw loop's",
        speed_ratio(THREADS, BASE, 1),
        at_least=0.97,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_work(parser, prompt_tokens=32, tokens=64)
    parser.add_argument("-N", default="1,2,4,8", help="threads, comma separated")
    parser.add_argument("--window", type=float, default=200.0, help="µs, of the arm that has one")
    add_run(parser, repeats=5)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    window = Window(options.window * 1e-6)
    arms = [
        Arm(
            BASE,
            "one thread: a Python loop of Stepper.step with a row per sequence",
            inside.stepper,
        ),
        Arm(
            THREADS,
            "a thread per sequence, each in a loop of Sequence.sample; the engine's default window",
            partial(run_threads, inside, None),
        ),
        Arm(
            WINDOW,
            f"the same with a fixed window of {options.window:g} µs",
            partial(run_threads, inside, window),
        ),
    ]
    pp, tg = options.prompt_tokens, options.tokens
    cases = cases_of(options, inside.file, pp, tg, numbers(options.N))
    title = f"{tg} tokens per sequence, tokens/s (ratio)"
    return harness.run(options, arms, cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    """Speeds, and rows per decode."""
    runs = {
        (pl, arm): rows_per_decode(records, arm, pl)
        for pl in sorted({record.pl for record in records})
        for arm in (THREADS, WINDOW)
    }
    lines = [
        [pl, arm, f"{median(rows):.3f}", f"{min(rows):.3f}"]
        for (pl, arm), rows in runs.items()
        if rows
    ]
    table = Table(["N", "arm", "rows per decode", "worst run"], lines, text=(1,))
    return f"{speed_table(records, BASE, 'N')}\n\n{table.markdown()}"


def run_threads(inside: InProcess, gather: Gather | None, case: Case) -> Measured:
    """Every thread has its prompt computed and one token sampled when the time begins."""
    prompts = case.prompts(inside.model.n_vocab)
    errors: list[BaseException] = []
    readings: list[tuple[float, EngineStats]] = []

    def drive(engine: Engine, i: int) -> None:
        params = sampling_params(case.sampling, case.seed + i, case.tg)
        try:
            with engine.sequence(params) as sequence:
                sequence.prompt(prompts[i])
                sequence.sample()
                ready.wait()
                for _ in range(case.tg):
                    sequence.sample()
                ready.wait()
        except BaseException as error:
            errors.append(error)
            ready.abort()

    start = time.perf_counter()
    with Engine(inside.model, gather=gather, speculate=None, **case.context_params()) as engine:

        def read() -> None:  # while every thread waits, before the first one goes on
            readings.append((time.perf_counter(), engine.stats()))

        ready = threading.Barrier(case.pl, action=read)
        threads = [threading.Thread(target=drive, args=(engine, i)) for i in range(case.pl)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
    (begin, before), (end, after) = readings
    n_steps = after.steps - before.steps
    return Measured(
        begin - start,
        end - begin,
        detail={"rows_per_decode": (after.rows - before.rows) / n_steps, "steps": float(n_steps)},
    )
