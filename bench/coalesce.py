"""Threads that ask for one token at a time: rows per decode, and time per token beside a raw loop.

The engine waits for threads as it does by default, and in another arm for a fixed window.
Every arm computes the same prompts, which are outside the time, and then `tg` tokens per sequence.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench import decode, report, schema
from bench.arms import InProcess, in_own_thread
from bench.case import Arm, Case, Measured, cases_of
from bench.models import resolve
from bench.options import Budget, add_model, add_run, numbers, out_file
from bench.targets import Figure, Target, speed_ratio
from pyllamabatch.compare.case import sampling_params

if TYPE_CHECKING:
    from pyllamabatch.engine.engine import Engine
    from pyllamabatch.scheduler import Gather

BASE = "stepper"
THREADS, WINDOW = "threads", "threads-window"
QUICK = ("--quick", "--model", "default")


def fill(pl: int) -> Figure:
    """Mean rows per decode over the threads that ask, the worst repeat of the default arm."""

    def figure(rows: Sequence[schema.Row]) -> float | None:
        values = [row.detail["rows_per_decode"] / pl for row in rows if _is(row, THREADS, pl)]
        return min(values) if values else None

    return figure


def _is(row: schema.Row, arm: str, pl: int) -> bool:
    return row.arm == arm and row.pl == pl


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
    parser.add_argument("-N", default="1,2,4,8", help="threads, comma separated")
    parser.add_argument("--window", type=float, default=200.0, help="µs, of the arm that has one")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="per sequence")
    parser.add_argument("--tokens", type=int, help="timed per sequence (64; --quick 32)")
    parser.add_argument("--repeats", type=int, help="runs of each arm (5; --quick 2)")
    parser.add_argument("--sampling", choices=["greedy", "default"], default="default")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    from pyllamabatch.scheduler import Window

    tokens = options.tokens or (32 if options.quick else 64)
    repeats = options.repeats or (2 if options.quick else 5)
    model = resolve(options.model)
    inside = InProcess(model, options.gpu_layers)
    arms = [
        Arm(
            BASE,
            "one thread: a Python loop of Stepper.step with a row per sequence",
            True,
            in_own_thread(inside.stepper),
        ),
        Arm(
            THREADS,
            "a thread per sequence, each in a loop of Sequence.sample; the engine's default window",
            True,
            lambda case: run_threads(case, inside, None),
        ),
        Arm(
            WINDOW,
            f"the same with a fixed window of {options.window:g} µs",
            True,
            lambda case: run_threads(case, inside, Window(options.window * 1e-6)),
        ),
    ]
    cases = cases_of(options, model, options.prompt_tokens, tokens, numbers(options.N))
    out = out_file(options, "coalesce", Path(options.model).stem)
    rows = []
    budget = Budget(options.budget)
    for row in decode.measure(
        arms, cases, repeats, inside, options.undisturbed, budget, bench="coalesce"
    ):
        schema.append(out, [row])
        rows.append(row)
        print(f"N={row.pl:<3} {report.in_words(row)}", file=sys.stderr)
    print(f"\n{model.name}, {tokens} tokens per sequence, window {options.window:g} µs, ", end="")
    print(f"medians of {repeats}; tokens/s (ratio)\n")
    print(report.table(rows, BASE, "N"))
    for pl in (case.pl for case in cases):
        for arm in (THREADS, WINDOW):
            good = [row for row in rows if _is(row, arm, pl) and not row.error]
            if good:
                per_decode = [row.detail["rows_per_decode"] for row in good]
                print(
                    f"{pl} {arm}: {median(per_decode):.3f} rows per decode, "
                    f"the worst run {min(per_decode):.3f}"
                )
    print(f"\nrows: {out}")
    return int(any(row.error for row in rows))


def run_threads(case: Case, inside: InProcess, gather: Gather | None) -> Measured:
    """Every thread has its prompt computed and one token sampled when the time begins."""
    from pyllamabatch.engine.engine import Engine

    prompts = case.prompts(inside.model.n_vocab)
    ready = threading.Barrier(case.pl + 1)
    errors: list[BaseException] = []

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

    with Engine(
        inside.model,
        n_seq_max=case.pl,
        n_ctx=case.n_ctx,
        n_batch=case.n_batch,
        n_ubatch=case.n_ubatch,
        n_threads=case.n_threads,
        n_threads_batch=case.n_threads,
        kv_unified=case.kv_unified,
        gather=gather,
    ) as engine:
        threads = [threading.Thread(target=drive, args=(engine, i)) for i in range(case.pl)]
        for thread in threads:
            thread.start()
        start = time.perf_counter()
        try:
            ready.wait()
            before, begin = engine.stats(), time.perf_counter()
            ready.wait()
            end, after = time.perf_counter(), engine.stats()
        except threading.BrokenBarrierError:
            pass
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
    n_steps = after.steps - before.steps
    return Measured(
        begin - start,
        end - begin,
        detail={"rows_per_decode": (after.rows - before.rows) / n_steps, "steps": float(n_steps)},
    )
