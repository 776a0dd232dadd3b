"""A fleet with common prefixes, live and simulated by the same router: prefix hits and tokens/s.

    python -m tools.fleet_prefix                          # two replicas of the embedded model
    python -m tools.fleet_prefix -m FILE.gguf --profile P.json
    python -m tools.fleet_prefix --machine m2-ultra-gemma-3-4b-it-qat

Each replica on a profile machine has a GPU of its own, as a simulated one has.

32 chats of 8 users. All chats of a user begin with the user's own long prefix, as a system prompt
and its tools are. Eight clients have four chats each, of four users, and ask one after the other.
The cells of each replica hold the prefixes of half of the users, so that those of all fit into the
fleet once, not twice.

For each seed and router it prints two lines of JSON: the simulated fleet with a profile of this
machine (`pyllamabatch calibrate -t 1 --layout unified`), and the live one on Ray Serve. Then, of
all seeds, the ratio of the routers' hit rates, and how far the simulation is off. Wants the extra
`ray`.

The clients begin at once, and a live fleet meets them in any order: which prefix lies where follows
from that, and so does the hit rate of a run. The simulation is the mean of many orders,
`hit_rate_sd` what one run differs by.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import fmean, stdev
from typing import Any, NamedTuple

import httpx

from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import Profile, load_profile
from pyllamabatch.sim import EngineSpec, TraceRequest, simulate
from tools.serve_load import metrics_of

USERS, CHATS, CLIENTS, TURNS = 8, 32, 8, 4
N_PREFIX, N_QUESTION, N_ANSWER = 800, 12, 16  # tokens
N_SLOTS = 4  # of a replica
N_ORDERS = 16  # of the clients, that are simulated
N_CHAT = TURNS * (N_QUESTION + N_ANSWER)
N_CELLS = (USERS // 2) * N_PREFIX + (CHATS // 2) * N_CHAT + N_SLOTS * N_CHAT  # of a replica
ROUTERS = "round-robin", "prefix-affinity"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


class Asked(NamedTuple):
    """A turn of a chat of a user, by a client."""

    client: int
    user: int
    chat: int
    turn: int


def order(seed: int) -> list[list[Asked]]:
    """What each client asks, one after the other: turn by turn, its chats in another order."""
    rng = random.Random(seed)
    found: list[list[Asked]] = []
    for client in range(CLIENTS):
        chats = [client + CLIENTS * i for i in range(CHATS // CLIENTS)]
        found.append([
            Asked(client, (chat + chat // CLIENTS) % USERS, chat, turn)
            for turn in range(TURNS) for chat in rng.sample(chats, len(chats))
        ])  # fmt: skip
    return found


# -- simulated


def trace(asked: Sequence[Sequence[Asked]]) -> list[TraceRequest]:
    """The same requests; pieces of users, questions and answers are numbers of their own."""
    found: list[TraceRequest] = []
    for ones in asked:
        after: int | None = None
        for one in ones:
            id = len(found)
            content = [(one.user, N_PREFIX)]
            for turn in range(one.turn + 1):
                piece = USERS + 2 * (one.chat * TURNS + turn)
                content += [(piece, N_QUESTION), (piece + 1, N_ANSWER)]
            *content, (answer, n_answer) = content
            n_prompt = sum(n for _, n in content)
            found.append(TraceRequest(id, 0.0, n_prompt, n_answer, tuple(content), answer, after))
            after = id
    return found


def simulated(router: str, profile: Profile, seed: int, replicas: int) -> dict[str, Any]:
    cost = CostModel.fit(profile, unified=True)
    spec = EngineSpec.of(cost, n_seq_max=N_SLOTS, n_cells=N_CELLS, unified=True)
    rng, rates, seconds = random.Random(seed), list[float](), list[float]()
    for _ in range(N_ORDERS):
        clients = order(seed)
        rng.shuffle(clients)
        run = simulate(trace(clients), spec, n_replicas=replicas, router=router)
        counters = [load.counters for load in run.loads]
        known = sum(c.known_tokens for c in counters)
        rates.append(sum(c.prefix_tokens for c in counters) / known)
        seconds.append(max(one.end for one in run.outcomes))
    mean = row("simulated", router, fmean(rates) * known, known, fmean(seconds))
    return {**mean, "hit_rate_sd": round(stdev(rates), 4)}


def row(fleet: str, router: str, hits: float, known: float, seconds: float) -> dict[str, Any]:
    return {
        "fleet": fleet, "router": router, "prompt_tokens": known, "cached_tokens": hits,
        "hit_rate": round(hits / known, 4), "seconds": round(seconds, 2),
        "tokens_per_s": round(CHATS * TURNS * N_ANSWER / seconds, 2),
    }  # fmt: skip


# -- live


@contextmanager
def fleet(router: str, args: argparse.Namespace) -> Iterator[httpx.Client]:
    model = ["-m", args.model] if args.model else []
    model += ["--machine", args.machine, "--gpus-per-replica", "1"] if args.machine else []
    command = [sys.executable, "-m", "pyllamabatch", "serve", "--port", "0", "-t", "1",
               "-np", str(N_SLOTS), "--kv-unified", "-c", str(N_CELLS), *model,
               "--replicas", str(args.replicas), "--router", router]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            with httpx.Client(base_url=line.split()[1].rstrip(","), timeout=600) as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)


def live(router: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    with fleet(router, args) as client:
        for _ in range(4 * args.replicas):  # their first requests are slower
            complete(client, [1, 2, 3])
        before, began = metrics_of(client.get("/metrics").text), time.perf_counter()
        talk(client, order(seed), seed)
        seconds = time.perf_counter() - began
        after = metrics_of(client.get("/metrics").text)
    hits, known = (after[name] - before[name] for name in (HITS, QUERIES))
    return row("live", router, hits, known, seconds)


def talk(client: httpx.Client, asked: Sequence[Sequence[Asked]], seed: int) -> None:
    """Every client to its end. Prompts are random tokens, and the answers that came."""
    rng = random.Random(seed)

    def drawn(n: int) -> list[int]:
        return [rng.randrange(32, 127) for _ in range(n)]

    prefixes = [drawn(N_PREFIX) for _ in range(USERS)]
    questions = [[drawn(N_QUESTION) for _ in range(TURNS)] for _ in range(CHATS)]
    chats: dict[int, list[int]] = {}

    def ask(ones: Sequence[Asked]) -> None:
        for one in ones:
            tokens = chats.setdefault(one.chat, list(prefixes[one.user]))
            tokens += questions[one.chat][one.turn]
            tokens += complete(client, tokens)

    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(ask, asked))


def complete(client: httpx.Client, tokens: list[int]) -> list[int]:
    body = {"prompt": tokens, "n_predict": N_ANSWER, "ignore_eos": True, "return_tokens": True}
    answer = client.post("/completion", json=body)
    answer.raise_for_status()
    found: list[int] = answer.json()["tokens"]
    return found


def pooled(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several seeds."""
    hits, known, seconds = (
        sum(row[name] for row in rows) for name in ("cached_tokens", "prompt_tokens", "seconds")
    )
    n_tokens = sum(row["tokens_per_s"] * row["seconds"] for row in rows)
    return {"hit_rate": hits / known, "tokens_per_s": n_tokens / seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-m", "--model", metavar="FILE")
    parser.add_argument("--profile", default=None, metavar="FILE|NAME", help="of this machine")
    parser.add_argument("--machine", metavar="NAME", help="a profile machine in place of this one")
    parser.add_argument("--replicas", type=int, default=2, metavar="N")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="1 to N, one by one (3)")
    parser.add_argument("--simulated-only", action="store_true")
    args = parser.parse_args()
    profile = load_profile(args.machine or args.profile)
    kinds = ["simulated"] if args.simulated_only else ["simulated", "live"]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in range(1, args.seeds + 1):
        for router in ROUTERS:
            for kind in kinds:
                one = (
                    live(router, seed, args)
                    if kind == "live"
                    else simulated(router, profile, seed, args.replicas)
                )
                print(json.dumps({"seed": seed, **one}), flush=True)
                rows.setdefault((kind, router), []).append(one)
    rates = {of: pooled(ones) for of, ones in rows.items()}
    for kind in kinds:
        ratio = rates[kind, ROUTERS[1]]["hit_rate"] / rates[kind, ROUTERS[0]]["hit_rate"]
        print(json.dumps({"fleet": kind, "hit_rate_over_round_robin": round(ratio, 3)}))
    for router in ROUTERS if not args.simulated_only else ():
        here, there = rates["live", router], rates["simulated", router]
        print(json.dumps({
            "router": router,
            "hit_rate_off_points": round(100 * (there["hit_rate"] - here["hit_rate"]), 2),
            "throughput_off": round(there["tokens_per_s"] / here["tokens_per_s"] - 1, 4),
        }))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
