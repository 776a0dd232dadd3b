"""How many sequences, contexts or processes of a model fit a machine, before
anything is loaded.

With a file, the sizes are those that llama.cpp itself projects; nothing is
allocated. With --weights, they are what you say. One context shared by all
sequences, a context each, and a process each are compared. --measure starts
real processes on this machine (Linux) and prints what they share."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from pyllamabatch.cli.console import say
from pyllamabatch.cli.options import add_model_arguments, add_shared, at_least, model_path, n_bytes
from pyllamabatch.compare.sharing import measure
from pyllamabatch.engine.context_defaults import cuda_gpus, ubatch
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.model import Model
from pyllamabatch.models import default_model_path
from pyllamabatch.planner.machines import GIB, NAMES, Machine, machine
from pyllamabatch.planner.residency import Footprint, MemoryPool, Projector, by_size, most
from pyllamabatch.report.tables import Table

GRAPHS = 10**9  # bytes of a process beside weights and cells, where no file tells
BLOCK = 256  # cells: n_ctx is a multiple of it
MOST_BLOCKS = 2**60  # of which each takes a byte at least: no machine has room for so many

Sizes = Callable[[int, int], Footprint]
"""What a context takes, by n_ctx and n_seq_max."""


# fmt: off


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--weights", type=n_bytes, metavar="BYTES", help="instead of a file: 80.8G, 153G, ...")
    add("--kv-per-cell", type=n_bytes, default=0, metavar="BYTES", help="with --weights")
    add("--machine", default="here", metavar="NAME", help=NAMES)
    add("--memory", type=n_bytes, metavar="BYTES", help="instead of the machine's")
    add("--limit", type=n_bytes, metavar="BYTES",
        help="of the device (a Mac's wired limit), instead of the machine's")
    add("-n", "--sequences", type=at_least(1, 256), default=4, metavar="N",
        help="to compare the three for (4)")
    add("-c", "--n-ctx", type=at_least(1), default=4096, metavar="N",
        help="KV cells of each sequence (4096)")
    add_shared(add, n_ubatch=None)
    add("--measure", action="store_true", help="with N processes of this machine (Linux)")
    add("--json", action="store_true", help="one JSON object, sizes in bytes")


# fmt: on
def run(args: argparse.Namespace) -> int:
    chosen = machine(args.machine)
    if args.limit is not None and chosen.kind == "cpu":
        raise ArgumentError(
            "--limit", args.limit, "a device's, and this machine has none: --memory"
        )
    if args.kv_per_cell and args.weights is None:
        raise ArgumentError("--kv-per-cell", args.kv_per_cell, "goes with --weights")
    given = {"memory": args.memory, "device_limit": args.limit}
    chosen = replace(chosen, **{name: n for name, n in given.items() if n is not None})
    model_named = args.model is not None or args.hf_repo is not None
    if args.weights is not None and (model_named or args.measure):
        raise ArgumentError("--weights", args.weights, "goes without -m, -hf and --measure")
    with sizes_of(args, chosen) as (sizes, trained):
        found = plan(chosen, sizes, trained, args.sequences, args.n_ctx)
    if args.measure:
        path = model_path(args) or default_model_path()
        shared = measure(path, args.sequences, args.n_ctx, args.n_gpu_layers)
        found["measured"] = [asdict(s) for s in shared]
    if args.json:
        print(json.dumps(found))
    else:
        say(in_words(found, args.n_ctx))
    return 0


@contextmanager
def sizes_of(args: argparse.Namespace, chosen: Machine) -> Iterator[tuple[Sizes, int]]:
    """The sizes, and the positions that the model was trained on (0: not known)."""
    if args.weights is not None:
        yield lambda n_ctx, _: by_size(args.weights, n_ctx, args.kv_per_cell, GRAPHS, chosen), 0
        return
    path = model_path(args) or default_model_path()
    # The devices of this machine say nothing of another one.
    devices: list[str] | None = None if chosen.name == "here" else []
    with Projector(path, n_gpu_layers=args.n_gpu_layers, devices=devices) as projector:
        rows = n_ubatch(args.n_ubatch, chosen, projector.model)

        def sizes(n_ctx: int, n_seq_max: int) -> Footprint:
            found = projector.footprint(n_ctx=n_ctx, n_seq_max=n_seq_max, n_ubatch=rows)
            return found if found.device.total else moved(found, chosen)

        yield sizes, projector.model.n_ctx_train


def n_ubatch(given: int | None, chosen: Machine, model: Model) -> int:
    """As an engine on that machine has it."""
    cuda = bool(cuda_gpus(model)) if chosen.name == "here" else chosen.kind == "cuda"
    free = chosen.device_limit - chosen.process_overhead - model.size_bytes
    return ubatch(given, cuda=cuda, n_embd=model.n_embd, free=free).value


def moved(found: Footprint, chosen: Machine) -> Footprint:
    """A footprint that was projected without the machine's device, as if all were on it: weights
    are not repacked there, and a GPU has a copy of them."""
    if chosen.kind == "cpu":
        return found
    pool = replace(found.host, copied=0) if found.host.mapped else found.host
    if chosen.kind == "cuda":
        pool = replace(pool, mapped=0, copied=pool.mapped + pool.copied)
    return Footprint(pool, MemoryPool())


def plan(chosen: Machine, sizes: Sizes, trained: int, n: int, n_ctx: int) -> dict[str, Any]:
    """What fits for `n` sequences of `n_ctx` cells each. Sizes in bytes."""
    one, shared = sizes(n_ctx, 1), sizes(n * n_ctx, n)
    places = ["host memory"] if chosen.kind == "cpu" else ["device", "host memory"]

    def about(found: Footprint, processes: int, contexts: int) -> dict[str, Any]:
        use = found.use(chosen, processes, contexts)
        return {"use": [u for u, _ in use], "fits": all(u <= limit for u, limit in use)}

    found = {
        "machine": asdict(chosen),
        "places": places,
        "limits": [limit for _, limit in one.use(chosen)],
        "sequences": n,
        "one_process": asdict(one),
        "shared_context": {**asdict(shared), **about(shared, 1, 1)},
        "contexts": about(one, 1, n),
        "processes": about(one, n, 1),
        "max_active_processes": most(lambda k: one.check(chosen, k), 4096),
        "max_contexts": most(lambda k: one.check(chosen, 1, k), 4096),
        "max_n_ctx": None,
    }
    if shared.total == sizes(n * (n_ctx + BLOCK), n).total:  # cells take nothing
        return found
    longest = -(-n * trained // BLOCK) if trained else MOST_BLOCKS
    blocks = most(lambda b: sizes(BLOCK * b, n).check(chosen), longest)
    if trained and blocks == longest:
        bound = f"{n} times what the model was trained on"
        return found | {"max_n_ctx": n * trained, "bound": bound}
    use = sizes(BLOCK * (blocks + 1), n).use(chosen)
    full = next(p for p, (used, limit) in zip(places, use, strict=True) if used > limit)
    return found | {"max_n_ctx": BLOCK * blocks, "bound": f"{full} is full then"}


def in_words(found: dict[str, Any], n_ctx: int) -> str:
    """The plan for people to read."""
    chosen, places, n = found["machine"], found["places"], found["sequences"]
    limits = zip(places, gib(found["limits"]), strict=True)
    limit = ", ".join(f"{place} {size} GiB" for place, size in limits)
    out = [f"{chosen['name']} ({chosen['kind']}): {limit}; {chosen['source']}"]
    for place in ("device", "host"):
        sizes = {name: size for name, size in found["one_process"][place].items() if size}
        if sizes:
            out.append(f"a process with {n_ctx} cells, {place}: {named(sizes)}")
    ways = {
        "shared_context": "one shared context",
        "contexts": f"{n} contexts in a process",
        "processes": f"{n} active processes",
    }
    rows = [
        [name, *gib(found[way]["use"]), "fits" if found[way]["fits"] else "does not fit"]
        for way, name in ways.items()
    ]
    heads = [f"{n} sequences of {n_ctx} cells", *(f"{place}, GiB" for place in places), ""]
    out += ["", Table(heads, rows, text=(0, len(heads) - 1)).plain(), ""]
    out.append(
        f"at most {found['max_active_processes']} active processes, "
        f"or {found['max_contexts']} contexts in one"
    )
    if found["max_n_ctx"] is not None:
        most_cells = f"{found['max_n_ctx']:,} ({found['bound']})"
        out.append(f"one context of {n} sequences: n_ctx up to {most_cells}")
    for s in found.get("measured", ()):
        shown = named({name: s[name] for name in ("rss", "pss", "shared", "planned")})
        out.append(f"measured, {s['n']} {s['state']} processes together: {shown}")
    return "\n".join(out)


def gib(sizes: list[int]) -> list[str]:
    return [f"{size / GIB:.2f}" for size in sizes]


def named(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.3f}" for name, size in sizes.items()) + " GiB"
