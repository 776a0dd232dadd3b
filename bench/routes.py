"""Routers of a fleet with common prefixes: live, and simulated by the same objects.

The chats of `bench.chats`. The cells of each replica hold the prefixes of half of the users.

The clients begin at once, and a live fleet meets them in any order: which prefix lies where follows
from that, and so does the hit rate of a run. The simulation is the mean of many orders,
`hit_rate_sd` what one run differs by. Each repeat has other orders of chats.

The simulation has a profile that is measured first (--calibrate), while other processes do what
the other replicas will, and which the live replicas plan with, too; or that of a profile machine
(--machine), of which each replica has a GPU of its own. And it knows what an engine takes between
two native calls, and a request on its way through a fleet, which are measured before, too. Wants
the extra `ray`.
"""

import argparse
import random
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import httpx
import numpy as np

from bench import harness
from bench.beside_others import calibrated, own_profiles
from bench.cache import cache_folder
from bench.case import Arm, Case, Measured, ModelFile, cases_of
from bench.chats import (
    CHATS,
    CLIENTS,
    N_SLOTS,
    USERS,
    Sizes,
    complete,
    drawn,
    order,
    talk,
    trace,
)
from bench.fleet import STOP_S
from bench.models import resolve
from bench.options import add_file, add_run, choose
from bench.serving import ServerProcess
from bench.targets import Figure, Target
from bench.views import Column, by_arm
from pyllamabatch.compare.completion import HOST
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import load_profile
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.machine.profile_machine import ProfileMachine
from pyllamabatch.report.meters import OtherCores, descendants
from pyllamabatch.report.records import Record
from pyllamabatch.sim import EngineSpec, simulate
from pyllamabatch.step.sampling_params import SamplingParams
from tools.live import spec_of
from tools.serve_load import metrics_of

REPLICAS = 2
N_ORDERS = 8  # of the clients, that are simulated
N_BETWEEN = 32  # requests, and tokens of each, until it is known what is between native calls
N_ON_THE_WAY = 10  # requests of each client whose way is timed
TURN_BY_TURN, AFFINITY = "round-robin", "prefix-affinity"
LIVE, SIMULATED = "live", "simulated"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
QUICK = {"machine": "nvidia-h200-gemma-3-1b-q4_k_m", "rounds": 1, "repeats": 1}


def sizes_of(options: argparse.Namespace) -> Sizes:
    return Sizes(options.prefix, options.answer, options.rounds)


class Variant(NamedTuple):
    """An arm: live or simulated."""

    kind: str
    router: str
    replicas: int = REPLICAS

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.replicas}-{self.router}"


def _hits(kind: str, router: str) -> Figure:
    """The mean of all repeats, whose chats are as long."""

    def figure(records: Sequence[Record]) -> float | None:
        mine = (r for r in records if r.arm == Variant(kind, router).name and not r.error)
        rates = [r.detail["hit_rate"] for r in mine]
        return fmean(rates) if rates else None

    return figure


def hits_ratio(kind: str) -> Figure:
    """Hit rate of prefix affinity over that of round robin."""

    def figure(records: Sequence[Record]) -> float | None:
        affinity, turns = (_hits(kind, router)(records) for router in (AFFINITY, TURN_BY_TURN))
        return affinity / turns if affinity and turns else None

    return figure


def points_off(router: str) -> Figure:
    """Simulated hit rate less the live one, in points."""

    def figure(records: Sequence[Record]) -> float | None:
        found, lived = (_hits(kind, router)(records) for kind in (SIMULATED, LIVE))
        return None if found is None or lived is None else 100 * (found - lived)

    return figure


def speed_off(router: str) -> Figure:
    """Simulated throughput over the live one, of all repeats together: those of one are of the same
    orders of chats, and others take longer."""

    def figure(records: Sequence[Record]) -> float | None:
        found, lived = (
            {r.repeat: r.t_tg for r in records if r.arm == Variant(kind, router).name}
            for kind in (SIMULATED, LIVE)
        )
        both = found.keys() & lived.keys()
        return sum(lived[i] for i in both) / sum(found[i] for i in both) if both else None

    return figure


TARGETS = (
    Target(
        "two replicas: prefix hits of prefix affinity over round robin, live",
        hits_ratio(LIVE),
        at_least=1.7,
        where={"n_kv_max": Sizes().n_cells},
    ),
    *(
        Target(f"{router}: tokens/s simulated over live", speed_off(router), 0.95, 1.05)
        for router in (TURN_BY_TURN, AFFINITY)
    ),
    *(
        Target(f"{router}: hit rate simulated less live, points", points_off(router), -3, 3)
        for router in (TURN_BY_TURN, AFFINITY)
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser, "smollm2-135m", threads=1)
    parser.add_argument("--replicas", type=int, default=REPLICAS, metavar="N")
    default = Sizes()
    parser.add_argument("--prefix", type=int, default=default.n_prefix, metavar="N",
                        help="tokens of a user's prefix")  # fmt: skip
    parser.add_argument("--answer", type=int, default=default.n_answer, metavar="N",
                        help="tokens of an answer")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=default.n_rounds, metavar="N",
                        help="how often there are all chats")  # fmt: skip
    parser.add_argument("--machine", default="", metavar="PROFILE", help="instead of a model")
    parser.add_argument(
        "--calibrate", type=float, default=60.0, metavar="S", help="to measure the device"
    )
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.set_defaults(kv="unified", sampling="default")
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    chosen = choose(options.arms, variants(options.replicas))
    about = harness.facts_of()
    with ExitStack() as stack:
        if options.machine:
            file = ModelFile(Path(options.machine))
            about |= ProfileMachine.named(options.machine).facts()
            spec = spec_on(options, None)
        else:
            file = resolve(options.model)
            stack.enter_context(own_profiles())
            with Model(file.path, n_gpu_layers=options.gpu_layers) as model:
                about = harness.facts_of(model)
                spec = spec_on(options, model)
        sizes = sizes_of(options)
        n_prompt = sizes.n_prompts // CLIENTS
        n_answer = sizes.n_requests * sizes.n_answer // CLIENTS
        (case,) = cases_of(options, file, n_prompt, n_answer, [CLIENTS])
        simulates = any(one.kind == SIMULATED for one in chosen)
        ways = ways_of(options, case) if simulates else []
        arms = [arm_of(one, options, spec, ways) for one in chosen]
        title = (
            f"{CHATS} chats of {USERS} users, {sizes.n_rounds} rounds, {options.replicas} replicas"
        )
        running = measure(arms, case, about, options)
        return harness.show(options, running, len(arms) * options.repeats, title,
                            options.machine or None)  # fmt: skip


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("prefix hits, %", "hit_rate", scale=100),
        Column("± of a run", "hit_rate_sd", scale=100),
        Column("ms on the way", "way_s", scale=1e3),
        Column("s", lambda record: record.t_tg),
        Column("tok/s", lambda record: record.speed_tg),
    )
    return by_arm(records, columns)


def variants(replicas: int) -> list[Variant]:
    return [
        Variant(kind, router, replicas)
        for router in (TURN_BY_TURN, AFFINITY)
        for kind in (SIMULATED, LIVE)
    ]


def arm_of(
    one: Variant, options: argparse.Namespace, spec: EngineSpec, ways: Sequence[float]
) -> Arm:
    if one.kind == LIVE:
        includes = "`pyllamabatch serve --replicas N`, a thread per client"
        return Arm(one.name, includes, partial(live, options, one.router))
    includes = "the mean of several orders of the clients"
    return Arm(one.name, includes, partial(simulated, spec, ways, options, one.router))


def measure(
    arms: Sequence[Arm], case: Case, about: dict[str, Any], options: argparse.Namespace
) -> Generator[Record, None, None]:
    recorder = harness.Recorder(options.command, about, options)
    for repeat in range(options.repeats):
        own = replace(case, seed=case.seed + repeat)
        for arm in arms:
            if recorder.budget.spent():
                return
            yield recorder.run(arm, own, repeat, partial(arm.run, own))


# -- simulated


def spec_on(options: argparse.Namespace, model: Model | None) -> EngineSpec:
    """The twin of a replica's engine."""
    own = own_of(options)
    if model is None:
        profile = load_profile(options.machine)
    else:
        seconds, n_others = options.calibrate, options.replicas - 1
        profile = calibrated(model, options.gpu_layers, seconds, n_others, **own)
    cost = CostModel.fit(profile, unified=True)
    with Engine(model, machine=options.machine or None, **own) as engine:
        return spec_of(engine, between_calls(engine), cost=cost)


def between_calls(engine: Engine) -> float:
    """Seconds from a native call to the next one, while requests end and others begin."""
    rng = random.Random(1)
    prompts = [drawn(rng, N_BETWEEN) for _ in range(N_BETWEEN)]
    params = [
        SamplingParams(max_tokens=rng.randint(1, 8), ignore_eog=True) for _ in range(N_BETWEEN)
    ]
    engine.generate(prompts, params)
    table = engine.trace()
    first = np.diff(table["run"], prepend=table["run"][0]) != 0
    return float(table["python_ns"][first].mean()) / 1e9


def own_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a replica's engine is."""
    return {
        "n_threads": options.threads, "n_threads_batch": options.threads, "kv_unified": True,
        "n_seq_max": N_SLOTS, "n_ctx": sizes_of(options).n_cells,
    }  # fmt: skip


def simulated(
    spec: EngineSpec, ways: Sequence[float], options: argparse.Namespace, router: str, case: Case
) -> Measured:
    """`ways`: seconds, of which each request takes any. Were they all the same, requests that end
    together would come together again."""
    rng, rates, seconds = random.Random(case.seed), list[float](), list[float]()
    for _ in range(N_ORDERS):
        clients = order(case.seed, options.rounds)
        rng.shuffle(clients)
        requests = trace(clients, sizes_of(options), partial(rng.choice, ways))
        run = simulate(requests, spec, n_replicas=options.replicas, router=router)
        counters = [load.counters for load in run.loads]
        known = sum(c.known_tokens for c in counters)
        rates.append(sum(c.prefix_tokens for c in counters) / known)
        seconds.append(max(one.end for one in run.outcomes))
    detail = {
        "hit_rate": fmean(rates), "hit_rate_sd": stdev(rates), "way_s": fmean(ways),
        "other_cpu": 0.0,
    }  # fmt: skip
    return Measured(0.0, fmean(seconds), {"n_kv_max": sizes_of(options).n_cells}, detail)


# -- live


def serve(options: argparse.Namespace, router: str, case: Case) -> list[str]:
    command = [sys.executable, "-m", "pyllamabatch", "serve", "-q", "--host", HOST,
               "-t", str(case.n_threads), "-np", str(N_SLOTS), "--kv-unified",
               "-c", str(sizes_of(options).n_cells), "--replicas", str(options.replicas),
               "--router", router]  # fmt: skip
    if options.machine:
        command += ["--machine", options.machine, "--gpus-per-replica", "1"]
    else:
        command += ["-m", str(case.model.path)]
    return command if case.n_gpu_layers < 0 else [*command, "-ngl", str(case.n_gpu_layers)]


@contextmanager
def fleet(options: argparse.Namespace, router: str, case: Case) -> Iterator[httpx.Client]:
    """Replicas that have answered before: their first requests are slower."""
    command = serve(options, router, case)
    server = ServerProcess(command, cache_folder("logs") / f"{router}.log", STOP_S)
    try:
        with httpx.Client(base_url=server.url, timeout=600, trust_env=False) as client:
            for _ in range(4 * options.replicas):
                complete(client, [1, 2, 3], options.answer)
            yield client
    finally:
        server.stop()


def ways_of(options: argparse.Namespace, case: Case) -> list[float]:
    """Seconds of each request beside its engine's. There are as many clients as later, which ask as
    often: their answers are longer, and their prompts are cached."""

    def ask(client: httpx.Client, i: int) -> list[float]:
        each: list[float] = []
        for _ in range(1 + N_ON_THE_WAY):
            began = time.perf_counter()
            times = complete(client, [32 + i] * options.prefix, 3 * options.answer)["timings"]
            inside = sum(times[name] for name in ("queue_ms", "prompt_ms", "predicted_ms"))
            each.append(time.perf_counter() - began - inside / 1e3)
        return each[1:]

    with fleet(options, AFFINITY, case) as client, ThreadPoolExecutor(CLIENTS) as pool:
        found = pool.map(partial(ask, client), range(CLIENTS))
        return [seconds for each in found for seconds in each]


def live(options: argparse.Namespace, router: str, case: Case) -> Measured:
    with fleet(options, router, case) as client:
        others = OtherCores(descendants())
        before, began = metrics_of(client.get("/metrics").text), time.perf_counter()
        talk(client, order(case.seed, options.rounds), case.seed, sizes_of(options))
        seconds, other_cpu = time.perf_counter() - began, others.used()
        after = metrics_of(client.get("/metrics").text)
    hits, known = (after[name] - before[name] for name in (HITS, QUERIES))
    detail = {"hit_rate": hits / known, "other_cpu": other_cpu}
    return Measured(0.0, seconds, {"n_kv_max": sizes_of(options).n_cells}, detail)
