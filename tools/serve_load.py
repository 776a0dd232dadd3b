"""Load on `pyllamabatch serve`: many connections, clients that leave, and bad ones.

    python -m tools.serve_load                          # 10,000 requests over 1,000 connections
    python -m tools.serve_load --requests 500 --connections 100

It starts a server over the embedded model and prints a line of JSON: answers by kind, the 99th
percentile of `/health` meanwhile, memory before and after. It ends with 1 where the server has
ended, an answer is missing, counters don't balance, cells are left, or memory has grown.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Any

from bench.posting import posted

HOST = "127.0.0.1"
LEAVE = 0.05  # share of clients that leave in the middle
SLOW = 0.02  # share that reads a few bytes at a time
BAD_BODIES = (
    b'{"prompt": "\xff\xfe"}',
    b"[" * 200_000,
    b'{"prompt": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    b"not JSON",
    b'{"prompt": "a", "n": 100000}',
)
HUGE_MIB = 50
MIB_OF_BODY = b"a" * 2**20
HUGE_BODIES = {  # its length is said, or seen while it is read
    b"Content-Length: %d" % (HUGE_MIB * 2**20): MIB_OF_BODY,
    b"Transfer-Encoding: chunked": b"%x\r\n%b\r\n" % (len(MIB_OF_BODY), MIB_OF_BODY),
}
GROWTH_MIB = 32  # of memory, at most: less than the part of one huge body that is read


class Load:
    def __init__(self, port: int, connections: int) -> None:
        self.port = port
        self.kinds: Counter[str] = Counter()
        self.health_s: list[float] = []
        self._room = asyncio.Semaphore(connections)
        self._random = random.Random(7)
        self._posted = partial(posted, f"http://{HOST}:{port}", "/v1/completions")

    async def run(self, n_requests: int) -> None:
        done = asyncio.Event()
        watch = asyncio.create_task(self._watch_health(done))
        half_open = [await asyncio.open_connection(HOST, self.port) for _ in range(20)]
        for _, writer in half_open[:10]:  # a head that never ends, and one without its body
            writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Le")
        for _, writer in half_open[10:]:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
        bad = [self._counted("bad", self._bad(body)) for body in BAD_BODIES]
        bad += [self._counted("huge", self._huge(head)) for head in HUGE_BODIES for _ in range(2)]
        await asyncio.gather(*(self._request() for _ in range(n_requests)), *bad)
        for _, writer in half_open:
            writer.close()
        done.set()
        await watch

    async def _request(self) -> None:
        async with self._room:
            dice = self._random.random()
            kind = "left" if dice < LEAVE else "slow" if dice < LEAVE + SLOW else "answered"
            await self._counted(kind, self._completion(kind))

    async def _counted(self, kind: str, request: Any) -> None:
        try:
            self.kinds[f"{kind} {await asyncio.wait_for(request, 600)}"] += 1
        except Exception as error:
            self.kinds[f"{kind} {type(error).__name__}"] += 1

    async def _completion(self, kind: str) -> str:
        prompt = f"What is {self._random.randrange(99)} + {self._random.randrange(99)}?"
        n = self._random.randrange(4, 24)
        stream = kind != "answered" or self._random.random() < 0.5
        body = {"prompt": prompt, "max_tokens": n, "ignore_eos": True, "stream": stream}
        async with self._posted(json.dumps(body).encode()) as reader:
            status = await status_of(reader)
            if kind == "left":
                await reader.read(64)
                return status
            data = b""
            while part := await reader.read(32 if kind == "slow" else 65536):
                data += part
                if kind == "slow":
                    await asyncio.sleep(0.01)
            whole = b"[DONE]" in data if stream else data.rstrip().endswith(b"}")
            return status if status != "200" or whole else "incomplete"

    async def _bad(self, body: bytes) -> str:
        async with self._posted(body) as reader:
            return await status_of(reader)

    async def _huge(self, head: bytes) -> str:
        """It is sent to its end, whatever is answered meanwhile."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + head + b"\r\n\r\n")
        answer = asyncio.create_task(status_of(reader))
        with suppress(ConnectionError):  # the server may close it
            for _ in range(HUGE_MIB):
                writer.write(HUGE_BODIES[head])
                await writer.drain()
        status = await answer
        writer.close()
        return status

    async def _watch_health(self, done: asyncio.Event) -> None:
        reader, writer = await asyncio.open_connection(HOST, self.port)
        while not done.is_set():
            began = time.perf_counter()
            writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            await reader.readuntil(b"}")
            self.health_s.append(time.perf_counter() - began)
            await asyncio.sleep(0.02)
        writer.close()


async def status_of(reader: asyncio.StreamReader) -> str:
    return (await reader.readline()).split()[1].decode()


async def fetch(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    return answer.partition("\r\n\r\n")[2]


async def metrics(port: int) -> dict[str, float]:
    return metrics_of(await fetch(port, "/metrics"))


def metrics_of(text: str) -> dict[str, float]:
    """The values of Prometheus' text format by their names, labels included."""
    lines = (line for line in text.splitlines() if ":" in line and not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def measure(pid: int, port: int, args: argparse.Namespace) -> dict[str, Any]:
    import psutil

    server = psutil.Process(pid)
    warm = Load(port, args.connections)
    await warm.run(min(args.requests, args.connections))
    memory = server.memory_info().rss
    load, began = Load(port, args.connections), time.perf_counter()
    await load.run(args.requests)
    seconds = time.perf_counter() - began
    for _ in range(100):  # who left is cancelled within a step
        found = await metrics(port)
        if found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0:
            break
        await asyncio.sleep(0.05)
    health = sorted(load.health_s)
    busy = json.loads(await fetch(port, "/slots"))
    return {
        "requests": args.requests,
        "connections": args.connections,
        "seconds": round(seconds, 2),
        "answers": dict(sorted(load.kinds.items())),
        "health_p99_ms": round(1e3 * health[int(0.99 * (len(health) - 1))], 1),
        "memory_mib": [round(memory / 2**20), round(server.memory_info().rss / 2**20)],
        "running": found["vllm:num_requests_running"],
        "waiting": found["vllm:num_requests_waiting"],
        "kv_in_use": found["vllm:kv_cache_usage_perc"],
        "busy_slots": sum(slot["is_processing"] for slot in busy),
    }


def problems(result: dict[str, Any]) -> list[str]:
    fine = "answered 200", "slow 200", "left 200", "bad 400", "huge 413"
    found = [f"{kind}: {n}" for kind, n in result["answers"].items() if kind not in fine]
    names = ("running", "waiting", "kv_in_use", "busy_slots")
    found += [f"{name}={result[name]}" for name in names if result[name]]
    before, after = result["memory_mib"]
    return found + ([f"memory: {before} MiB, then {after}"] if after > before + GROWTH_MIB else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=10_000, metavar="N")
    parser.add_argument("--connections", type=int, default=1000, metavar="N")
    parser.add_argument("--slots", type=int, default=64, metavar="N")
    args = parser.parse_args()
    command = [sys.executable, "-m", "pyllamabatch", "serve", "--port", "0", "-np", str(args.slots),
               "-c", str(256 * args.slots), "-t", "1", "--max-waiting", "100000"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[1].rstrip(",").rpartition(":")[2])
        result = asyncio.run(measure(process.pid, port, args))
        alive = process.poll() is None
        process.terminate()
        status = process.wait(60)
    print(json.dumps(result))
    wrong = problems(result) + ([] if alive and status == 0 else [f"it ended with {status}"])
    for problem in wrong:
        print(f"serve_load: {problem}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
