"""Decode-only speed of our layers beside llama-batched-bench."""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench import plots, report, schema
from bench.arms import InProcess, in_own_thread, run_batched_bench
from bench.case import Arm, Case, Measured, case_row, cases_of
from bench.models import resolve
from bench.options import Budget, add_model, add_run, choose, numbers, out_file
from bench.quiet import undisturbed
from bench.targets import Target, speed_ratio
from bench.tools import tool

BASE = "llama-batched-bench"
C_LOOP = "C loop"
QUICK = ("--quick", "-B", "1,4")
draw = plots.draw
TARGETS = (
    *(
        Target(
            f"B = {pl}: engine over {BASE}, default sampling, 0.5B on 2 cores",
            speed_ratio("engine", BASE, pl, sampling="default"),
            at_least=0.97,
            where={"gpu_info": "", "n_cores": 2, "model_type": "qwen2"},
        )
        for pl in (1, 4, 16)
    ),
    *(
        Target(
            f"B = {pl}: engine over {BASE}, default sampling, Gemma 3 1B on an H200",
            speed_ratio("engine", BASE, pl, sampling="default"),
            at_least=0.95,
            where={"gpu_info": "H200", "model_type": "gemma3 1B"},
        )
        for pl in (1, 8, 32, 64)
    ),
    Target(
        f"B = 16: engine over the {C_LOOP}, embedded model",
        speed_ratio("engine", C_LOOP, 16),
        at_least=0.9,
        where={"model_filename": "default.gguf"},
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-B", "--batch", default="1,4,16", help="sequences, comma separated")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument("--sampling", choices=["greedy", "default"], default="default")
    parser.add_argument("--prompt-tokens", type=int, help="per sequence (128; --quick 32)")
    parser.add_argument("--tokens", type=int, help="timed per sequence (64; --quick 16)")
    parser.add_argument("--repeats", type=int, help="runs of each arm (5; --quick 2)")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    quick = options.quick
    pp = options.prompt_tokens or (32 if quick else 128)
    tg = options.tokens or (16 if quick else 64)
    repeats = options.repeats or (2 if quick else 5)
    batches = numbers(options.batch)
    model = resolve(options.model)
    inside = InProcess(model, options.gpu_layers)
    arms = choose(options.arms, all_arms(inside))
    if any(arm.name == BASE for arm in arms):
        tool(BASE)
    cases = cases_of(options, model, pp, tg, batches)
    out = out_file(
        options,
        "decode",
        Path(options.model).name.removesuffix(".gguf"),
        inside.facts()["gpu_info"],
    )
    rows = []
    budget = Budget(options.budget)
    for row in measure(arms, cases, repeats, inside, options.undisturbed, budget):
        schema.append(out, [row])
        rows.append(row)
        progress = f"{len(rows)}/{len(arms) * len(cases) * repeats}"
        print(f"{progress:>7}  B={row.pl:<3} {report.in_words(row)}", file=sys.stderr)
    print(f"\n{model.name}, {pp} prompt tokens and {tg} timed tokens per sequence, ", end="")
    print(f"{options.threads} threads, KV {options.kv}, medians of {repeats}; ", end="")
    print("decode tokens/s (ratio)\n")
    print(view(rows))
    print("\nWhat each time contains:")
    for arm in arms:
        print(f"- {arm.name}: {arm.includes}")
    print(f"\nrows: {out}")
    return int(any(row.error for row in rows))


def view(rows: Sequence[schema.Row]) -> str:
    return report.table(rows, BASE)


def all_arms(inside: InProcess) -> list[Arm]:
    return [
        Arm(
            BASE,
            "C++, one process; random tokens, no sampling, batch rebuilt per step",
            False,
            run_batched_bench,
        ),
        Arm(
            "raw",
            "Python loop of raw calls: batch filled row by row, decode, a sampler chain per row",
            True,
            in_own_thread(inside.raw),
        ),
        Arm(
            "stepper",
            "Python loop of Stepper.step: NumPy rows, one native call decodes and samples",
            True,
            in_own_thread(inside.stepper),
        ),
        Arm(
            C_LOOP,
            "one plb_run: the shim's C++ loop decodes and samples all steps, nothing else",
            True,
            in_own_thread(inside.c_loop),
        ),
        Arm(
            "engine",
            "Engine: scheduling, decode, sampling, text and delivery to one stream per sequence",
            True,
            inside.engine,
        ),
    ]


def measure(
    arms: list[Arm],
    cases: list[Case],
    repeats: int,
    inside: InProcess,
    limit: float | None = None,
    budget: Budget | None = None,
    bench: str = "decode",
) -> Iterator[schema.Row]:
    """Rows as they are measured: in each repeat every case, in each case every arm in turn; odd
    repeats go through the arms backwards, so that no arm always runs after the same one.  An arm
    that fails gives a row that says why, and the others go on."""
    run_id = uuid.uuid4().hex[:12]
    facts = inside.facts()
    for repeat in range(repeats):
        for case in cases:
            for arm in arms if repeat % 2 == 0 else arms[::-1]:
                if budget and budget.spent():
                    return
                moment = schema.now()
                try:
                    measured, others = undisturbed(partial(arm.run, case), limit)
                    measured.detail["other_cpu"] = round(others, 3)
                except Exception as failure:
                    measured = Measured.failed(failure)
                yield case_row(bench, arm, case, measured, facts | moment, run_id, repeat)
