"""Serve N users in four ways on this machine, side by side, and say what to use.

processes: a server each (`pyllamabatch serve`), behind a round-robin router. contexts: a context
and a thread each, in one process. shared: one context, one batch per step, a plain loop. engine:
the Engine, a thread per client. single: one user alone, the base. replicas, where it is asked for:
as processes, on Ray Serve. All on the same model, prompts of random tokens, sampling and lengths;
docs/how-to/serve-n-users.md says what each time contains.

--protocol burst (the default) times decoding alone; ds4 fires identical completions at once,
prompts included; poisson lets requests come at random, --rate a second. Several, comma separated,
run one after the other. Ctrl-C ends every process and keeps the rows that are done.

--scenario runs one arm as the Cotabby inference bench does, and prints its line of JSON.

Exit status: 0, or 1 when an arm failed; with --gate 0 when it is met and 3 when it is not; 130
after Ctrl-C."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyllamabatch.cli.console import ProgressBar, say
from pyllamabatch.cli.options import (
    add_model_arguments,
    add_shared,
    at_least,
    check_writable,
    counts,
    model_path,
    n_bytes,
    names,
    positive,
)
from pyllamabatch.compare import plots
from pyllamabatch.compare.advice import advice
from pyllamabatch.compare.arms import ARMS, ON_RAY
from pyllamabatch.compare.case import Case, ModelFile
from pyllamabatch.compare.hosted import probe
from pyllamabatch.compare.run import Experiment, measure
from pyllamabatch.compare.scenario import SCENARIOS, gate, line
from pyllamabatch.compare.summary import plain
from pyllamabatch.compare.workload import BURST, DS4, POISSON
from pyllamabatch.engine.drafters import make_drafter
from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.machine.profile_machine import ProfileMachine
from pyllamabatch.models import default_model_path
from pyllamabatch.report import facts
from pyllamabatch.report.disturbed import warning
from pyllamabatch.report.records import Record, append
from pyllamabatch.report.tables import in_words

FAILED, NOT_MET, INTERRUPTED = 1, 3, 130
TRIES = 3  # of a run that others disturb
USERS = {BURST: [2, 4], DS4: [1, 2, 3, 4], POISSON: [4]}
TOKENS = {BURST: 200, DS4: 300, POISSON: 200}
# fmt: off


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--gpu-layers", type=int, dest="n_gpu_layers", default=-1,
                        help=argparse.SUPPRESS)
    add = parser.add_argument_group("what to run").add_argument
    add("--protocol", type=names(tuple(USERS)), default=[BURST], metavar="A,B,…",
        help=f"of {', '.join(USERS)} (burst)")
    add("--scenario", choices=tuple(SCENARIOS), help="one arm, one line of JSON")
    add("--arms", type=names((*ARMS, ON_RAY.name)), metavar="A,B,…",
        help=f"of {', '.join(ARMS)} (all), and of {ON_RAY.name} (extra `ray`)")
    add("-n", "--num-sequences", type=counts, metavar="N,…",
        help="users at once (burst 2,4; ds4 1,2,3,4; poisson 4; a scenario 2)")
    add("--prompt-tokens", type=at_least(1), default=256, metavar="N")
    add("--sample-tokens", type=at_least(1), metavar="N", help="per answer (200; ds4 300)")
    add("--rate", type=positive, metavar="R",
        help="poisson: requests a second, of all users together")
    add("--requests", type=at_least(1, 64), default=4, metavar="K", help="poisson: per user (4)")
    add("--sampling", choices=("default", "greedy"), default="default")
    add("--seed", type=at_least(0, 2**31), default=1, metavar="S")
    add = parser.add_argument_group("contexts").add_argument
    add("--batch-size", type=at_least(1), default=2048, metavar="N", help="most rows in a step")
    add("-ub", "--n-ubatch", type=at_least(1), default=512, metavar="N")
    add("--ctx-size", type=at_least(1), default=0, metavar="N",
        help="KV cells for each sequence (as many as it needs)")
    add("--kv", choices=("streams", "unified"), default="streams",
        help="of shared and engine: cells for each sequence, or one pool")
    add("-t", "--threads", type=at_least(1), metavar="N",
        help="of each arm, divided among contexts that run at once (the usable cores; 1 where a "
             "device computes all layers)")
    add("--oversubscribe", action="store_true", help="all of them for each context")
    add("--machine", metavar="PROFILE",
        help="on a machine of which only this profile is there: a name or a file")
    add("--total-memory", type=n_bytes, default=0, metavar="BYTES",
        help="Linux: heap and anonymous memory of all workers at most, in equal shares (2G, 512Mi)")
    add_shared(add, speculate=None)
    add = parser.add_argument_group("runs").add_argument
    add("--repeats", type=at_least(1), metavar="N", help="of each (3; a scenario 1)")
    add("--keep-loaded", action="store_true",
        help="open an arm once for all its repeats, beside the others: faster, if there is room")
    add("--limit", type=positive, default=600.0, metavar="S", help="of one run (600)")
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="FILE", help="JSONL to append records to")
    add("--plot", type=Path, metavar="FILE", help=".png, .svg or .html")
    add("--json", action="store_true", help="records and advice as one JSON object")
    add("--gate", type=positive, metavar="R",
        help="the engine (if it does not run, shared) must be R times as fast as contexts")
    add("-q", "--quiet", action="store_true", help="no progress")


# fmt: on
def run(args: argparse.Namespace) -> int:
    arms = check(args)
    experiments = [experiment(args, protocol, arms) for protocol in args.protocol]
    about, threads = probe(experiments[0].cases[0], args.verbose)
    if args.threads is None:
        experiments = [
            replace(each, cases=[replace(case, n_threads=threads) for case in each.cases])
            for each in experiments
        ]
    about["versions"]["commit"] = facts.commit()
    if args.machine:
        about |= ProfileMachine.named(args.machine).facts()
    records: list[Record] = []
    interrupted = False
    n_runs = sum(1 for each in experiments for _ in each.runs())
    with ProgressBar("compare", n_runs, quiet=args.quiet) as progress:
        try:
            for each in experiments:
                with closing(
                    measure(each, about, lambda what: progress.update(len(records), what))
                ) as measured:
                    for record in measured:
                        records.append(record)
                        if args.out:
                            append(args.out, [record])
                        if not args.quiet:
                            progress.note(f"N={record.pl:<3} {in_words(record)}")
        except KeyboardInterrupt:
            interrupted = True
            say("pyllamabatch: interrupted; the records until here stay", sys.stderr)
    gated = "engine" if "engine" in arms else "shared"
    judged = gate(records, gated, args.gate) if args.gate else []
    show(args, records, judged)
    if interrupted:
        return INTERRUPTED
    if args.gate:
        return 0 if judged and all(one["met"] for one in judged) else NOT_MET
    return FAILED if any(record.error for record in records) else 0


def check(args: argparse.Namespace) -> list[str]:
    """The names of the arms. ArgumentError for what does not fit together, before anything
    runs; what a scenario says itself is set."""
    arms = args.arms or list(ARMS)
    if args.scenario:
        if args.arms or args.protocol != [BURST] or len(args.num_sequences or [2]) > 1:
            raise ArgumentError(
                "--scenario", args.scenario, "says --arms, --protocol; has one --num-sequences"
            )
        arms = [*(["contexts"] if args.gate else []), SCENARIOS[args.scenario]]
        arms = list(dict.fromkeys(arms))
        args.num_sequences, args.repeats = args.num_sequences or [2], args.repeats or 1
    for arm, extra, module in (("processes", "compare", "uvicorn"), (ON_RAY.name, "ray", "ray")):
        if arm in arms and find_spec(module) is None:
            what = f"the arm {arm} needs the extra {extra}: pip install 'pyllamabatch[{extra}]'"
            raise UnsupportedOperation(what)
    if args.total_memory and (sys.platform != "linux" or "processes" not in arms):
        raise ArgumentError("--total-memory", args.total_memory, "limits processes, on Linux")
    if POISSON in args.protocol and args.rate is None:
        raise ArgumentError("--rate", args.rate, "poisson needs one: requests a second")
    if args.speculate not in (None, "off"):
        make_drafter(args.speculate)
        if "engine" not in arms:
            raise ArgumentError("--speculate", args.speculate, "is for the arm engine")
    if args.machine:
        ProfileMachine.named(args.machine)  # what is wrong with it is said before anything runs
    if args.gate:
        users = [n for protocol in args.protocol for n in args.num_sequences or USERS[protocol]]
        if "contexts" not in arms or not {"engine", "shared"} & set(arms) or max(users) < 2:
            raise ArgumentError(
                "--gate", args.gate, "needs contexts, engine or shared, and 2 sequences"
            )
    if args.plot:
        plots.check(args.plot)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(args.out, args.plot)
    return arms


def experiment(args: argparse.Namespace, protocol: str, arms: Sequence[str]) -> Experiment:
    tokens = args.sample_tokens or TOKENS[protocol]
    users = args.num_sequences or USERS[protocol]
    if protocol == BURST and tokens < 2:
        raise ArgumentError("--sample-tokens", tokens, "at least 2: the first one is not timed")
    if 0 < args.ctx_size < args.prompt_tokens + tokens:
        limit = f"at least prompt and answer, {args.prompt_tokens + tokens}"
        raise ArgumentError("--ctx-size", args.ctx_size, limit)
    if args.batch_size < max(users):
        raise ArgumentError("--batch-size", args.batch_size, f"a row each, {max(users)}")
    case = Case(
        model=ModelFile(model_path(args) or default_model_path()),
        pp=args.prompt_tokens,
        tg=tokens - 1 if protocol == BURST else tokens,
        pl=1,
        n_threads=args.threads or 0,
        sampling=args.sampling,
        seed=args.seed,
        kv_unified=args.kv == "unified",
        n_batch=args.batch_size,
        n_ubatch=args.n_ubatch,
        n_gpu_layers=args.n_gpu_layers,
        n_cells=args.ctx_size,
        machine=args.machine or "",
        speculate="" if args.speculate in (None, "off") else args.speculate,
    )
    return Experiment(
        protocol=protocol,
        arms=[ARMS.get(name, ON_RAY) for name in arms],
        cases=[replace(case, pl=n) for n in users],
        tokens=tokens,
        requests=args.requests if protocol == POISSON else 1,
        rate=args.rate or 0.0,
        repeats=args.repeats or 3,
        oversubscribe=args.oversubscribe,
        total_memory=args.total_memory,
        limit_s=args.limit,
        tries=TRIES,
        keep_loaded=args.keep_loaded,
        verbose=args.verbose,
    )


def show(
    args: argparse.Namespace, records: Sequence[Record], judged: Sequence[dict[str, Any]]
) -> None:
    if args.plot and records:
        plots.save(records, args.plot)
    if args.scenario:
        print(line(args.scenario, records))
    elif args.json:
        rows = [json.loads(record.to_json()) for record in records]
        print(json.dumps({"rows": rows, "advice": advice(records), "gate": judged}))
    elif records:
        print(plain(records))
        say(advice(records))
    for one in judged:
        ratio = "no ratio" if one["ratio"] is None else f"{one['ratio']:.3f}"
        words = f"gate, {one['bench']}, {one['num_sequences']} sequences: {ratio}"
        say(f"{words}, at least {one['at_least']:g} wanted", sys.stderr)
    without_advice = args.scenario and any(one["ratio"] is None for one in judged)
    if without_advice and (told := warning(records)):
        say(told, sys.stderr)
