"""`python -m bench decode`: decode-only speed of our layers beside llama-batched-bench."""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench import report, schema
from bench.arms import Arm, Case, InProcess, Measured, in_own_thread, run_batched_bench
from bench.cache import RESULTS
from bench.models import resolve
from bench.quiet import undisturbed
from bench.tools import tool

BASE = "llama-batched-bench"
STREAMS = "batched-bench, streams"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="qwen2-0.5b", help="a shape, 'default' or a GGUF file")
    parser.add_argument("-B", "--batch", default="1,4,16", help="sequences, comma separated")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument("--sampling", choices=["greedy", "default"], default="greedy")
    parser.add_argument("--prompt-tokens", type=int, help="per sequence (128; --quick 32)")
    parser.add_argument("--tokens", type=int, help="timed per sequence (64; --quick 16)")
    parser.add_argument("--repeats", type=int, help="runs of each arm (5; --quick 2)")
    parser.add_argument("--threads", type=int, default=schema.machine()["n_cores"])
    parser.add_argument("--gpu-layers", type=int, default=-1, help="-1 is libllama's default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a minute instead of ten")
    parser.add_argument(
        "--undisturbed",
        type=float,
        metavar="CORES",
        help="wait until others use fewer cores than this, and repeat runs that they disturb",
    )
    parser.add_argument("--out", type=Path, help="JSONL to append to (default bench/results)")


def main(options: argparse.Namespace) -> int:
    quick = options.quick
    pp = options.prompt_tokens or (32 if quick else 128)
    tg = options.tokens or (16 if quick else 64)
    repeats = options.repeats or (2 if quick else 5)
    batches = [int(word) for word in options.batch.split(",")]
    model = resolve(options.model)
    inside = InProcess(model, options.gpu_layers)
    arms = choose(options.arms, all_arms(inside))
    if any(arm.name in (BASE, STREAMS) for arm in arms):
        tool("llama-batched-bench")
    cases = [
        Case(
            model=model,
            pp=pp,
            tg=tg,
            pl=pl,
            n_threads=options.threads,
            sampling=options.sampling,
            seed=options.seed,
            n_gpu_layers=options.gpu_layers,
        )
        for pl in batches
    ]
    out = options.out or RESULTS / f"decode-{Path(options.model).stem}-{platform_tag()}.jsonl"
    rows = []
    for row in measure(arms, cases, repeats, inside, options.undisturbed):
        schema.append(out, [row])
        rows.append(row)
        progress = f"{len(rows)}/{len(arms) * len(cases) * repeats}"
        print(
            f"{progress:>7}  B={row.pl:<3} {row.arm:<24} {row.speed_tg:8.1f} t/s", file=sys.stderr
        )
    print(f"\n{model.name}, {pp} prompt tokens and {tg} timed tokens per sequence, ", end="")
    print(f"{options.threads} threads, medians of {repeats}; decode tokens/s (ratio)\n")
    print(report.decode_table(rows, BASE))
    widest = max(report.spread(rows).values())
    print(f"\nLargest spread of an arm, (max - min) / median: {widest:.0%}")
    print("What each time contains:")
    for arm in arms:
        print(f"- {arm.name}: {arm.includes}")
    print(f"\nrows: {out}")
    return 0


def all_arms(inside: InProcess) -> list[Arm]:
    return [
        Arm(
            BASE,
            "C++, one process, unified cells; random tokens, no sampling, batch rebuilt per step",
            False,
            lambda case: run_batched_bench(case, kv_unified=True),
        ),
        Arm(
            STREAMS,
            "the same with a stream of cells per sequence (llama.cpp's default)",
            False,
            lambda case: run_batched_bench(case, kv_unified=False),
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
            "engine",
            "Engine: scheduling, decode, sampling, text and delivery to one stream per sequence",
            True,
            inside.engine,
        ),
    ]


def choose(names: str, arms: list[Arm]) -> list[Arm]:
    if not names:
        return arms
    known = {arm.name: arm for arm in arms}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"--arms {','.join(unknown)}: not one of {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def measure(
    arms: list[Arm],
    cases: list[Case],
    repeats: int,
    inside: InProcess,
    limit: float | None = None,
) -> Iterator[schema.Row]:
    """Rows as they are measured: in each repeat every case, in each case every arm in turn; odd
    repeats go through the arms backwards, so that no arm always runs after the same one."""
    run_id = uuid.uuid4().hex[:12]
    facts = inside.facts()
    for repeat in range(repeats):
        for case in cases:
            for arm in arms if repeat % 2 == 0 else arms[::-1]:
                moment = schema.now()
                measured, others = undisturbed(partial(arm.run, case), limit)
                measured.detail["other_cpu"] = round(others, 3)
                yield make_row(arm, case, measured, facts | moment, run_id, repeat)


def make_row(
    arm: Arm, case: Case, measured: Measured, facts: dict[str, Any], run_id: str, repeat: int
) -> schema.Row:
    settings: dict[str, Any] = {
        "n_kv_max": case.n_ctx,
        "n_batch": case.n_batch,
        "n_ubatch": case.n_ubatch,
        "flash_attn": -1,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": case.n_gpu_layers,
        "n_threads": case.n_threads,
        "n_threads_batch": case.n_threads,
    }
    times = schema.speeds(
        pp=case.pp, tg=case.tg, pl=case.pl, t_pp=measured.t_pp, t_tg=measured.t_tg
    )
    return schema.Row(
        bench="decode",
        arm=arm.name,
        includes=arm.includes,
        run_id=run_id,
        repeat=repeat,
        sampling=case.sampling if arm.sampling else "none",
        **schema.machine(),
        model_filename=case.model.path.name,
        model_seed=case.model.seed,
        seed=case.seed,
        pp=case.pp,
        tg=case.tg,
        pl=case.pl,
        n_kv=case.pl * (case.pp + case.tg),
        detail=measured.detail,
        **(facts | settings | measured.settings),
        **times,
    )


def platform_tag() -> str:
    """A file name's part for the machine: system and core count, no name of its own."""
    return f"{sys.platform}-{schema.machine()['n_cores']}core"
