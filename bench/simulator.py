"""The simulator's own time: steps of a day's traffic in a second, no model."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from bench import harness
from bench.case import NO_CONTEXT, NO_MODEL, Arm, Case, Measured
from bench.options import add_run
from bench.targets import Figure, Target
from bench.views import Column, by_arm, median_of
from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.report.records import Record
from pyllamabatch.sim import EngineSpec, draw, simulate

QUICK = {"requests": 500, "repeats": 2}
N_SEQ_MAX, N_CELLS = 32, 131072


@dataclass(frozen=True)
class Load:
    """What is simulated: a trace, and whether an engine caches what requests leave behind."""

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
    return lambda records: median_of(r.tg / r.t_tg for r in records if r.arm == arm)


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
    arms = [
        Arm(name, f"simulate() as a whole: {load.text}", partial(timed, load, options.requests))
        for name, load in LOADS.items()
    ]
    case = Case(NO_MODEL, 0, 1, N_SEQ_MAX, 1, "none", options.seed, kv_unified=True)
    return harness.run(
        options,
        arms,
        [case],
        harness.facts_of(),
        f"{options.requests} requests of each load",
        subject="all",
    )


def timed(load: Load, n: int, case: Case) -> Measured:
    """CPU time of this thread for a simulated step."""
    requests = draw(f"{load.trace},n={n}", case.seed)
    spec = EngineSpec.of(
        Device(), n_seq_max=case.pl, n_cells=N_CELLS, prefix_cache=load.prefix_cache
    )
    began = time.thread_time()
    run = simulate(requests, spec, n_replicas=load.n_replicas, router="prefix-affinity")
    figures, seconds = run.summary(), time.thread_time() - began
    detail = {
        "requests": float(n),
        "n_steps": figures["steps"],
        "simulated_s": figures["duration"],
        "replicas": float(load.n_replicas),
    }
    return Measured(0.0, seconds / figures["steps"], NO_CONTEXT, detail)


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("steps/s", lambda record: record.tg / record.t_tg, ",.0f"),
        Column("requests/s", lambda record: record.detail["requests"] / seconds(record), ",.0f"),
        Column(
            "simulated time over real time",
            lambda record: record.detail["simulated_s"] / seconds(record),
            ",.0f",
        ),
    )
    return by_arm(records, columns, "load")


def seconds(record: Record) -> float:
    """Of the whole simulation; the first records count all of its steps as `tg`."""
    return record.t_tg / record.tg * record.detail.get("n_steps", record.tg)
