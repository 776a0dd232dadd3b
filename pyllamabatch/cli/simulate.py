"""Run a trace of requests through the engine's own scheduler, in virtual time.

The time of a step is that of a profile: of the last `pyllamabatch calibrate`,
or one that is shipped. No model is loaded. Several policies run the same trace,
side by side.

--trace takes a file (Azure's .csv, Mooncake's .jsonl, ShareGPT's .json) or
draws one:
  poisson:rate=4,n=1000,prompt=100-900,output=128
  gamma:rate=4,cv=3,…
  closed:clients=16,…
"""

import argparse
import json
import sys
from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pyllamabatch.cli.console import say, show
from pyllamabatch.cli.options import N_TRACE, add_shared, at_least, check_writable, router_named
from pyllamabatch.cost.kernels import is_cuda
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import load_profile, shipped_names
from pyllamabatch.engine.context_defaults import ubatch
from pyllamabatch.engine.on_machine import lay_out_on
from pyllamabatch.errors import ArgumentError
from pyllamabatch.kv import Preemption, SwapChoice
from pyllamabatch.report.plots import styled
from pyllamabatch.scheduler import make_policy
from pyllamabatch.scheduler.policies import DEFAULT
from pyllamabatch.scheduler.router import DEFAULT_ROUTER, ROUTERS
from pyllamabatch.sim import (
    EngineSpec,
    at_load,
    draw_acceptance,
    load_acceptance,
    load_trace,
    parse_slo,
    report,
    simulate,
)
from pyllamabatch.sim.replica import OVERHEAD
from pyllamabatch.step.native import default_gap_max
from pyllamabatch.step.trace import to_chrome

SETTINGS = (
    *("trace", "profile", "slo", "seed", "requests", "rate", "load", "n_seq_max", "n_ctx"),
    "acceptance",
    *("n_batch", "n_ubatch", "kv_unified", "prefix_cache", "batch_invariant"),
    *("overhead", "latency", "replicas", "router"),
)
"""What the reports say of a run."""


# fmt: off


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--profile", metavar="NAME|FILE",
        help="step times: a file, a saved profile (the one of the last `calibrate`), or "
        + ", ".join(shipped_names()))
    add("--trace", required=True, metavar="FILE|SPEC", help="the requests")
    add("--load", type=float, metavar="SHARE",
        help="stretch arrivals to this share of what the engines can do; above 1 they are "
        "overloaded")
    add("--policy", default=DEFAULT, metavar="A,B,…",
        help=f"policies, each NAME, module:name or file.py:name with options as in "
        f"slo:margin=0.8 ({DEFAULT})")
    add("--slo", default="", metavar="ttft=S,itl=S", help="targets; also tpot and e2el")
    add("--seed", type=int, default=0, metavar="S", help="of a drawn trace (0)")
    add("--requests", type=at_least(1), metavar="N", help="the first N of the trace")
    add("--rate", type=float, metavar="R", help="requests a second, instead of a file's own times")
    add("--acceptance", metavar="P|P-Q|FILE",
        help="engines that speculate: the probability that the next drafted token of a request is "
        "right, where the trace does not say; the same for all, uniform, or as the requests had it "
        "that `generate` wrote to FILE")
    add = parser.add_argument_group("engines").add_argument
    add("-s", "--n-seq-max", type=at_least(1, 256), default=16, metavar="N",
        help="requests that run at once (16)")
    add("-c", "--n-ctx", type=at_least(1), default=32768, metavar="N", help="KV cells (32768)")
    add_shared(add, n_batch=2048, n_ubatch=None, kv_unified=None, prefix_cache=True,
               batch_invariant=False)
    add("--overhead", type=float, default=OVERHEAD, metavar="S",
        help=f"seconds of a call beside its steps ({OVERHEAD})")
    add("--latency", type=float, default=0.0, metavar="S",
        help="seconds of a request on its way to the engine and back, a server's or a fleet's (0)")
    add("--replicas", type=at_least(1, 10000), default=1, metavar="N", help="equal engines (1)")
    add("--router", default=DEFAULT_ROUTER, type=router_named, choices=tuple(ROUTERS),
        help=f"which of them gets a request ({DEFAULT_ROUTER})")
    add = parser.add_argument_group("output").add_argument
    add("--jsonl", type=Path, metavar="FILE", help="figures and every request")
    add("--markdown", type=Path, metavar="FILE", help="the table")
    add("--html", type=Path, metavar="FILE", help="with plots; needs matplotlib")
    add("--steps", type=Path, metavar="FILE",
        help=f"the last {N_TRACE} steps of one policy and one engine, for `pyllamabatch view` and "
        "https://ui.perfetto.dev")
    add("--json", action="store_true", help="print the figures as JSON")


# fmt: on
def run(args: argparse.Namespace) -> int:
    slo = parse_slo(args.slo)
    policies = split_policies(args.policy)
    for policy in policies:
        make_policy(policy)  # what is wrong with one is said before anything runs
    for name in ("overhead", "latency"):
        if not 0 <= (seconds := getattr(args, name)) < inf:
            raise ArgumentError(name, seconds, "seconds, at least 0")
    if args.steps is not None and (len(policies) > 1 or args.replicas > 1):
        raise ArgumentError("--steps", str(args.steps), "one policy and one replica")
    if args.html is not None:
        with styled():
            pass  # without matplotlib, likewise
    check_writable(args.steps, args.jsonl, args.markdown, args.html)
    requests = load_trace(args.trace, seed=args.seed, n=args.requests, rate=args.rate)
    requests = [  # for policies that look at them
        replace(
            r,
            ttft_target=slo.get("ttft") if r.ttft_target is None else r.ttft_target,
            itl_target=slo.get("itl") if r.itl_target is None else r.itl_target,
        )
        for r in requests
    ]
    if args.acceptance is not None:
        is_file = Path(args.acceptance).is_file()
        acceptance = load_acceptance(args.acceptance) if is_file else args.acceptance
        requests = draw_acceptance(requests, acceptance, args.seed)
    speculate = any(r.acceptance is not None for r in requests)
    if speculate and args.batch_invariant:
        raise ArgumentError(
            "acceptance", args.acceptance or args.trace, "none with batch_invariant"
        )
    profile = load_profile(args.profile)
    cuda, on_gpu = is_cuda(profile.key.backend), not profile.key.backend.startswith("CPU")
    args.n_ubatch = ubatch(args.n_ubatch, cuda=cuda, free=inf).value
    n = args.n_seq_max
    asked: Any = SimpleNamespace(
        n_seq_max=n, prefix_cache=args.prefix_cache, batch_invariant=args.batch_invariant,
        cost="auto",
    )  # fmt: skip
    params = {name: getattr(args, name) for name in ("n_ctx", "n_batch", "n_ubatch")}
    params["kv_unified"] = "auto" if args.kv_unified is None else args.kv_unified
    layout, given = lay_out_on(profile, asked, params)
    args.kv_unified, args.n_batch = given["kv_unified"], given["n_batch"]
    args.n_ubatch = min(args.n_ubatch, args.n_batch)

    def spec_of(unified: bool, n_cells: int) -> EngineSpec:
        cost = CostModel.fit(profile, unified=unified, n_ubatch=args.n_ubatch)
        if unified and not on_gpu:
            cost.switch = 0.0  # who decodes is no matter to a graph in a pool
        spec = EngineSpec.of(
            cost, n_seq_max=n, n_cells=n_cells, n_batch=args.n_batch, n_ubatch=args.n_ubatch,
            unified=unified, prefix_cache=args.prefix_cache, overhead=args.overhead,
            gap_max=default_gap_max(streams=not unified, on_gpu=on_gpu),
            batch_invariant=args.batch_invariant, speculate=speculate,
        )  # fmt: skip
        spec = replace(spec, latency=args.latency)
        if profile.cell_bytes:
            cells = spec.limits.n_cells_seq
            mode: Preemption = "swap" if args.batch_invariant else "auto"
            swap = SwapChoice.of_cells(mode, profile.cell_bytes, cells, on_gpu=on_gpu)
            spec = replace(spec, swap=swap)
        return spec

    n_cells = given["n_ctx"] if args.kv_unified else given["n_ctx"] // given["n_seq_max"] * n
    spec = spec_of(args.kv_unified, n_cells)
    if layout.pool:
        spec = replace(spec, pool=spec_of(True, layout.pool))
    fleet: dict[str, Any] = {"n_replicas": args.replicas, "router": args.router}
    if args.load is not None:
        requests = at_load(requests, spec, policies[0], args.load, **fleet)
    n_trace = 0 if args.steps is None else N_TRACE
    runs = [simulate(requests, spec, policy, n_trace=n_trace, **fleet) for policy in policies]
    summaries = {run.policy: run.summary(slo) for run in runs}
    trace = Path(args.trace).name if Path(args.trace).is_file() else args.trace
    title = f"{trace} on {profile.key.device}, {profile.about.get('model') or 'unknown model'}"
    markdown = report.markdown(summaries, title)
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.json:
        print(json.dumps(summaries))
    elif sys.stdout.isatty():
        say(f"{title}\n")
        show(report.table(summaries))
        say("\n".join(["", *report.verdict(summaries)]))
    else:
        print(markdown, end="")
    if args.jsonl is not None:
        lines = report.jsonl(runs, summaries, settings)
        args.jsonl.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if args.steps is not None:
        to_chrome(runs[0].traces[0], args.steps)
    if args.markdown is not None:
        args.markdown.write_text(markdown, encoding="utf-8")
    if args.html is not None:
        args.html.write_text(report.page(runs, summaries, title, settings), encoding="utf-8")
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
