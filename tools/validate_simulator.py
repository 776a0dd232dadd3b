"""How far the cost model and the simulator are from a live engine.

    python -m tools.validate_simulator -m FILE.gguf --calibrate 120 --live 45 -s 16

Calibrates (or takes --profile), then runs a trace on a live engine and simulates it, for each
layout and load (`tools.validation` says how). Prints tables, and appends one JSON record per layout
and load to --out. `--view` prints the tables of the records in --out and measures nothing. Exit
status 1: a figure misses its bound.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pyllamabatch.cost.calibrate import calibrate
from pyllamabatch.cost.model import CostModel, held_out
from pyllamabatch.cost.profile import SHIPPED, Profile, file_name
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.models import default_model_path
from pyllamabatch.report.tables import Table
from pyllamabatch.scheduler import make_policy
from pyllamabatch.scheduler.policies import DEFAULT
from pyllamabatch.sim import TraceRequest, at_load, load_trace
from tools.live import describe
from tools.validation import AT_SPEED, BOUNDS, COMPARED, Validation, Validator, kinds, split

N_TRACE = 2**16  # steps of a segment
N_RATE = 300  # requests that the arrival rate is taken from

HELD_OUT = {"median": 0.05, "p95": 0.15}
"""Relative errors that the cost model is to stay within, on samples that its fit has not seen."""


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    if options.view:
        records = [json.loads(line) for line in options.out.read_text().splitlines()]
    else:
        records = measure(options)
    print("\n".join(map(view, records)), end="")
    return 1 if any(missed(record) for record in records) else 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.validate_simulator", description=__doc__)
    parser.add_argument("-m", "--model", type=Path, help="a GGUF file (the embedded model)")
    parser.add_argument("--gpu-layers", type=int, default=-1)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--layouts", default="unified,streams")
    parser.add_argument("-s", "--sequences", type=int, default=8)
    parser.add_argument("-c", "--n-ctx", type=int, default=16384)
    parser.add_argument(
        "--trace", default="poisson:rate=1,n=10000,prompt=20-150,output=16-48",
        help="a file or a spec without sessions; its arrivals are stretched to each load",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", default=DEFAULT)
    parser.add_argument("--loads", default="0.6", help="shares of the capacity by the profile")
    parser.add_argument("--live", type=float, default=240.0, help="seconds of a live run")
    parser.add_argument("--segments", type=int, default=6, help="of a live run")
    parser.add_argument("--calibrate", type=float, default=240.0, help="seconds")
    parser.add_argument("--profile", type=Path, help="instead of calibrating")
    parser.add_argument("--ship", metavar="NAME", help="save the profile into the package, too")
    parser.add_argument("--out", type=Path, default=Path("validation.jsonl"))
    parser.add_argument("--view", action="store_true", help="print --out and measure nothing")
    return parser


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A record per layout and load; each is appended to --out as soon as it is there."""
    threads = {}
    if options.threads is not None:
        threads = {"n_threads": options.threads, "n_threads_batch": options.threads}
    layouts = options.layouts.split(",")
    records = []
    path = options.model or default_model_path()
    with Model(path, n_gpu_layers=options.gpu_layers) as model:
        profile = profile_of(options, model, layouts, threads)
        for layout in layouts:
            unified = layout == "unified"
            cost = CostModel.fit(profile, unified=unified)
            unseen = held_out(profile, unified=unified)
            errors = {"median": np.median(unseen), "p95": np.percentile(unseen, 95)}
            for load in map(float, options.loads.split(",")):
                with Engine(
                    model,
                    n_seq_max=options.sequences,
                    n_ctx=options.n_ctx,
                    kv_unified=unified,
                    prefix_cache=False,
                    speculate=None,
                    policy=make_policy(options.policy),
                    cost=cost,
                    n_trace=N_TRACE,
                    **threads,
                ) as engine:
                    validator = Validator(engine, options.policy)
                    requests = trace(options, validator, load)
                    segments = split(requests, options.segments)
                    found = validator.run(segments, say)
                    about = describe(engine)
                record = {
                    "schema": 1,
                    "date": time.strftime("%Y-%m-%d"),
                    "about": about,
                    "trace": options.trace,
                    "policy": options.policy,
                    "sequences": options.sequences,
                    "layout": layout,
                    "load": load,
                    "requests": len(requests),
                    "held_out": {name: float(error) for name, error in errors.items()},
                    **measured(found),
                }
                with options.out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                records.append(record)
    return records


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def profile_of(
    options: argparse.Namespace, model: Model, layouts: list[str], threads: dict[str, Any]
) -> Profile:
    """--profile, or one that is measured now and saved beside --out."""
    if options.profile is not None:
        return Profile.load(options.profile)
    shown = time.monotonic()

    def progress(share: float, text: str) -> None:
        nonlocal shown
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            say(f"calibrate {share:4.0%} {text}")

    profile = calibrate(
        model, budget=options.calibrate, layouts=layouts, progress=progress, **threads
    )
    profile.save(options.out.parent / "profiles" / file_name(profile.key))
    if options.ship:
        profile.save(SHIPPED / f"{options.ship}.json")
    return profile


def trace(options: argparse.Namespace, validator: Validator, load: float) -> list[TraceRequest]:
    """As many requests of the trace as arrive in the live seconds at this load."""

    def drawn(n: int) -> list[TraceRequest]:
        requests = load_trace(options.trace, seed=options.seed, n=n)
        return at_load(requests, validator.spec(), options.policy, load)

    several = drawn(N_RATE)
    rate = (len(several) - 1) / several[-1].arrival
    requests = drawn(max(8, ceil(rate * options.live)))
    say(f"{len(requests)} requests, {rate:.2f} a second")
    return requests


def measured(found: Validation) -> dict[str, Any]:
    return {
        "live": {name: found.live[name] for name in COMPARED},
        "simulated": {
            arm: {name: figures[name] for name in COMPARED}
            for arm, figures in found.simulated.items()
        },
        "segments": {name: list(errors) for name, errors in found.errors.items()},
        "probes": [speed._asdict() for speed in found.speeds],
        "new_graph": list(found.new_graph),
        "steps": kinds(found),
    }


def missed(record: Mapping[str, Any]) -> list[str]:
    """The figures that are off by more than their bound."""
    live, simulated = record["live"], record["simulated"][AT_SPEED]
    figures = [name for name in BOUNDS if abs(simulated[name] / live[name] - 1) > BOUNDS[name]]
    unseen = [f"held out, {name}" for name in HELD_OUT if record["held_out"][name] > HELD_OUT[name]]
    return figures + unseen


def view(record: Mapping[str, Any]) -> str:
    """Markdown: what was run, the figures, the kinds of steps, and what is missed."""
    probes, held = record["probes"], record["held_out"]
    decode = [ratio for probe in probes for ratio in probe["decode"]]
    prompt = [probe["prompt"] for probe in probes]
    lines = [
        f"**{record['about']}**: {record['layout']}, {record['sequences']} sequences, "
        f"{record['policy']}, {record['trace']} at load {record['load']:g}: {record['requests']} "
        f"requests ({record['date']})",
        "",
        f"Cost model, held out: {held['median']:.1%} median, {held['p95']:.1%} at the 95th "
        f"percentile. {len(probes)} probes: steps that decode take {min(decode):.3f} to "
        f"{max(decode):.3f} of the profile's time, those with prompts {min(prompt):.3f} to "
        f"{max(prompt):.3f}; a call {1e3 * median(p['overhead'] for p in probes):.2f} ms beside "
        f"its steps, a token {1e3 * median(p['latency'] for p in probes):.2f} ms to its reader.",
        "",
        figure_table(record).markdown(),
        "",
        step_table(record["steps"]).markdown(),
        "",
        f"Missed: {', '.join(missed(record)) or 'none'}.",
    ]
    return "\n".join(lines) + "\n"


def figure_table(record: Mapping[str, Any]) -> Table:
    """The live figures beside those of each simulation, with errors and bounds."""
    others = [name for name in record["simulated"] if name != AT_SPEED]
    heads = ["", "live", AT_SPEED, "error", "at most", "of segments"]
    lines = []
    for name, label in COMPARED.items():
        scale, live = 1e3 if label.endswith("ms") else 1.0, record["live"][name]
        found = {arm: figures[name] for arm, figures in record["simulated"].items()}
        both = {arm: (f"{scale * x:.2f}", f"{x / live - 1:+.1%}") for arm, x in found.items()}
        errors, most = record["segments"][name], f"{BOUNDS[name]:.0%}" if name in BOUNDS else ""
        segments = f"{min(errors):+.1%} to {max(errors):+.1%}"
        line = [label, f"{scale * live:.2f}", *both[AT_SPEED], most, segments]
        lines.append([*line, *(cell for arm in others for cell in both[arm])])
    return Table([*heads, *(head for arm in others for head in (arm, "error"))], lines)


def step_table(steps: Mapping[str, Mapping[str, float]]) -> Table:
    heads = ["steps", "how many", "rows, mean", "share of the time"]
    lines = [
        [name, f"{k['steps']:.0f}", f"{k['rows']:.1f}", f"{k['share']:.0%}",
         f"{1e3 * k['measured']:.2f}", f"{1e3 * k['model']:.2f}",
         f"{k['model'] / k['measured'] - 1:+.1%}"]
        for name, k in steps.items()
    ]  # fmt: skip
    return Table([*heads, "measured, ms", "model, ms", "error"], lines)


if __name__ == "__main__":
    raise SystemExit(main())
