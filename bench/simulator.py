"""The simulator's own time: steps of a day's traffic in a second, no model."""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from bench import schema
from bench.options import add_run, out_file
from bench.targets import Figure, Target, judged
from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.report.meters import undisturbed
from pyllamabatch.sim import EngineSpec, draw, simulate

QUICK = {"requests": 500, "repeats": 2}
N_SEQ_MAX, N_CELLS = 32, 131072


@dataclass(frozen=True)
class Load:
    """What is simulated: a trace, and whether an engine keeps what requests leave behind."""

    text: str
    trace: str
    prefix_cache: bool = False
    n_replicas: int = 1


LOADS = {
    "decode": Load(
        "32 clients decode 1,000 to 2,000 tokens each",
        "closed:clients=32,prompt=128,output=1000-2000",
    ),
    "decode, prefix cache": Load(
        "the same, and what they leave is cached",
        "closed:clients=32,prompt=128,output=1000-2000",
        prefix_cache=True,
    ),
    "chat": Load(
        "Poisson arrivals, prompts of about 500 and answers of about 250 tokens",
        "poisson:rate=6,prompt=512~0.8,output=256~0.8",
    ),
    "fleet": Load(
        "the same on 8 replicas, prompts that begin alike, prefixes cached and routed by",
        "poisson:rate=48,prompt=512~0.8,output=256~0.8,prefix=200,prefixes=50",
        prefix_cache=True,
        n_replicas=8,
    ),
}


@dataclass(frozen=True)
class Device(StepCost):
    """Stands for one: 5 ms a step, 0.1 ms a row, 10 ns a cell."""

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        return 5e-3 + 1e-4 * rows + 1e-8 * kv


def steps_per_second(arm: str) -> Figure:
    def figure(rows: Sequence[schema.Row]) -> float | None:
        mine = [row.tg / row.t_tg for row in rows if row.arm == arm]
        return median(mine) if mine else None

    return figure


TARGETS = (
    Target(
        "decode: simulated steps a second, 32 sequences",
        steps_per_second("decode"),
        at_least=100000.0,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=2000, help="of each load")
    add_run(parser, repeats=5)


def main(options: argparse.Namespace) -> int:
    out = out_file(options, "simulator", "all")
    rows = []
    for row in measure(options):
        schema.append(out, [row])
        rows.append(row)
    print(view(rows))
    print(judged(TARGETS, rows, ".0f"), end="")
    print(f"\nrows: {out}")
    return 0


def measure(options: argparse.Namespace) -> Iterator[schema.Row]:
    run_id = uuid.uuid4().hex[:12]
    facts = schema.build()
    n = options.requests
    for repeat in range(options.repeats):
        for name, load in LOADS.items():
            moment = schema.now()
            run = partial(timed, load, n, options.seed)
            (figures, seconds), others = undisturbed(run, options.undisturbed)
            n_steps = int(figures["steps"])
            detail = {
                "requests": n,
                "simulated_s": figures["duration"],
                "replicas": load.n_replicas,
                "other_cpu": round(others, 3),
            }
            yield schema.Row(
                bench="simulator",
                arm=name,
                includes=f"simulate() as a whole: {load.text}",
                run_id=run_id,
                repeat=repeat,
                sampling="none",
                **schema.machine(),
                **facts,
                **moment,
                model_filename="",
                model_type="",
                model_size=0,
                model_n_params=0,
                model_seed=None,
                seed=options.seed,
                n_kv_max=N_CELLS,
                n_batch=2048,
                n_ubatch=512,
                flash_attn=-1,
                kv_unified=True,
                type_k="",
                type_v="",
                n_gpu_layers=0,
                n_threads=1,
                n_threads_batch=1,
                pp=0,
                tg=n_steps,
                pl=N_SEQ_MAX,
                n_kv=0,
                detail=detail,
                **schema.speeds(pp=0, tg=n_steps, pl=N_SEQ_MAX, t_pp=0.0, t_tg=seconds),
            )


def timed(load: Load, n: int, seed: int) -> tuple[dict[str, float], float]:
    """Its figures, and the CPU seconds of this thread for the simulation."""
    requests = draw(f"{load.trace},n={n}", seed)
    machine = EngineSpec.of(
        Device(), n_seq_max=N_SEQ_MAX, n_cells=N_CELLS, prefix_cache=load.prefix_cache
    )
    options: dict[str, Any] = {"n_replicas": load.n_replicas, "router": "prefix-affinity"}
    began = time.thread_time()
    run = simulate(requests, machine, **options)
    return run.summary(), time.thread_time() - began


def view(rows: Sequence[schema.Row]) -> str:
    """Medians of the repeats, by load."""
    lines = [
        "| load | steps/s | requests/s | simulated time over real time |",
        "|---|---:|---:|---:|",
    ]
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = [row for row in rows if row.arm == arm and not row.error]
        figures = (
            median(row.tg / row.t_tg for row in mine),
            median(row.detail["requests"] / row.t_tg for row in mine),
            median(row.detail["simulated_s"] / row.t_tg for row in mine),
        )
        lines.append(
            f"| {arm}: {LOADS[arm].text} | " + " | ".join(f"{f:,.0f}" for f in figures) + " |"
        )
    return "\n".join(lines) + "\n"
