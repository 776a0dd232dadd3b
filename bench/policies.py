"""Policies on every shipped profile, simulated: the default beside the same one that counts only
tokens, and others.

"counted" is `sarathi:budget=512`: every stream has a row at each step, prompts the rest of an
ubatch, and the cost model is not asked. Steady: n streams decode, and no other request comes.
Mixed:
Poisson arrivals, prompts of about 256 and answers of about 128 tokens, at a share of what the
device can do; throughput is all tokens over the time to the last one. Clients: as many as there are
slots, who ask again when they have their answer, prompts of 64 to 256 and answers of 32 to 128
tokens, as the live ones of `bench width`. The same arguments give the same figures, to the last
bit.
"""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench import schema
from bench.options import add_run, numbers, out_file
from bench.targets import Figure, Target, judged
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import shipped_names, shipped_profile
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

    def figure(rows: Sequence[schema.Row]) -> float | None:
        found = pairs(rows, name)
        return found.get((profile, f"steady {n}"))

    return figure


def worst(rows: Sequence[schema.Row]) -> float | None:
    """The smallest ratio of throughput, of all profiles and loads."""
    found = pairs(rows, "speed_tg")
    return min(found.values()) if found else None


def pairs(rows: Sequence[schema.Row], name: str) -> dict[tuple[str, str], float]:
    """The default's figure over that of "counted", by profile and load: of the row, or of its
    `detail`."""
    values: dict[tuple[str, str, str], float] = {}
    for row in rows:
        value = row.detail[name] if name in row.detail else float(getattr(row, name))
        values[row.model_filename, load_of(row), row.arm] = value
    return {
        (profile, load): value / values[profile, load, COUNTED]
        for (profile, load, arm), value in values.items()
        if arm == DEFAULT and values.get((profile, load, COUNTED))
    }


def load_of(row: schema.Row) -> str:
    share = row.detail["load"]
    if share:
        return f"mixed {share:g}"
    return f"{'clients' if row.detail.get('clients') else 'steady'} {row.pl}"


TARGETS = (
    *(
        Target(f"M2 Ultra, gemma-3-4b, {n} streams: default over counted", ratio(M2, n), 1.2)
        for n in range(9, 17)
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
    out = out_file(options, "policies", "shipped", "simulated")
    rows = []
    for row in measure(options):
        schema.append(out, [row])
        rows.append(row)
        print(in_words(row), file=sys.stderr)
    print(view(rows))
    print(judged(TARGETS, rows, ".3f"), end="")
    print(f"\nrows: {out}")
    return 0


def measure(options: argparse.Namespace) -> Iterator[schema.Row]:
    run_id = uuid.uuid4().hex[:12]
    unified = options.kv == "unified"
    shares = [float(word) for word in options.loads.split(",") if word]
    for name in options.profiles.split(","):
        profile = shipped_profile(name)
        if not any(sample.unified == unified for sample in profile.samples):
            profile = profile.only(unified=not unified)
        cost = CostModel.fit(profile, unified=unified, n_ubatch=N_UBATCH)
        loads = [
            *(Load(n, steady(n)) for n in streams_of(options.streams)),
            *(
                Load(N_SEQ_MAX, mixed(cost, share, options.requests, options.seed), share)
                for share in shares
            ),
            *(Load(n, clients(n, options.seed), clients=True) for n in streams_of(options.clients)),
        ]
        for load in loads:
            for policy in options.policies.split(";"):
                yield row_of(name, cost, policy, load, options, run_id)


class Load(NamedTuple):
    """pl: streams, slots or clients; share: of what the device can do."""

    pl: int
    requests: list[TraceRequest]
    share: float = 0.0
    clients: bool = False

    @property
    def n_seq_max(self) -> int:
        return self.pl if self.clients else N_SEQ_MAX


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


def row_of(
    name: str, cost: CostModel, policy: str, load: Load, options: argparse.Namespace, run_id: str
) -> schema.Row:
    unified, n = cost.unified, load.pl
    machine = EngineSpec.of(
        cost, n_seq_max=load.n_seq_max, n_cells=N_CELLS, n_ubatch=N_UBATCH, unified=unified,
        prefix_cache=False,
    )  # fmt: skip
    found = simulate(load.requests, machine, policy).summary()
    pp, tg = STEADY_PROMPT, STEADY_TOKENS
    if load.share:
        pp, tg = MIXED_PROMPT, MIXED_TOKENS
    elif load.clients:
        pp, tg = sum(CLIENT_PROMPT) // 2, sum(CLIENT_TOKENS) // 2
    # t_tg: the time that tg tokens of each stream take at this throughput
    seconds = tg * n / found["tokens_per_s"]
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
    return schema.Row(
        bench="policies",
        arm=policy,
        includes="simulate(): Scheduler and policy with the profile's cost model; load 0: pl "
        "streams, or pl clients; else Poisson arrivals at that share of what the device can do, pl "
        "slots",
        run_id=run_id,
        repeat=0,
        sampling="none",
        **schema.machine(),
        **schema.build(),
        **schema.now(),
        model_filename=name,
        model_type="",
        model_size=0,
        model_n_params=0,
        model_seed=None,
        seed=options.seed,
        n_kv_max=N_CELLS,
        n_batch=2048,
        n_ubatch=N_UBATCH,
        flash_attn=-1,
        kv_unified=unified,
        type_k="",
        type_v="",
        n_gpu_layers=0,
        n_threads=1,
        n_threads_batch=1,
        pp=pp,
        tg=tg,
        pl=n,
        n_kv=n * (pp + tg),
        detail=detail,
        **schema.speeds(pp=pp, tg=tg, pl=n, t_pp=0.0, t_tg=seconds),
    )


def in_words(row: schema.Row) -> str:
    return (
        f"{row.model_filename:<44} {load_of(row):<10} {row.arm:<20} {row.speed_tg:8.1f} tok/s, "
        f"ITL p99 {1e3 * row.detail['itl_p99_s']:7.1f} ms, E2EL {row.detail['e2el_mean_s']:.2f} s"
    )


def view(rows: Sequence[schema.Row]) -> str:
    """Ratios of the default over counted: throughput, and p99 of the ITL in brackets where they
    are not the same."""
    loads = list(dict.fromkeys(map(load_of, rows)))
    speed, itl = pairs(rows, "speed_tg"), pairs(rows, "itl_p99_s")
    lines = [
        "| profile | " + " | ".join(loads) + " |",
        "|---|" + "---:|" * len(loads),
    ]
    for name in dict.fromkeys(row.model_filename for row in rows):
        cells = []
        for load in loads:
            value, wait = speed.get((name, load)), itl.get((name, load))
            if value is None or wait is None:
                cells.append("")
            elif round(value, 3) == 1 and round(wait, 2) == 1:
                cells.append("1")
            else:
                cells.append(f"{value:.2f} ({wait:.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
