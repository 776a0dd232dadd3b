"""How far the cost model is from steps that it has not seen, and the simulator from a live engine.

One session on one machine: calibrates, then runs a trace live and simulated (`pyllamabatch simulate
--validate` says how). Nothing of what is predicted has been used to predict it.
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import schema
from bench.docs import replace_part
from bench.models import BenchModel, resolve
from bench.options import add_model, add_run, out_file
from bench.targets import Figure, Target, judged
from pyllamabatch.compare import facts
from pyllamabatch.cost.calibrate import calibrate
from pyllamabatch.cost.model import CostModel, held_out
from pyllamabatch.cost.profile import SHIPPED, Profile, file_name
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import make_policy
from pyllamabatch.scheduler.policies import DEFAULT
from pyllamabatch.sim.load import at_load
from pyllamabatch.sim.validate import AT_SPEED, BOUNDS, COMPARED, Validation, Validator, split
from pyllamabatch.sim.validate import kinds as kinds_of_steps
from pyllamabatch.sim.workload import Request, draw

QUICK = ("--quick",)
DOCS = Path(__file__).resolve().parent.parent / "docs" / "simulator.md"
N_TRACE = 2**16  # steps of a segment
TRIES = 2000  # predictions that are timed
MODEL = "cost model"


def error_of(name: str) -> Figure:
    """The largest error of a figure, of the simulations that the bounds are for."""

    def figure(rows: Sequence[schema.Row]) -> float | None:
        found = [abs(row.detail[f"error {name}"]) for row in rows if row.arm == AT_SPEED]
        return max(found) if found else None

    return figure


def detail_of(name: str) -> Figure:
    def figure(rows: Sequence[schema.Row]) -> float | None:
        found = [row.detail[name] for row in rows if row.arm == MODEL]
        return max(found) if found else None

    return figure


TARGETS = (
    Target("steps not seen: median error", detail_of("held_out_median"), at_most=0.05),
    Target("steps not seen: 95th percentile", detail_of("held_out_p95"), at_most=0.15),
    Target("a fit, ms", detail_of("fit_ms"), at_most=100.0),
    Target("a prediction, us", detail_of("predict_us"), at_most=2.0),
    *(
        Target(f"simulated over live, {COMPARED[name]}: error", error_of(name), at_most=bound)
        for name, bound in BOUNDS.items()
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.set_defaults(kv="unified")
    parser.add_argument("--layouts", default="", help="unified,streams (that of --kv alone)")
    parser.add_argument("-s", "--sequences", type=int, default=8)
    parser.add_argument("--n-ctx", type=int, default=16384)
    parser.add_argument("--prompt", default="20-150", help="tokens (20-150)")
    parser.add_argument("--output", default="16-48", help="tokens (16-48)")
    parser.add_argument("--policy", default=DEFAULT)
    parser.add_argument("--loads", default="0.6", help="of what the profile says it can do (0.6)")
    parser.add_argument("--live", type=float, help="seconds of each live run (240; --quick 20)")
    parser.add_argument("--segments", type=int, help="of each live run (6; --quick 2)")
    parser.add_argument("--calibrate", type=float, help="seconds (240; --quick 20)")
    parser.add_argument("--profile", type=Path, help="that was measured before, instead")
    parser.add_argument("--ship", metavar="NAME", help="keep the profile in the package, too")
    parser.add_argument(
        "--docs", action="store_true",
        help="measure nothing: the tables of all rows of --out into docs/simulator.md",
    )  # fmt: skip
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    if options.docs:
        folder = out_file(options, "validate", "x").parent
        rows = [
            row for path in sorted(folder.glob("validate-*.jsonl")) for row in schema.read(path)
        ]
        replace_part(DOCS, "validation", view(rows))
        return 0
    out, rows = None, []
    for row in measure(options, resolve(options.model)):
        if out is None:
            out = out_file(options, "validate", options.model.split("/")[-1], row.gpu_info)
        schema.append(out, [row])
        rows.append(row)
    print(view(rows))
    print(judged(TARGETS, rows, ".3g"), end="")
    print(f"\nrows: {out}")
    return 0


def measure(options: argparse.Namespace, bench_model: BenchModel) -> Iterator[schema.Row]:
    layouts = options.layouts.split(",") if options.layouts else [options.kv]
    run_id = uuid.uuid4().hex[:12]
    threads = {"n_threads": options.threads, "n_threads_batch": options.threads}
    with Model(bench_model.path, n_gpu_layers=options.gpu_layers) as model:
        common = {
            **schema.machine(),
            **schema.build(),
            **facts.about(model),
            **settings(options, bench_model, run_id),
        }
        profile = profile_of(options, model, layouts, threads)
        for kv in layouts:
            unified = kv == "unified"
            about = {**common, "kv_unified": unified}
            cost, detail = fitted(profile, unified)
            detail["sequences"] = options.sequences
            yield row(about, MODEL, "samples of calibration, each predicted without it", 0, detail)
            for load in map(float, options.loads.split(",")):
                with Engine(
                    model,
                    n_seq_max=options.sequences,
                    n_ctx=options.n_ctx,
                    kv_unified=unified,
                    prefix_cache=False,
                    policy=make_policy(options.policy),
                    cost=cost,
                    n_trace=N_TRACE,
                    **threads,
                ) as engine:
                    found, n = run(options, engine, load)
                yield from rows_of(about, found, n, load)


def settings(options: argparse.Namespace, model: BenchModel, run_id: str) -> dict[str, Any]:
    return {
        "bench": "validate",
        "run_id": run_id,
        "repeat": 0,
        "sampling": "default",
        "model_filename": model.path.name,
        "model_seed": model.seed,
        "seed": options.seed,
        "n_kv_max": options.n_ctx,
        "n_batch": 2048,
        "n_ubatch": 512,
        "flash_attn": -1,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": options.gpu_layers,
        "n_threads": options.threads,
        "n_threads_batch": options.threads,
        "pp": 0,
        "pl": 1,  # the tokens of all sequences together
        "n_kv": 0,
    }


def profile_of(
    options: argparse.Namespace, model: Model, layouts: list[str], threads: dict[str, int]
) -> Profile:
    """Measured now, and kept beside the rows."""
    if options.profile is not None:
        return Profile.load(options.profile)
    budget = options.calibrate or (20.0 if options.quick else 240.0)
    last = time.monotonic()

    def progress(share: float, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 20:
            last = time.monotonic()
            print(f"calibrate {share:4.0%} {text}", flush=True)

    profile = calibrate(model, budget=budget, layouts=layouts, progress=progress, **threads)
    path = out_file(options, "validate", "x").parent / "profiles" / file_name(profile.key)
    profile.save(path)
    print(f"profile: {path}", flush=True)
    if options.ship:
        profile.save(SHIPPED / f"{options.ship}.json")
    return profile


def fitted(profile: Profile, unified: bool) -> tuple[CostModel, dict[str, float]]:
    """Of one layout; its errors on what it has not seen, and its own times in thread CPU time."""
    began = time.thread_time()
    cost = CostModel.fit(profile, unified=unified)
    fit_s = time.thread_time() - began
    unseen = held_out(profile, unified=unified)
    samples = [s for s in profile.samples if s.unified == unified]
    shapes = [s.shape for s in samples if s.rows <= cost.n_ubatch]
    each = []
    for _ in range(9):
        began = time.thread_time()
        for i in range(TRIES):
            cost.predict(*shapes[i % len(shapes)])
        each.append((time.thread_time() - began) / TRIES)
    detail = {
        "samples": len(samples),
        "disturbed": sum(s.n == 0 for s in samples),
        "held_out_median": float(np.median(unseen)) if unseen else 1.0,
        "held_out_p95": float(np.percentile(unseen, 95)) if unseen else 1.0,
        "fit_ms": 1e3 * fit_s,
        "predict_us": 1e6 * median(each),
        "new_graph_ms": 1e3 * cost.new_graph.step,
        "settle_ms": 1e3 * cost.new_graph.settle,
    }
    return cost, detail


def run(options: argparse.Namespace, engine: Engine, load: float) -> tuple[Validation, int]:
    """As many requests as come in the live seconds."""
    seconds = options.live or (20.0 if options.quick else 240.0)
    validator = Validator(engine, options.policy)
    machine = validator.machine()

    def drawn(n: int) -> list[Request]:
        spec = f"poisson:rate=1,n={n},prompt={options.prompt},output={options.output}"
        return at_load(draw(spec, options.seed), machine, options.policy, load)

    several = drawn(300)
    rate = (len(several) - 1) / several[-1].arrival
    n = max(8, ceil(rate * seconds))
    requests = drawn(n)
    segments = split(requests, options.segments or (2 if options.quick else 6))
    print(f"{n} requests, {rate:.2f} a second", flush=True)
    return validator.run(segments, lambda text: print(text, flush=True)), n


def rows_of(about: dict[str, Any], found: Validation, n: int, load: float) -> Iterator[schema.Row]:
    """One of the live run, one of each simulation, one of each kind of steps."""
    decode, prompt, graph, overhead, latency = (list(e) for e in zip(*found.speeds, strict=True))
    detail = {
        "load": load,
        "requests": n,
        "segments": len(found.errors["tpot_mean"]),
        "overhead_ms": 1e3 * median(overhead),
        "latency_ms": 1e3 * median(latency),
    }
    regimes = [x for each in decode for x in each]
    for name, each in (("decode", regimes), ("prompt", prompt), ("graph", graph)):
        detail |= {f"{name} slowest": max(each), f"{name} fastest": min(each)}
    live = {name: found.live[name] for name in COMPARED}
    yield row(about, "live", "the engine, in real time", found.live["duration"], detail | live)
    for arm, figures in found.simulated.items():
        detail = {"load": load} | {name: figures[name] for name in COMPARED}
        detail |= {f"error {name}": figures[name] / found.live[name] - 1 for name in COMPARED}
        if arm == AT_SPEED:
            for name in COMPARED:
                detail[f"lowest {name}"] = min(found.errors[name])
                detail[f"highest {name}"] = max(found.errors[name])
        yield row(about, arm, "simulate() of the same trace", figures["duration"], detail)
    for kind, steps in kinds_of_steps(found).items():
        yield row(about, f"steps: {kind}", "steps of the live run", 0.0, {"load": load} | steps)


def row(
    about: dict[str, Any], arm: str, includes: str, seconds: float, detail: dict[str, float]
) -> schema.Row:
    tokens = round(detail.get("tokens_per_s", 0.0) * seconds)
    speeds = schema.speeds(pp=0, tg=tokens, pl=1, t_pp=0.0, t_tg=seconds)
    given = {**about, **schema.now()}
    return schema.Row(arm=arm, includes=includes, tg=tokens, detail=detail, **given, **speeds)


def view(rows: Sequence[schema.Row]) -> str:
    """The tables of the latest run of each machine, model and layout, by load."""
    latest = {_what(r): r.run_id for r in sorted(rows, key=lambda r: r.test_time)}
    out: list[str] = []
    for what, run_id in latest.items():
        mine = [r for r in rows if (_what(r), r.run_id) == (what, run_id)]
        out += [f"**{what}** ({mine[0].test_time[:10]})\n"]
        out += map(_model, (r for r in mine if r.arm == MODEL))
        loads = dict.fromkeys(r.detail["load"] for r in mine if r.arm != MODEL)
        out += [_tables([r for r in mine if r.detail.get("load") == x]) for x in loads]
    return "\n".join(out)


def _what(r: schema.Row) -> str:
    machine = r.gpu_info or f"{r.cpu_info}, {r.n_threads} threads"
    cells = "shared cells" if r.kv_unified else "cells of each sequence's own"
    return f"{machine}: {r.model_type}, {cells}"


def _model(r: schema.Row) -> str:
    d = r.detail
    return (
        f"{d['sequences']:g} sequences. Cost model, held out: {d['held_out_median']:.1%} median, "
        f"{d['held_out_p95']:.1%} at the 95th percentile, of {d['samples']:.0f} shapes. A fit "
        f"takes {d['fit_ms']:.0f} ms, a prediction {d['predict_us']:.2f} us.\n"
    )


def _tables(rows: Sequence[schema.Row]) -> str:
    by_arm = {r.arm: r for r in rows}
    live, best = by_arm["live"].detail, by_arm[AT_SPEED].detail
    arms = [arm for arm in (AT_SPEED, "profile", "refined") if arm in by_arm]
    heads = [text for arm in arms for text in (arm, "error")]
    heads[2:2] = ["at most", "of segments"]
    lines = [
        f"{live['requests']:.0f} requests at {live['load']:g} of what the profile says it can do, "
        f"in {live['segments']:.0f} segments. The probes found steps that decode at "
        f"{live['decode fastest']:.3f} to {live['decode slowest']:.3f} of the profile's time, and "
        f"those with prompts at {live['prompt fastest']:.3f} to {live['prompt slowest']:.3f}.",
        "",
        f"| | live | {' | '.join(heads)} |",
        "|---|" + "---:|" * (1 + len(heads)),
    ]
    for name, label in COMPARED.items():
        scale = 1e3 if label.endswith("ms") else 1.0
        bound = f"{BOUNDS[name]:.0%}" if name in BOUNDS else ""
        cells = [f"{scale * live[name]:.2f}"]
        for arm in arms:
            d = by_arm[arm].detail
            cells += [f"{scale * d[name]:.2f}", f"{d[f'error {name}']:+.1%}"]
            if arm == AT_SPEED:
                cells += [bound, f"{best[f'lowest {name}']:+.1%} to {best[f'highest {name}']:+.1%}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "| steps of the live run | how many | rows, mean | share of the time | measured, ms "
        "| model, ms | error |",
        "|---|" + "---:|" * 6,
    ]
    for r in rows:
        if r.arm.startswith("steps: "):
            d = r.detail
            lines.append(
                f"| {r.arm[7:]} | {d['steps']:.0f} | {d['rows']:.1f} | {d['share']:.0%} | "
                f"{1e3 * d['measured']:.2f} | {1e3 * d['model']:.2f} | "
                f"{d['model'] / d['measured'] - 1:+.1%} |"
            )
    return "\n".join(lines) + "\n"
