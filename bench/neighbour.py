"""Cores that others use: the engine's decode beside one busy process, over the same in quiet.

The process computes without end and never sleeps. Where the engine has as many threads as there are
cores, it takes a third of them on two.
"""

import argparse
from collections.abc import Sequence

from bench import harness
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run, add_work, numbers
from bench.serving import busy
from bench.targets import Target, speed_ratio
from bench.views import speed_table
from pyllamabatch.report.records import Record

QUIET, BUSY = "quiet", "busy"
QUICK = {"model": "default", "tokens": 16, "repeats": 1}
TARGETS = tuple(
    Target(
        f"{pl} sequences beside one busy process: tokens per s over quiet",
        speed_ratio(BUSY, QUIET, pl),
        at_least=0.45,
    )
    for pl in (1, 4)
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_work(parser, prompt_tokens=32, tokens=64)
    parser.add_argument("-B", "--batch", default="1,4", help="sequences, comma separated")
    add_run(parser, repeats=4)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)

    def beside(case: Case) -> Measured:
        with busy(1):
            return inside.engine(case)

    arms = [
        Arm(QUIET, "Engine, and no other process of ours", inside.engine),
        Arm(BUSY, "the same beside a process that computes without end", beside),
    ]
    pp, tg = options.prompt_tokens, options.tokens
    cases = cases_of(options, inside.file, pp, tg, numbers(options.batch))
    title = f"{tg} tokens per sequence, tokens/s (ratio)"
    return harness.run(options, arms, cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    return speed_table(records, QUIET)
