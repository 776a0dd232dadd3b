"""Decode-only speed of our layers beside llama-batched-bench."""

import argparse
from collections.abc import Sequence

from bench import harness, summary
from bench.arms import InProcess, run_batched_bench
from bench.case import Arm, cases_of
from bench.options import add_model, add_run, add_work, choose, numbers
from bench.targets import Target, speed_ratio
from bench.tools import tool
from bench.views import speed_table
from pyllamabatch.report.records import Record

BASE = "llama-batched-bench"
C_LOOP = "C loop"
QUICK = {"batch": "1,4", "prompt_tokens": 32, "tokens": 16, "repeats": 2}
draw = summary.draw
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
    add_work(parser, prompt_tokens=128, tokens=64)
    parser.add_argument("-B", "--batch", default="1,4,16", help="sequences, comma separated")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    add_run(parser, repeats=5)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    arms = choose(options.arms, all_arms(inside))
    if any(arm.name == BASE for arm in arms):
        tool(BASE)
    pp, tg = options.prompt_tokens, options.tokens
    cases = cases_of(options, inside.file, pp, tg, numbers(options.batch))
    title = f"{pp} prompt tokens and {tg} timed tokens per sequence, decode tokens/s (ratio)"
    return harness.run(options, arms, cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    return speed_table(records, BASE)


def all_arms(inside: InProcess) -> list[Arm]:
    return [
        Arm(
            BASE,
            "C++, one process; random tokens, no sampling, batch rebuilt per step",
            run_batched_bench,
            sampling=False,
        ),
        Arm(
            "raw",
            "Python loop of raw calls: batch filled row by row, decode, a sampler chain per row",
            inside.raw,
        ),
        Arm(
            "stepper",
            "Python loop of Stepper.step: NumPy rows, one native call decodes and samples",
            inside.stepper,
        ),
        Arm(
            C_LOOP,
            "one plb_run: the shim's C++ loop decodes and samples all steps, nothing else",
            inside.c_loop,
        ),
        Arm(
            "engine",
            "Engine: scheduling, decode, sampling, text and delivery to one stream per sequence",
            inside.engine,
        ),
    ]
