"""Run a trace of requests through the engine's own scheduler, in virtual time.

The time of a step is that of a profile (`pyllamabatch calibrate`, or one that is shipped); no model
is loaded. Several policies run the same trace, side by side. --trace takes a file (Azure's .csv,
Mooncake's .jsonl, ShareGPT's .json) or draws one: poisson:rate=4,n=1000,prompt=100-900,output=128;
gamma:rate=4,cv=3,…; closed:clients=16,…. With --validate the trace also runs live, in real time, on
the model of -m, in segments with a probe of the device's speed between them; beside that, with the
errors, stands the simulation. Choose a load below saturation (--load 0.6), where a step that takes
3 % longer is no queue that is 50 % longer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamabatch.cli.options import add_model_arguments, at_least, load_model
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import Profile, shipped_names, shipped_profile
from pyllamabatch.errors import ArgumentError
from pyllamabatch.scheduler import make_policy
from pyllamabatch.scheduler.policies import DEFAULT
from pyllamabatch.sim import ROUTERS, Machine, Request, load_trace, parse_slo, report, simulate
from pyllamabatch.sim.load import at_load
from pyllamabatch.sim.replica import OVERHEAD

if TYPE_CHECKING:
    from pyllamabatch.llama.model import Model

NAME = "simulate"
HELP = "a trace of requests in virtual time: policies side by side"
N_TRACE = 2**16  # steps of a segment that runs live

SETTINGS = (
    *("trace", "profile", "slo", "seed", "requests", "rate", "load", "n_seq_max", "n_ctx"),
    *("n_batch", "n_ubatch", "kv_unified", "prefix_cache", "overhead", "replicas", "router"),
)
"""What the reports say of a run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        metavar="NAME|FILE",
        help=f"step times: a file, or {', '.join(shipped_names())}",
    )
    parser.add_argument("--trace", required=True, metavar="FILE|SPEC")
    parser.add_argument(
        "--load", type=float, metavar="SHARE",
        help="stretch arrivals to this share of the requests that the machine can end in a second",
    )  # fmt: skip
    parser.add_argument(
        "--policy", default=DEFAULT, metavar="A,B,…", help="with options: sarathi,slo:margin=0.8"
    )
    parser.add_argument(
        "--slo", type=str, default="", metavar="ttft=S,itl=S", help="targets; also tpot, e2el"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--requests", type=at_least(1), metavar="N", help="the first N of the trace"
    )
    parser.add_argument(
        "--rate", type=float, metavar="R", help="requests a second, instead of a file's own times"
    )
    group = parser.add_argument_group("engines")
    group.add_argument("-s", "--n-seq-max", type=at_least(1, 256), default=16, metavar="N")
    group.add_argument(
        "-c", "--n-ctx", type=at_least(1), default=32768, metavar="N", help="KV cells (32768)"
    )
    group.add_argument("-b", "--n-batch", type=at_least(1), default=2048, metavar="N")
    group.add_argument("-ub", "--n-ubatch", type=at_least(1), default=512, metavar="N")
    group.add_argument("--kv-unified", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument(
        "--prefix-cache", action=argparse.BooleanOptionalAction,
        help="keep what requests leave behind (where cells are unified)",
    )  # fmt: skip
    group.add_argument(
        "--overhead", type=float, metavar="S",
        help=f"of a call beside its steps ({OVERHEAD}; with --validate, what is measured)",
    )  # fmt: skip
    group.add_argument("--replicas", type=at_least(1, 10000), default=1, metavar="N")
    group.add_argument("--router", default="least-outstanding", choices=tuple(ROUTERS))
    group = parser.add_argument_group("output")
    group.add_argument("--jsonl", type=Path, metavar="FILE", help="figures and every request")
    group.add_argument("--markdown", type=Path, metavar="FILE")
    group.add_argument("--html", type=Path, metavar="FILE", help="with plots; needs matplotlib")
    group.add_argument("--json", action="store_true", help="print the figures as JSON")
    group = parser.add_argument_group("live")
    group.add_argument("--validate", action="store_true", help="live, too: one policy")
    group.add_argument(
        "--segments", type=at_least(1, 1000), default=6, metavar="N", help="with probes between (6)"
    )
    group.add_argument("-t", "--threads", type=at_least(1), metavar="N", help="CPU threads")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    slo = parse_slo(args.slo)
    policies = split_policies(args.policy)
    for policy in policies:
        make_policy(policy)  # what is wrong with one is said before anything runs
    if args.overhead is not None and not 0 <= args.overhead < inf:
        raise ArgumentError("overhead", args.overhead, "seconds, at least 0")
    if args.validate:
        return validate(args, policies)
    requests = load_trace(args.trace, seed=args.seed, n=args.requests, rate=args.rate)
    if "itl" in slo:  # for policies that look at it
        requests = [replace(r, itl_target=r.itl_target or slo["itl"]) for r in requests]
    machine = Machine.of(
        cost_of(args),
        n_seq_max=args.n_seq_max,
        n_cells=args.n_ctx,
        n_batch=args.n_batch,
        n_ubatch=args.n_ubatch,
        unified=args.kv_unified,
        prefix_cache=args.prefix_cache,
        overhead=OVERHEAD if args.overhead is None else args.overhead,
    )
    if args.load is not None:
        requests = at_load(requests, machine, policies[0], args.load)
    runs = [
        simulate(requests, machine, policy, n_replicas=args.replicas, router=args.router)
        for policy in policies
    ]
    summaries = {run.policy: run.summary(slo) for run in runs}
    title = f"{args.trace} on {args.profile}"
    text = report.markdown(summaries, title)
    print(json.dumps(summaries) if args.json else text, end="\n" if args.json else "")
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.jsonl is not None:
        _write(args.jsonl, "".join(f"{line}\n" for line in report.jsonl(runs, summaries, settings)))
    if args.markdown is not None:
        _write(args.markdown, text)
    if args.html is not None:
        from pyllamabatch.sim import plots

        _write(args.html, report.page(summaries, title, settings, plots.draw(runs)))
    return 0


def split_policies(text: str) -> list[str]:
    """ "a,b:x=1,y=2,c" is a, b:x=1,y=2 and c. ArgumentError when one is there twice."""
    found: list[str] = []
    for item in text.split(","):
        if found and "=" in item and ":" not in item.partition("=")[0]:
            found[-1] += f",{item}"
        else:
            found.append(item)
    if len(set(found)) < len(found):
        raise ArgumentError("--policy", text, "every one once")
    return found


def cost_of(args: argparse.Namespace) -> CostModel:
    """ArgumentError for a profile that was not measured."""
    if args.profile is None:
        raise ArgumentError("--profile", None, "a file of `pyllamabatch calibrate`, or a name")
    shipped = args.profile in shipped_names()
    profile = shipped_profile(args.profile) if shipped else Profile.load(args.profile)
    return CostModel.fit(profile, unified=args.kv_unified, n_ubatch=args.n_ubatch)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError("file", str(path), str(error)) from None


# -- live


def validate(args: argparse.Namespace, policies: Sequence[str]) -> int:
    """The trace live and simulated; 1 when the simulation is not within its bounds."""
    from pyllamabatch.sim import live
    from pyllamabatch.sim import validate as validation

    if len(policies) > 1 or args.replicas > 1:
        raise ArgumentError("--validate", args.policy, "one policy, one replica")
    with load_model(args) as model:
        requests = _requests(args, model)
        with _engine(args, model, policies[0]) as engine:
            validator = validation.Validator(engine, policies[0], args.overhead)
            if args.load is not None:
                requests = at_load(requests, validator.machine(), policies[0], args.load)
            n = 1 if args.prefix_cache else args.segments  # what is kept would go on to the next
            found = validator.run(
                validation.split(requests, n),
                lambda text: print(text, file=sys.stderr, flush=True),
            )
            about = live.describe(engine)
    met = validation.within(found)
    if args.json:
        figures = {
            "live": found.live, **found.simulated, "errors": found.errors,
            "probes": [speed._asdict() for speed in found.speeds], "within": met,
        }  # fmt: skip
        print(json.dumps(figures))
        return 0 if all(met.values()) else 1
    load = f" at {args.load:g} of what the profile says it can do" if args.load else ""
    cells = "shared cells" if args.kv_unified else "cells of each sequence's own"
    text = (
        f"{about}: {args.trace}{load}, {len(requests)} requests, {args.n_seq_max} sequences, "
        f"{cells}, {policies[0]}\n\n{validation.comparison(found)}\n{validation.drift(found)}\n"
        f"{validation.step_table(found)}"
    )
    print(text, end="")
    if args.markdown is not None:
        _write(args.markdown, text)
    return 0 if all(met.values()) else 1


def _requests(args: argparse.Namespace, model: Model) -> list[Request]:
    def count(text: str) -> int:
        return max(1, len(model.vocab.tokenize(text, add_special=False)))

    return load_trace(args.trace, seed=args.seed, n=args.requests, rate=args.rate, count=count)


def _engine(args: argparse.Namespace, model: Model, policy: str) -> Any:
    from pyllamabatch.engine.engine import Engine

    threads = {}
    if args.threads is not None:
        threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    return Engine(
        model,
        n_seq_max=args.n_seq_max,
        n_ctx=args.n_ctx,
        n_batch=args.n_batch,
        n_ubatch=args.n_ubatch,
        kv_unified=args.kv_unified,
        prefix_cache=bool(args.prefix_cache),
        policy=make_policy(policy),
        n_trace=N_TRACE,
        **threads,
    )
