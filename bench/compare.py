"""The four ways to serve N users side by side: processes, contexts, a shared context, the engine.

The rows are those of `pyllamabatch compare`, which does the work; here they get the benches' models
and files. Arms run in turn, each in processes of its own. Records of its other protocols (`--out`)
are shown by the report as well.
"""

import argparse
import contextlib
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

from bench import harness
from bench.case import cases_of
from bench.models import resolve
from bench.options import Budget, add_model, add_run, add_work, choose, numbers
from bench.quiet import wait_for_quiet
from bench.targets import Figure, Target, speed_ratio
from bench.views import paired_ratios
from pyllamabatch.compare import plots
from pyllamabatch.compare.advice import advice
from pyllamabatch.compare.arms import ARMS, ON_RAY
from pyllamabatch.compare.hosted import probe
from pyllamabatch.compare.run import Experiment, measure
from pyllamabatch.compare.summary import table
from pyllamabatch.compare.workload import BENCHES, BURST
from pyllamabatch.report.records import Record

QUICK = {"users": "1,2", "prompt_tokens": 32, "tokens": 16, "repeats": 1}
NAMES = tuple(BENCHES.values())
ON_H200 = {"gpu_info": "H200", "model_type": "gemma3 1B"}
# Cotabby's bench: contexts, and one shared context, on a Mac. A profile is fitted to its figures:
# pyllamabatch compare --machine bench/profiles/m-series-gemma-3-1b-q4_k_m.json --arms \
#     contexts,shared,engine -n 2,3,4 --prompt-tokens 256 --sample-tokens 200
ON_COTABBYS_MAC = {"gpu_info": "Apple M-series", "model_type": "Gemma 3 1B Q4_K_M"}
SHARED_OVER_CONTEXTS = {2: 1.43, 3: 1.92}
"""At 4 its figure is 2.35, which no profile has: its contexts gave up (llama_decode failed after
about 126 of 199 steps) and made 113 tok/s. Over three contexts, 132 tok/s, it is 2.01."""


def of_burst(figure: Figure) -> Figure:
    return lambda rows: figure([row for row in rows if row.bench == BENCHES[BURST]])


def over_one_user(rows: Sequence[Record]) -> float | None:
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
    *(
        Target(
            f"N = {n}: shared over contexts as Cotabby's bench has it, on a profile of its Mac",
            of_burst(speed_ratio("shared", "contexts", n)),
            at_least=round(0.97 * ratio, 3),
            at_most=round(1.03 * ratio, 3),
            where=ON_COTABBYS_MAC,
        )
        for n, ratio in SHARED_OVER_CONTEXTS.items()
    ),
    *(
        Target(
            f"N = {n}: engine over {other}, on the profile of Cotabby's Mac",
            of_burst(speed_ratio("engine", other, n)),
            at_least=1.0,
            where=ON_COTABBYS_MAC,
        )
        for n in (2, 3, 4)
        for other in ("contexts", "shared")
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_work(parser, prompt_tokens=256, tokens=200)
    parser.add_argument("-N", "--users", default="1,2,3,4,8", help="comma separated")
    parser.add_argument(
        "--arms", default=",".join(ARMS), help=f"comma separated; {ON_RAY.name} is one, too"
    )
    parser.add_argument(
        "--keep-loaded",
        action="store_true",
        help="all arms of a number of users stay loaded, which takes memory and spares time",
    )
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    todo = experiment(options)
    return harness.show(
        options,
        run(todo, options),
        sum(1 for _ in todo.runs()),
        f"{options.prompt_tokens} prompt tokens and {options.tokens} of an answer",
    )


def experiment(options: argparse.Namespace) -> Experiment:
    model, timed = resolve(options.model), options.tokens - 1
    return Experiment(
        protocol=BURST,
        arms=choose(options.arms, [*ARMS.values(), ON_RAY]),
        cases=cases_of(options, model, options.prompt_tokens, timed, numbers(options.users)),
        tokens=options.tokens,
        repeats=options.repeats,
        tries=1 if options.undisturbed is None else sys.maxsize,
        quiet=options.undisturbed,
        keep_loaded=options.keep_loaded,
    )


def run(todo: Experiment, options: argparse.Namespace) -> Generator[Record, None, None]:
    """Records while there is time for more runs. --undisturbed: each run waits for quiet, and is
    made again until it had that."""
    about, _ = probe(todo.cases[0], False)
    about["versions"]["commit"] = harness.commit()
    budget, limit = Budget(options.budget), options.undisturbed

    def before(what: str) -> None:
        if limit is not None:
            wait_for_quiet(limit)

    with contextlib.closing(measure(todo, about, before)) as running:
        while not budget.spent() and (record := next(running, None)):
            yield record


def view(rows: Sequence[Record]) -> str:
    """The table; where it decides, what follows from it comes first."""
    if not rows or rows[0].bench != BENCHES[BURST]:
        return table(rows)
    lines = [f"- {line}" for line in advice(rows).splitlines()]
    return "\n".join([*lines, "", table(rows)])


def draw(rows: Sequence[Record], path: Path) -> None:
    plots.save(rows, path)
