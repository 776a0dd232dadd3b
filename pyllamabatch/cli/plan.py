"""How many sequences, contexts or processes of a model fit a machine, before anything is loaded.

With a file the sizes are those that llama.cpp itself projects (nothing is allocated); with
--weights they are what you say. Compares one context shared by all sequences, a context each, and a
process each. --measure starts real processes on this machine (Linux) and prints what they share.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from pyllamabatch.cli.options import add_model_arguments, at_least, n_bytes
from pyllamabatch.errors import ArgumentError
from pyllamabatch.models import default_model_path
from pyllamabatch.planner.machines import GIB, MACHINES, Machine, machine
from pyllamabatch.planner.residency import Footprint, Pool, Projector, by_size, most
from pyllamabatch.planner.sharing import Shared, measure

GRAPHS = 10**9  # bytes of a process beside weights and cells, where no file tells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--weights", type=n_bytes, metavar="BYTES", help="instead of a file: 80.8G, 153G, ..."
    )
    parser.add_argument(
        "--kv-per-cell", type=n_bytes, default=0, metavar="BYTES", help="with --weights"
    )
    parser.add_argument(
        "--machine", default="here", metavar="NAME", help=f"here, {', '.join(MACHINES)}"
    )
    parser.add_argument("--memory", type=n_bytes, metavar="BYTES", help="instead of the machine's")
    parser.add_argument(
        "--limit", type=n_bytes, metavar="BYTES",
        help="of the device (a Mac's wired limit), instead of the machine's",
    )  # fmt: skip
    parser.add_argument(
        "-n", "--sequences", type=at_least(1, 256), default=4, metavar="N",
        help="to compare the three for (4)",
    )  # fmt: skip
    parser.add_argument(
        "-c", "--n-ctx", type=at_least(1), default=4096, metavar="N", help="cells each (4096)"
    )
    parser.add_argument("-ub", "--n-ubatch", type=at_least(1), default=512, metavar="N")
    parser.add_argument(
        "--measure", action="store_true", help="with N processes of this machine (Linux)"
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    chosen = machine(args.machine)
    chosen = replace(
        chosen,
        memory=args.memory or chosen.memory,
        device_limit=args.limit or chosen.device_limit,
    )
    if args.weights is not None:
        if args.model is not None or args.measure:
            raise ArgumentError("--weights", args.weights, "goes without -m and --measure")
        found = plan_by_size(args, chosen)
    else:
        found = plan_by_file(args, chosen)
    shared = None
    if args.measure:
        path = args.model or default_model_path()
        shared = measure(path, args.sequences, args.n_ctx, args.n_gpu_layers)
        found["measured"] = [asdict(s) for s in shared]
    print(json.dumps(found) if args.json else "\n".join(lines(found, args, chosen, shared)))
    return 0


def plan_by_size(args: argparse.Namespace, chosen: Machine) -> dict[str, Any]:
    one = by_size(args.weights, args.n_ctx, args.kv_per_cell, GRAPHS, chosen)
    n = args.sequences
    all_of_them = by_size(args.weights, n * args.n_ctx, args.kv_per_cell, GRAPHS, chosen)
    n_ctx = None
    if args.kv_per_cell:
        blocks = most(
            lambda b: by_size(args.weights, 256 * b, args.kv_per_cell, GRAPHS, chosen).check(chosen)
        )
        n_ctx = 256 * blocks
    return verdict(chosen, n, one, all_of_them, n_ctx)


def plan_by_file(args: argparse.Namespace, chosen: Machine) -> dict[str, Any]:
    path = default_model_path() if args.model is None else args.model
    n, params = args.sequences, {"n_ubatch": args.n_ubatch}
    # The devices of this machine say nothing of another one.
    devices: list[str] | None = None if chosen.name == "here" else []
    with Projector(path, n_gpu_layers=args.n_gpu_layers, devices=devices) as projector:

        def footprint(n_ctx: int, n_seq_max: int) -> Footprint:
            found = projector.footprint(n_ctx=n_ctx, n_seq_max=n_seq_max, **params)
            return found if found.device.total else moved(found, chosen)

        trained = projector.model.n_ctx_train
        blocks = most(lambda b: footprint(256 * b, n).check(chosen), -(-n * trained // 256))
        found = footprint(args.n_ctx, 1), footprint(n * args.n_ctx, n)
        return verdict(chosen, n, *found, min(256 * blocks, n * trained))


def moved(found: Footprint, chosen: Machine) -> Footprint:
    """A footprint that was projected without the machine's device, as if all were on it: weights
    are not repacked there, and a GPU has a copy of them."""
    if chosen.kind == "cpu":
        return found
    pool = replace(found.host, copied=0) if found.host.mapped else found.host
    if chosen.kind == "cuda":
        pool = replace(pool, mapped=0, copied=pool.mapped + pool.copied)
    return Footprint(pool, Pool())


def verdict(
    chosen: Machine, n: int, one: Footprint, shared: Footprint, n_ctx: int | None
) -> dict[str, Any]:
    """What fits; bytes throughout. `one`: a context for one sequence; `shared`: for n."""

    def about(found: Footprint, processes: int, contexts: int) -> dict[str, Any]:
        use = found.use(chosen, processes, contexts)
        return {"use": [u for u, _ in use], "fits": all(u <= limit for u, limit in use)}

    return {
        "machine": asdict(chosen),
        "limits": [limit for _, limit in one.use(chosen)],
        "sequences": n,
        "one_process": asdict(one),
        "shared_context": {**asdict(shared), **about(shared, 1, 1)},
        "contexts": about(one, 1, n),
        "processes": about(one, n, 1),
        "max_active_processes": most(lambda k: one.check(chosen, k), 4096),
        "max_contexts": most(lambda k: one.check(chosen, 1, k), 4096),
        "max_n_ctx": n_ctx,
    }


def lines(
    found: dict[str, Any],
    args: argparse.Namespace,
    chosen: Machine,
    shared: list[Shared] | None,
) -> list[str]:
    """The plan for people to read."""
    one, n = found["one_process"], found["sequences"]
    places = ["host memory"] if chosen.kind == "cpu" else ["device", "host memory"]
    limits = ", ".join(
        f"{name} {limit / GIB:.2f} GiB" for name, limit in zip(places, found["limits"], strict=True)
    )
    out = [f"{chosen.name} ({chosen.kind}): {limits}; {chosen.source}"]
    for place in ("device", "host"):
        if any(one[place].values()):
            sizes = ", ".join(f"{k} {v / GIB:.3f}" for k, v in one[place].items() if v)
            out.append(f"a process with {args.n_ctx} cells, {place}: {sizes} GiB")
    out.append(f"{n} sequences of {args.n_ctx} cells:")
    for name, key in (
        ("one shared context", "shared_context"),
        (f"{n} contexts in a process", "contexts"),
        (f"{n} active processes", "processes"),
    ):
        use = ", ".join(
            f"{place} {u / GIB:.2f}" for place, u in zip(places, found[key]["use"], strict=True)
        )
        out.append(f"  {name}: {use} GiB, {'fits' if found[key]['fits'] else 'does not fit'}")
    out.append(
        f"at most {found['max_active_processes']} active processes, "
        f"{found['max_contexts']} contexts in one"
    )
    if found["max_n_ctx"] is not None:
        out.append(f"one context of {n} sequences: n_ctx up to {found['max_n_ctx']:,}")
    out += [
        f"measured, {s.n} {s.state}: RSS {s.rss / GIB:.3f}, PSS {s.pss / GIB:.3f}, "
        f"shared {s.shared / GIB:.3f} GiB in sum; planned {s.planned / GIB:.3f} GiB"
        for s in shared or ()
    ]
    return out
