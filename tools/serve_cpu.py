"""CPU time of `pyllamabatch serve` for a streamed token: of its event loop, and of the engine.

    python -m tools.serve_cpu                      # 64 streams of 200 tokens, five times
    python -m tools.serve_cpu --streams 16 --path /v1/chat/completions

It starts a server over the embedded model, with one thread to compute, and prints a line of JSON
for each repeat, in microseconds a token. Linux.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.cache import cache_folder
from bench.posting import posted
from bench.serving import ServerProcess


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU time so far, of the thread of the event loop and of the others."""
    found = {"event loop": 0.0, "engine": 0.0}
    for task in Path(f"/proc/{pid}/task").iterdir():
        ran_ns = int((task / "schedstat").read_text().split()[0])
        found["event loop" if task.name == str(pid) else "engine"] += ran_ns / 1e9
    return found


async def stream(url: str, path: str, n: int, seed: int) -> int:
    """One answer. Returns its events of tokens."""
    ask: dict[str, Any] = {"max_tokens": n, "ignore_eos": True, "stream": True, "seed": seed}
    text = f"Tell me about {seed} zebras."
    if "chat" in path:
        ask["messages"] = [{"role": "user", "content": text}]
    else:
        ask["prompt"] = text
    async with posted(url, path, json.dumps(ask).encode(), limit=2**22) as reader:
        data = await reader.read()
    if b"[DONE]" not in data:
        raise RuntimeError(f"an answer that is not whole: {data[:300]!r}")
    return data.count(b"data: ") - 2


async def measure(pid: int, url: str, args: argparse.Namespace, repeat: int) -> dict[str, Any]:
    before, began = cpu_seconds(pid), time.perf_counter()
    streams = (stream(url, args.path, args.tokens, 1000 * repeat + i) for i in range(args.streams))
    n_events = sum(await asyncio.gather(*streams))
    seconds, after = time.perf_counter() - began, cpu_seconds(pid)
    n = args.streams * args.tokens
    each = {kind: round(1e6 * (after[kind] - before[kind]) / n, 1) for kind in sorted(after)}
    return {
        "path": args.path, "streams": args.streams, "tokens": n, "events": n_events,
        "tokens_per_s": round(n / seconds), "us_per_token": each,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=64, metavar="N")
    parser.add_argument("--tokens", type=int, default=200, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--path", default="/v1/completions")
    args = parser.parse_args()
    command = [sys.executable, "-m", "pyllamabatch", "serve", "-np", str(args.streams),
               "-c", str(512 * args.streams), "-t", "1"]  # fmt: skip
    server = ServerProcess(command, cache_folder("logs") / "serve-cpu.log")
    try:
        for repeat in range(args.repeats):
            row = asyncio.run(measure(server.pid, server.url, args, repeat))
            print(json.dumps(row), flush=True)
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
