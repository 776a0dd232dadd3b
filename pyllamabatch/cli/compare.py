"""Serve N users in four ways on this machine, side by side, and say what to use.

processes: a process each, behind a round-robin router over HTTP. contexts: a context and a thread
each, in one process. shared: one context, one batch per step, a plain loop. engine: the Engine, a
thread per client. single: one user alone, the base. All on the same model, prompts of random
tokens, sampling and lengths; docs/compare.md says what each time contains.

--protocol burst (the default) times decoding alone; ds4 fires identical completions at once,
prompts included; poisson lets requests come at random, --rate a second. Several, comma separated,
run one after the other. Ctrl-C ends every process and keeps the rows that are done.

--scenario runs one arm as the Cotabby inference bench does, and prints its line of JSON.

Exit status: 0, or 1 when an arm failed; with --gate 0 when it is met and 3 when it is not; 130
after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyllamabatch.cli.console import Progress
from pyllamabatch.cli.options import add_model_arguments, at_least, n_bytes
from pyllamabatch.compare import plots, scenario
from pyllamabatch.compare.arms import NAMES, Arm, chosen
from pyllamabatch.compare.case import Case, GgufFile
from pyllamabatch.compare.hosted import probe
from pyllamabatch.compare.loop import CHAIN, FUSED
from pyllamabatch.compare.run import Plan, measure
from pyllamabatch.compare.scenario import SCENARIOS
from pyllamabatch.compare.summary import advice, table
from pyllamabatch.compare.workload import BURST, DS4, POISSON
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.host import usable_cores
from pyllamabatch.models import default_model_path
from pyllamabatch.report import facts
from pyllamabatch.report.records import Record, append

FAILED, NOT_MET, INTERRUPTED = 1, 3, 130
PROTOCOLS = (BURST, DS4, POISSON)
N_DEFAULT = {BURST: "2,4", DS4: "1,2,3,4", POISSON: "4"}
TOKENS_DEFAULT = {BURST: 200, DS4: 300, POISSON: 200}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--gpu-layers", type=int, dest="n_gpu_layers", default=-1, help=argparse.SUPPRESS
    )
    group = parser.add_argument_group("what to run")
    group.add_argument("--protocol", metavar="A,B,…", help=f"of {', '.join(PROTOCOLS)} (burst)")
    group.add_argument("--scenario", choices=tuple(SCENARIOS), help="one arm, one line of JSON")
    group.add_argument("--arms", metavar="A,B,…", help=f"of {', '.join(NAMES)} (all)")
    group.add_argument(
        "-n", "--num-sequences", metavar="N,…",
        help="users at once (burst 2,4; ds4 1,2,3,4; poisson 4; a scenario 2)",
    )  # fmt: skip
    group.add_argument("--prompt-tokens", type=at_least(1), default=256, metavar="N")
    group.add_argument(
        "--sample-tokens", type=at_least(1), metavar="N", help="per answer (200; ds4 300)"
    )
    group.add_argument(
        "--rate", type=float, metavar="R", help="poisson: requests a second, of all users together"
    )
    group.add_argument(
        "--requests", type=at_least(1, 64), default=4, metavar="K", help="poisson: per user (4)"
    )
    group.add_argument("--sampling", choices=("default", "greedy"), default="default")
    group.add_argument(
        "--sampler", default=CHAIN, metavar="A,B",
        help=f"of every arm but the engine: {CHAIN} (libllama's own, the default), {FUSED} (ours)",
    )  # fmt: skip
    group.add_argument("--seed", type=at_least(0, 2**31), default=1, metavar="S")
    group = parser.add_argument_group("contexts")
    group.add_argument(
        "--batch-size", type=at_least(1), default=2048, metavar="N", help="most rows in a step"
    )
    group.add_argument("-ub", "--n-ubatch", type=at_least(1), default=512, metavar="N")
    group.add_argument(
        "--ctx-size", type=at_least(1), metavar="N",
        help="KV cells for each sequence (as many as it needs)",
    )  # fmt: skip
    group.add_argument(
        "--kv", choices=("streams", "unified"), default="streams",
        help="of shared and engine: cells for each sequence, or one pool",
    )  # fmt: skip
    group.add_argument(
        "-t", "--threads", type=at_least(1), default=usable_cores(), metavar="N",
        help="of each arm, divided among contexts that run at once (the usable cores)",
    )  # fmt: skip
    group.add_argument("--oversubscribe", action="store_true", help="all of them for each context")
    group.add_argument(
        "--process-memory", type=n_bytes, default=0, metavar="BYTES",
        help="Linux: heap and anonymous memory of each worker at most (2G, 512Mi)",
    )  # fmt: skip
    group.add_argument(
        "--total-memory", type=n_bytes, default=0, metavar="BYTES",
        help="likewise of all workers, in equal shares",
    )  # fmt: skip
    group = parser.add_argument_group("runs")
    group.add_argument("--repeats", type=at_least(1), metavar="N", help="of each (3; a scenario 1)")
    group.add_argument(
        "--keep-loaded", action="store_true",
        help="open an arm once for all its repeats, beside the others: faster, if there is room",
    )  # fmt: skip
    group.add_argument("--limit", type=float, default=600.0, metavar="S", help="of one run (600)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="FILE", help="JSONL to append rows to")
    group.add_argument("--plot", type=Path, metavar="FILE", help=".png, .svg or .html")
    group.add_argument("--json", action="store_true", help="rows and advice as one JSON object")
    group.add_argument(
        "--gate", type=float, metavar="R",
        help="the engine (if it does not run, shared) must be R times as fast as contexts",
    )  # fmt: skip
    group.add_argument("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    plans = plans_of(args)
    gate = gate_of(args, plans)
    check_output(args)
    about = probe(plans[0].cases[0], args.verbose)
    about["versions"]["commit"] = facts.commit()
    rows: list[Record] = []
    interrupted = False
    try:
        with Progress("compare", _n_runs(plans), quiet=args.quiet) as progress:
            for plan in plans:
                running_now = lambda what: progress.update(len(rows), what)  # noqa: E731
                with closing(measure(plan, about, running_now)) as running:
                    for row in running:
                        rows.append(row)
                        if args.out:
                            append(args.out, [row])
                        progress.update(len(rows))
                        if not args.quiet:
                            progress.note(in_words(row))
    except KeyboardInterrupt:
        interrupted = True
        print("pyllamabatch: interrupted; the rows until here stay", file=sys.stderr)
    ratios = scenario.ratios(rows, *gate) if gate else {}
    show(args, plans, rows, ratios)
    if interrupted:
        return INTERRUPTED
    if args.gate is not None:
        return 0 if scenario.met(ratios, args.gate) else NOT_MET
    return FAILED if any(row.error for row in rows) else 0


# -- from the command line --


def plans_of(args: argparse.Namespace) -> list[Plan]:
    """What is to be run. ArgumentError for what does not fit together."""
    protocols = _names("--protocol", args.protocol or BURST, PROTOCOLS)
    samplers = _names("--sampler", args.sampler, (CHAIN, FUSED))
    kinds = _names("--arms", args.arms, NAMES) if args.arms else list(NAMES)
    if args.scenario:
        if args.arms or protocols != [BURST]:
            raise ArgumentError("--scenario", args.scenario, "says arms and protocol itself")
        kinds = [SCENARIOS[args.scenario]]
        if args.gate is not None and kinds != ["contexts"]:
            kinds.insert(0, "contexts")
        if len(samplers) > 1:
            raise ArgumentError("--sampler", args.sampler, "a scenario has one")
    for name, size in (
        ("--process-memory", args.process_memory),
        ("--total-memory", args.total_memory),
    ):
        if size and (sys.platform != "linux" or "processes" not in kinds):
            raise ArgumentError(name, size, "limits the arm processes, on Linux")
    if args.limit <= 0:
        raise ArgumentError("--limit", args.limit, "seconds, more than 0")
    if POISSON in protocols and not (args.rate and 0 < args.rate < 1e6):
        raise ArgumentError("--rate", args.rate, "poisson needs one: requests a second, above 0")
    return [_plan(args, protocol, chosen(kinds, samplers)) for protocol in protocols]


def _plan(args: argparse.Namespace, protocol: str, arms: list[Arm]) -> Plan:
    tokens = args.sample_tokens or TOKENS_DEFAULT[protocol]
    if protocol == BURST and tokens < 2:
        raise ArgumentError("--sample-tokens", tokens, "at least 2: the first one is not timed")
    if args.ctx_size and args.ctx_size < args.prompt_tokens + tokens:
        limit = f"at least prompt and answer, {args.prompt_tokens + tokens}"
        raise ArgumentError("--ctx-size", args.ctx_size, limit)
    default = "2" if args.scenario else N_DEFAULT[protocol]
    counts = _counts(args.num_sequences or default)
    if args.scenario and len(counts) > 1:
        raise ArgumentError("--num-sequences", args.num_sequences, "a scenario has one")
    if args.batch_size < max(counts):
        raise ArgumentError("--batch-size", args.batch_size, f"a row each, {max(counts)}")
    case = Case(
        model=GgufFile(Path(args.model or default_model_path())),
        pp=args.prompt_tokens,
        tg=tokens - 1 if protocol == BURST else tokens,
        pl=1,
        n_threads=args.threads,
        sampling=args.sampling,
        seed=args.seed,
        kv_unified=args.kv == "unified",
        n_batch=args.batch_size,
        n_ubatch=args.n_ubatch,
        n_gpu_layers=args.n_gpu_layers,
        n_cells=args.ctx_size or 0,
    )
    return Plan(
        protocol=protocol,
        arms=arms,
        cases=[replace(case, pl=n) for n in counts],
        tokens=tokens,
        requests=args.requests if protocol == POISSON else 1,
        rate=args.rate or 0.0,
        repeats=args.repeats or (1 if args.scenario else 3),
        oversubscribe=args.oversubscribe,
        process_memory=args.process_memory,
        total_memory=args.total_memory,
        limit_s=args.limit,
        keep_loaded=args.keep_loaded,
        verbose=args.verbose,
    )


def _names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise ArgumentError(flag, name, f"one of {', '.join(known)}")
    return names


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= 256 for word in words):
        raise ArgumentError("--num-sequences", text, "numbers from 1 to 256, comma separated")
    return sorted({int(word) for word in words})


def gate_of(args: argparse.Namespace, plans: Sequence[Plan]) -> tuple[str, str] | None:
    """The names of the arm that --gate looks at, and of its base."""
    if args.gate is None:
        return None
    if args.gate <= 0:
        raise ArgumentError("--gate", args.gate, "a ratio above 0")
    first = {arm.kind: arm.name for arm in reversed(plans[0].arms)}
    arm = first.get("engine") or first.get("shared")
    if arm is None or "contexts" not in first:
        raise ArgumentError("--gate", args.gate, "needs contexts, and engine or shared")
    if all(case.pl < 2 for plan in plans for case in plan.cases):
        raise ArgumentError("--gate", args.gate, "needs 2 sequences or more")
    return arm, first["contexts"]


def check_output(args: argparse.Namespace) -> None:
    """What can't be written is said before anything runs."""
    if args.plot:
        plots.check(args.plot)
    if args.out:
        try:
            append(args.out, [])
        except OSError as error:
            raise ArgumentError("--out", str(args.out), str(error)) from None


# -- to the reader --


def show(
    args: argparse.Namespace,
    plans: Sequence[Plan],
    rows: Sequence[Record],
    ratios: dict[tuple[str, int], float | None],
) -> None:
    gates = [
        {"bench": bench, "num_sequences": n, "ratio": ratio, "at_least": args.gate}
        for (bench, n), ratio in ratios.items()
    ]
    if args.plot and rows:
        plots.save(rows, args.plot)
    if args.scenario:
        kind = SCENARIOS[args.scenario]
        print(scenario.line(args.scenario, [row for row in rows if row.arm.split()[0] == kind]))
    elif args.json:
        values: dict[str, Any] = {"rows": [json.loads(row.to_json()) for row in rows]}
        print(json.dumps(values | {"advice": advice(rows), "gate": gates}))
    elif rows:
        print(table(rows))
        print("What each time contains:")
        for name, includes in {row.arm: row.includes for row in rows}.items():
            print(f"- {name}: {includes}")
        print(f"\n{advice(rows)}")
    for gate in gates:
        ratio = "no ratio" if gate["ratio"] is None else f"{gate['ratio']:.3f}"
        words = f"gate, {gate['bench']}, {gate['num_sequences']} sequences: {ratio}"
        print(f"{words}, at least {args.gate:g} wanted", file=sys.stderr)


def in_words(row: Record) -> str:
    """One run, for the progress."""
    words = f"N={row.pl:<3} {row.arm:<16} "
    if row.error:
        return f"{words}failed: {row.error.splitlines()[0]}"
    return f"{words}{row.speed_tg:9.1f} tok/s"


def _n_runs(plans: Sequence[Plan]) -> int:
    return sum(1 for plan in plans for _ in plan.runs())
