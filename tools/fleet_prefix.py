"""How much of their prompts a fleet has cached: our router beside round robin.

    python -m tools.fleet_prefix                # two replicas of the embedded model on Ray Serve

32 chats of 8 users, whose chats begin with the user's own system prompt. Turn by turn, all chats
ask in another order, eight at once. The cells of both replicas hold what all chats have said once,
not twice. Prints a line of JSON for each router, and the ratio of their hit rates. Wants the extra
`ray`.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

USERS, CHATS, TURNS, AT_ONCE = 8, 32, 4, 8
N_SYSTEM, N_QUESTION, N_ANSWER = 80, 12, 16  # words, words, tokens
N_CELLS = 9216  # of a replica
WORDS = ("zebra", "lion", "giraffe", "river", "stone", "cloud", "apple", "bread", "green", "seven")
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


@contextmanager
def fleet(router: str, n: int) -> Iterator[httpx.Client]:
    command = [sys.executable, "-m", "pyllamabatch", "serve", "--port", "0", "-t", "1", "-np", "4",
               "--kv-unified", "-c", str(N_CELLS), "--replicas", str(n),
               "--router", router]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        try:
            with httpx.Client(base_url=line.split()[1].rstrip(","), timeout=600) as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)


def counters(client: httpx.Client) -> dict[str, float]:
    """Of all replicas together."""
    found: dict[str, float] = {}
    for line in client.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if name in (HITS, QUERIES):
            found[name] = float(value)
    return found


def talk(client: httpx.Client, seed: int) -> None:
    """Every chat to its end."""
    rng = random.Random(seed)

    def words(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n)) + ". "

    systems = [words(N_SYSTEM) for _ in range(USERS)]
    chats = [systems[i % USERS] for i in range(CHATS)]

    def turn(i: int) -> None:
        body = {"prompt": chats[i], "max_tokens": N_ANSWER, "ignore_eos": True, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
        answer.raise_for_status()
        chats[i] += answer.json()["choices"][0]["text"]

    for _ in range(TURNS):
        order = rng.sample(range(CHATS), CHATS)
        for i in order:
            chats[i] += words(N_QUESTION)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(turn, order))


def measure(router: str, args: argparse.Namespace) -> dict[str, Any]:
    with fleet(router, args.replicas) as client:
        before = counters(client)
        talk(client, args.seed)
        after = counters(client)
    hits, queries = (after[name] - before[name] for name in (HITS, QUERIES))
    return {
        "router": router, "replicas": args.replicas, "requests": CHATS * TURNS,
        "prompt_tokens": queries, "cached_tokens": hits, "hit_rate": round(hits / queries, 4),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--replicas", type=int, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="S")
    args = parser.parse_args()
    rows = [measure(router, args) for router in ("round-robin", "prefix-affinity")]
    for row in rows:
        print(json.dumps(row))
    print(json.dumps({"ratio": round(rows[1]["hit_rate"] / rows[0]["hit_rate"], 3)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
