"""Policies on every shipped profile, simulated: the default beside one that counts only tokens.

"counted" is `sarathi:budget=512`: every stream has a row at each step, prompts the rest of an
ubatch, and the cost model is not asked. Steady: n streams decode, and no other comes. Mixed:
Poisson arrivals, prompts of about 256 and answers of about 128 tokens, at a share of what the
device can do; throughput is all tokens over the time to the last one. Clients: as many as there are
slots, which ask again when they have their answer, prompts of 64 to 256 and answers of 32 to 128
tokens, as the live ones of `bench width`. The same arguments give the same figures, to the last
bit.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench import harness
from bench.case import NO_CONTEXT, Arm, Case, Measured, ModelFile
from bench.options import add_run, numbers
from bench.targets import Figure, Target
from bench.views import failures
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import shipped_names, shipped_profile
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import Table
from pyllamabatch.scheduler.policies import DEFAULT
from pyllamabatch.sim import EngineSpec, TraceRequest, simulate, workload

COUNTED = "sarathi:budget=512"
POLICIES = (COUNTED, DEFAULT, "fcfs", "sarathi")
N_SEQ_MAX, N_CELLS, N_UBATCH = 32, 65536, 512
STREAMS, LOADS, CLIENTS = "1-20,24,28,32", "0.5,0.8,1.5", "4,8,16,32"
STEADY_PROMPT, STEADY_TOKENS = 128, 512
MIXED_PROMPT, MIXED_TOKENS = 256, 128
CLIENT_PROMPT, CLIENT_TOKENS, CLIENT_ROUNDS = (64, 256), (32, 128), 12  # from, to; requests of each
M2 = "m2-ultra-gemma-3-4b-it-qat"
QUICK = {"profiles": M2, "streams": "8,9,12", "loads": "0.8", "clients": "8"}


def ratio(profile: str, n: int, name: str = "speed_tg") -> Figure:
    """Of the default's figure over that of "counted": steady, n streams, this profile."""

    def figure(records: Sequence[Record]) -> float | None:
        found = pairs(records, name)
        return found.get((profile, f"steady {n}"))

    return figure


def worst(records: Sequence[Record]) -> float | None:
    """The smallest ratio of throughput, of all profiles and loads."""
    found = pairs(records, "speed_tg")
    return min(found.values()) if found else None


def pairs(records: Sequence[Record], name: str) -> dict[tuple[str, str], float]:
    """The default's figure over that of "counted", by profile and load: of the record, or of
    its `detail`."""
    values: dict[tuple[str, str, str], float] = {}
    for record in records:
        value = record.detail[name] if name in record.detail else float(getattr(record, name))
        values[record.model_filename, load_of(record), record.arm] = value
    return {
        (profile, load): value / values[profile, load, COUNTED]
        for (profile, load, arm), value in values.items()
        if arm == DEFAULT and values.get((profile, load, COUNTED))
    }


def load_of(record: Record) -> str:
    share = record.detail["load"]
    if share:
        return f"mixed {share:g}"
    return f"{'clients' if record.detail.get('clients') else 'steady'} {record.pl}"


TARGETS = (
    *(
        Target(f"M2 Ultra, gemma-3-4b, {n} streams: default over counted", ratio(M2, n), 1.2)
        for n in range(9, 14)  # from 14 on no choice of rows is so much faster than all at once
    ),
    *(
        Target(
            f"M2 Ultra, gemma-3-4b, {n} streams: p99 of the ITL, default over counted",
            ratio(M2, n, "itl_p99_s"),
            at_most=1.0,
        )
        for n in range(9, 17)
    ),
    Target("every profile and load: default over counted, the smallest", worst, 0.99),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profiles", default=",".join(shipped_names()), help="comma separated")
    parser.add_argument("--streams", default=STREAMS, help="that decode: numbers and ranges")
    parser.add_argument("--loads", default=LOADS, help="shares of what the device can do")
    parser.add_argument("--clients", default=CLIENTS, help="that ask again: numbers and ranges")
    parser.add_argument("--policies", default=";".join(POLICIES), help="separated by ;")
    parser.add_argument("--requests", type=int, default=300, help="of a mixed load")
    parser.add_argument("--kv", choices=["unified", "streams"], default="unified")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    includes = (
        "simulate(): Scheduler and policy with the profile's cost model; load 0: pl streams, or pl "
        "clients; else Poisson arrivals at that share of what the device can do, pl slots"
    )
    policies = options.policies.split(";")
    arms = [Arm(name, includes, partial(simulated, name), sampling=False) for name in policies]
    return harness.run(
        options,
        arms,
        [case for name in options.profiles.split(",") for case in cases_of(name, options)],
        harness.facts_of(),
        "default over counted: throughput (p99 of the ITL)",
        subject="shipped-simulated",
    )


@dataclass(frozen=True)
class Load(Case):
    """`pl`: streams, slots or clients; `share`: of what the device can do."""

    cost: CostModel = field(kw_only=True)
    requests: list[TraceRequest] = field(kw_only=True)
    share: float = 0.0
    clients: bool = False


def cases_of(name: str, options: argparse.Namespace) -> Iterator[Load]:
    """Every load of a profile."""
    unified = options.kv == "unified"
    profile = shipped_profile(name)
    if not any(sample.unified == unified for sample in profile.samples):
        profile = profile.only(unified=not unified)
    cost = CostModel.fit(profile, unified=unified, n_ubatch=N_UBATCH)

    def load(pp: int, tg: int, pl: int, requests: list[TraceRequest], **kind: Any) -> Load:
        model = ModelFile(Path(name))
        return Load(
            model, pp, tg, pl, 1, "none", options.seed, cost.unified, n_ubatch=N_UBATCH,
            cost=cost, requests=requests, **kind,
        )  # fmt: skip

    for n in streams_of(options.streams):
        yield load(STEADY_PROMPT, STEADY_TOKENS, n, steady(n))
    for share in (float(word) for word in options.loads.split(",") if word):
        requests = mixed(cost, share, options.requests, options.seed)
        yield load(MIXED_PROMPT, MIXED_TOKENS, N_SEQ_MAX, requests, share=share)
    pp, tg = sum(CLIENT_PROMPT) // 2, sum(CLIENT_TOKENS) // 2
    for n in streams_of(options.clients):
        yield load(pp, tg, n, clients(n, options.seed), clients=True)


def simulated(policy: str, load: Load) -> Measured:
    """t_tg: the time that tg tokens of each stream take at the throughput of the load."""
    spec = EngineSpec.of(
        load.cost,
        n_seq_max=load.pl if load.clients else N_SEQ_MAX,
        n_cells=N_CELLS,
        n_ubatch=N_UBATCH,
        unified=load.kv_unified,
        prefix_cache=False,
    )
    found = simulate(load.requests, spec, policy).summary()
    detail = {
        "load": load.share,
        "clients": float(load.clients),
        "duration_s": found["duration"],
        "itl_p50_s": found["itl_p50"],
        "itl_p99_s": found["itl_p99"],
        "ttft_p50_s": found["ttft_p50"],
        "ttft_p99_s": found["ttft_p99"],
        "e2el_mean_s": found["e2el_mean"],
        "rows_mean": found["rows_mean"],
    }
    seconds = load.tg * load.pl / found["tokens_per_s"]
    return Measured(0.0, seconds, NO_CONTEXT | {"n_kv_max": N_CELLS}, detail)


def streams_of(words: str) -> list[int]:
    """ "1-3,8": 1, 2, 3, 8."""
    found: list[int] = []
    for word in filter(None, words.split(",")):
        first, _, last = word.partition("-")
        found += range(numbers(first)[0], numbers(last or first)[0] + 1)
    return found


def steady(n: int) -> list[TraceRequest]:
    return workload.draw(
        f"closed:clients={n},n={n},prompt={STEADY_PROMPT},output={STEADY_TOKENS}", seed=1
    )


def mixed(cost: CostModel, share: float, n: int, seed: int) -> list[TraceRequest]:
    """`share`: of the requests in a second that 16 rows at a time, and whole ubatches of prompts,
    would end."""
    decode = cost.predict(16, 0, 16 * (MIXED_PROMPT + MIXED_TOKENS / 2), 16) / 16
    prompt = cost.predict(N_UBATCH, N_UBATCH - 1, 16 * MIXED_PROMPT, 2) / N_UBATCH
    rate = share / (MIXED_TOKENS * decode + MIXED_PROMPT * prompt)
    lengths = f"prompt={MIXED_PROMPT}~0.8,output={MIXED_TOKENS}~0.8"
    return workload.draw(f"poisson:rate={rate},n={n},{lengths}", seed)


def clients(n: int, seed: int) -> list[TraceRequest]:
    lengths = "prompt={}-{},output={}-{}".format(*CLIENT_PROMPT, *CLIENT_TOKENS)
    return workload.draw(f"closed:clients={n},n={n * CLIENT_ROUNDS},{lengths}", seed)


def view(records: Sequence[Record]) -> str:
    """Ratios of the default over counted: throughput, and p99 of the ITL in brackets where they
    are not the same."""
    good = [record for record in records if not record.error]
    loads = list(dict.fromkeys(map(load_of, good)))
    speed, itl = pairs(good, "speed_tg"), pairs(good, "itl_p99_s")

    def cell(name: str, load: str) -> str:
        value, wait = speed.get((name, load)), itl.get((name, load))
        if value is None or wait is None:
            return ""
        same = round(value, 3) == 1 and round(wait, 2) == 1
        return "1" if same else f"{value:.2f} ({wait:.2f})"

    names = dict.fromkeys(record.model_filename for record in good)
    lines = [[name, *(cell(name, load) for load in loads)] for name in names]
    return "\n".join([Table(["profile", *loads], lines).markdown(), *failures(records)])
