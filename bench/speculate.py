"""Speculative decoding on and off: texts that repeat their prompt, and free chats.

In each run N texts of the set (`bench/texts`) are asked at once, and answered until they end or
have `--tokens` tokens. What repeats its prompt is answered greedily, chats with the default
sampling: the tokens are the same with drafts and without, but for rounding. All arms answer the
same texts at once, in turns (`bench/turns.py`), each in its own time.

`t_pp` is the time until every sequence has its first token, so that no prompt is in the speed;
`t_tg` is the time that `--tokens` tokens take from then on at what a token takes on average (TPOT)
for the mean of all readers. `until all were done` is the speed of all, which is bounded by the one
whose drafts are right least often: in the end it is alone.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bench import acceptance, harness
from bench.arms import InProcess
from bench.cache import cache_folder
from bench.case import Case, cases_of
from bench.options import add_model, add_run, choose, numbers
from bench.serve import ServeArm, llama_server, measure
from bench.serving import ServerProcess
from bench.speculates import REPEATING, SAMPLING, EngineSpeculates, ServerSpeculates, SideBySide
from bench.targets import Target, speed_ratio
from bench.texts import FREE
from bench.tools import tool
from bench.views import Column, by_arm, speed_table
from pyllamabatch.report.records import Record

OFF, NGRAM, DRAFT, SERVER = "off", "ngram", "draft", "llama-server-ngram"
CELLS = 1024  # of each sequence
QUICK = {
    "model": "default",
    "sequences": "1,2",
    "tokens": 24,
    "learn": 0.5,
    "repeats": 1,
    "arms": f"{OFF},{NGRAM}",
}


def _targets() -> Iterator[Target]:
    for kind, least in ((REPEATING, {1: 1.5, 2: 1.1}), (FREE, {})):
        for pl in (1, 2, 4, 8, 16):
            yield Target(
                f"{kind}, {pl} sequences: {NGRAM} over {OFF}",
                speed_ratio(NGRAM, OFF, pl),
                at_least=least.get(pl, 1.0 if kind == REPEATING else 0.98),
                where={"sampling": SAMPLING[kind]},
            )
            yield Target(
                f"{kind}, {pl} sequences: {NGRAM} over {SERVER}",
                speed_ratio(NGRAM, SERVER, pl),
                at_least=1.0,
                where={"sampling": SAMPLING[kind]},
            )
            yield Target(
                f"{kind}, {pl} sequences: {DRAFT} over {OFF}",
                speed_ratio(DRAFT, OFF, pl),
                at_least=0.98,
                where={"sampling": SAMPLING[kind]},
            )


TARGETS = (*_targets(), *acceptance.targets())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, model="smollm2-135m")
    parser.add_argument("--sequences", default="1,2,4,8,16", help="at once; comma separated")
    parser.add_argument("--texts", default=f"{REPEATING},{FREE}", help="comma separated")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument(
        "--draft",
        metavar="FILE",
        help="a smaller model that drafts, for its arm; mtp: layers of the model itself",
    )
    parser.add_argument(
        "--acceptance",
        metavar="SHARE,…",
        help="instead of texts: drafts that are right so often, as in 0.8,0.4,0",
    )
    parser.add_argument(
        "--learn", type=float, default=6.0, metavar="S", help="with --acceptance: seconds, before"
    )
    parser.set_defaults(sampling=SAMPLING[REPEATING])
    add_run(parser, repeats=6)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    if options.acceptance:
        kinds = [acceptance.sampling_of(share) for share in acceptance.shares(options.acceptance)]
        arms = choose(options.arms, acceptance.arms(options.learn))
        return _show(options, inside, arms, kinds, options.acceptance)
    arms = choose(options.arms, all_arms(inside, drafter_of(options)))
    for name in dict.fromkeys(arm.tool for arm in arms if arm.tool):
        tool(name)
    kinds = options.texts.split(",")
    if unknown := [kind for kind in kinds if kind not in SAMPLING]:
        raise SystemExit(f"--texts {','.join(unknown)}: not one of {', '.join(SAMPLING)}")
    return _show(options, inside, arms, [SAMPLING[kind] for kind in kinds], options.texts)


def _show(
    options: argparse.Namespace,
    inside: InProcess,
    arms: Sequence[ServeArm],
    samplings: Sequence[str],
    what: str,
) -> int:
    each = cases_of(options, inside.file, 0, options.tokens, numbers(options.sequences))
    cases = [replace(case, sampling=one, n_cells=CELLS) for case in each for one in samplings]
    return harness.show(
        options,
        measure(arms, cases, inside, options),
        len(arms) * len(cases) * options.repeats,
        f"{what}: answers of up to {options.tokens} tokens, generated tokens/s (ratio)",
    )


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("right of drafted", "right", ".2f"),
        Column("tokens a step and sequence", "per_step", ".2f"),
        Column("rows a token", "rows_a_token", ".2f"),
        Column("until all were done, tokens/s", "all_done", ".1f"),
        Column("all in, tokens/s", "all_in", ".1f"),
        Column("CPU ms a token", "cpu_ms", ".2f"),
        Column("s until all had a token", lambda record: record.t_pp, ".2f"),
    )
    tables = []
    kinds = {sampling: kind for kind, sampling in SAMPLING.items()}
    for sampling in dict.fromkeys(record.sampling for record in records):
        kind = kinds.get(sampling, sampling)
        mine = [record for record in records if record.sampling == sampling]
        tables.append(f"{kind}\n\n{speed_table(mine, OFF, 'sequences')}")
        for pl in sorted({record.pl for record in mine}):
            of = [record for record in mine if record.pl == pl]
            tables.append(f"{kind}, {pl} sequences\n\n{by_arm(of, columns)}")
    return "\n\n".join(tables)


def drafter_of(options: argparse.Namespace) -> str | None:
    """What the arm `draft` drafts from; None: there is no such arm."""
    if options.draft == "mtp":
        return "mtp"
    if options.draft:
        return f"draft:{options.draft}"
    return "draft" if options.model == "default" else None


def all_arms(inside: InProcess, drafter: str | None) -> list[ServeArm]:
    beside = defaultdict[Case, SideBySide](SideBySide)

    def engine(case: Case, *, options: dict[str, Any]) -> EngineSpeculates:
        return EngineSpeculates(case, inside.model, options, beside[case])

    def server(case: Case) -> ServerSpeculates:
        command = [*llama_server(case, backend_sampling=False), "--spec-type", "ngram-simple"]
        process = ServerProcess(command, cache_folder("logs") / f"{SERVER}.log")
        return ServerSpeculates(case, inside.model, process, beside[case])

    includes = "Engine in this process, a thread for each reader; no HTTP; its own time, in turns"
    drafting = [ServeArm(DRAFT, includes, partial(engine, options={"speculate": drafter}))]
    return [
        ServeArm(OFF, includes, partial(engine, options={"speculate": None})),
        ServeArm(NGRAM, includes, partial(engine, options={"speculate": NGRAM})),
        *(drafting if drafter else []),
        ServeArm(
            SERVER,
            "a slot for each sequence, --spec-type ngram-simple; httpx clients, streamed",
            server,
            tool="llama-server",
        ),
    ]
