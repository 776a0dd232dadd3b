"""The four ways to serve N users side by side: processes, contexts, a shared context, the engine.

The rows are those of `pyllamabatch compare`, which does the work; here they get the benches' models
and files. Arms run in turn, each in processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from bench import report, schema
from bench.case import cases_of
from bench.models import BenchModel, resolve
from bench.options import Budget, add_model, add_run, add_work, numbers, out_file
from bench.targets import Figure, Target, speed_ratio
from pyllamabatch.compare import plots
from pyllamabatch.compare.advice import GIB, advice, memory_kind
from pyllamabatch.compare.arms import NAMES as ARMS
from pyllamabatch.compare.arms import chosen
from pyllamabatch.compare.comparison import Comparison
from pyllamabatch.compare.hosted import probe
from pyllamabatch.compare.run import Plan, measure
from pyllamabatch.compare.summary import table
from pyllamabatch.compare.workload import BENCHES, BURST, POISSON
from pyllamabatch.report.medians import paired_ratios
from pyllamabatch.report.meters import wait_for_quiet
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import NO_RESULT, Table

QUICK = {"users": "1,2", "prompt_tokens": 32, "tokens": 16, "repeats": 1}
NAMES = tuple(BENCHES.values())
ON_H200 = {"gpu_info": "H200", "model_type": "gemma3 1B"}


def of_burst(figure: Figure) -> Figure:
    return lambda rows: figure([row for row in rows if row.bench == BENCHES[BURST]])


def over_one_user(rows: Sequence[schema.Row]) -> float | None:
    return paired_ratios(rows, "single", 1).get(("engine", 2))


TARGETS = (
    *(
        Target(
            f"N = {n}: engine over contexts, default sampling, Gemma 3 1B on an H200",
            of_burst(speed_ratio("engine", "contexts", n, sampling="default")),
            at_least=least,
            where=ON_H200,
        )
        for n, least in ((2, 1.45), (3, 1.55), (4, 1.65), (8, 2.0), (16, 2.4))
    ),
    Target(
        "N = 2: engine over one user alone, default sampling, Gemma 3 1B on an H200",
        of_burst(over_one_user),
        at_least=1.9,
        where=ON_H200,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_work(parser, prompt_tokens=256, tokens=200)
    parser.add_argument("-N", "--users", default="1,2,3,4,8", help="comma separated")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma separated")
    parser.add_argument(
        "--protocols", default=BURST, help=f"comma separated, of {', '.join(BENCHES)}"
    )
    parser.add_argument("--samplers", default="chain", help="chain, fused or both (chain,fused)")
    parser.add_argument("--rate", type=float, default=1.0, help="poisson: requests a second")
    parser.add_argument("--requests", type=int, default=4, help="poisson: of each user")
    parser.add_argument(
        "--keep-loaded",
        action="store_true",
        help="all arms of a number of users stay loaded, which takes memory and spares time",
    )
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    model = resolve(options.model)
    todo = plans(options, model)
    about = probe(todo[0].cases[0], False)
    about["versions"]["commit"] = schema.commit()
    subject = Path(options.model).name.removesuffix(".gguf")
    out = out_file(options, "compare", subject, about["gpu_info"])
    rows = []
    budget = Budget(options.budget)
    for plan in todo:
        with contextlib.closing(measure(plan, about)) as running:  # ends processes, also on Ctrl-C
            for row in until_spent(running, budget, options.undisturbed):
                schema.append(out, [row])
                rows.append(row)
                print(f"{row.bench} N={row.pl:<3} {report.in_words(row)}", file=sys.stderr)
    print(f"\n{model.name}, {options.threads} threads, medians of {todo[0].repeats}\n")
    print(f"{view(rows)}\nrows: {out}")
    return int(any(row.error for row in rows))


def view(rows: Sequence[schema.Row]) -> str:
    """The table; where it decides, in short before it, and what follows from it."""
    if not rows or rows[0].bench != BENCHES[BURST]:
        return table(rows)
    lines = [f"- {line}" for line in advice(rows).splitlines()]
    return "\n".join([brief(rows), *lines, "", table(rows)])


def brief(records: Sequence[Record]) -> str:
    """Markdown of one bench: a line for each arm, with the speed of all together at each N and in
    brackets the ratio to contexts; and the arm's memory at the largest N."""
    them = Comparison(records)
    memory, words = memory_kind(them)
    last = max(them.counts)
    heads = ["tok/s together", *map(str, them.counts)]
    lines = [[arm, *(_speed_cell(them, arm, n) for n in them.counts)] for arm in them.arms]
    if memory:
        heads.append(f"GiB ({words}) at {last}")
        for line in lines:
            size = them.detail(line[0], last, memory)
            line.append("" if size is None else f"{size / GIB:.2f}")
    return Table(heads, lines).markdown() + "\n"


def _speed_cell(them: Comparison, arm: str, n: int) -> str:
    speed, over = them.speed(arm, n), them.ratio(arm, n, "contexts")
    if speed is None:
        return NO_RESULT if them.problem(arm, n) else ""
    return f"{speed:.4g}" if over is None or arm == "contexts" else f"{speed:.4g} ({over:.2f})"


def draw(rows: Sequence[schema.Row], path: Path) -> None:
    plots.save(rows, path)


def plans(options: argparse.Namespace, model: BenchModel) -> list[Plan]:
    """One for each protocol."""
    pp, tokens, users = options.prompt_tokens, options.tokens, numbers(options.users)
    found = []
    for protocol in options.protocols.split(","):
        if protocol not in BENCHES:
            raise SystemExit(f"--protocols {protocol}: not one of {', '.join(BENCHES)}")
        timed = tokens - 1 if protocol == BURST else tokens
        found.append(
            Plan(
                protocol=protocol,
                arms=chosen(options.arms.split(","), options.samplers.split(",")),
                cases=cases_of(options, model, pp, timed, users),
                tokens=tokens,
                requests=options.requests if protocol == POISSON else 1,
                rate=options.rate,
                repeats=options.repeats,
                keep_loaded=options.keep_loaded,
            )
        )
    return found


def until_spent(
    running: Generator[schema.Row, None, None], budget: Budget, limit: float | None
) -> Iterator[schema.Row]:
    """Rows while there is time for more runs; with a `limit` each run waits for quiet."""
    while not budget.spent():
        if limit is not None:
            wait_for_quiet(limit)
        row = next(running, None)
        if row is None:
            return
        yield row
