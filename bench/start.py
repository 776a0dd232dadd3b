"""From the start of a server's process to the first token of a streamed chat.

Nothing of the model is in the process before; the files are in the system's cache, as a start
before the first measured one has read them.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from bench import harness
from bench.arms import InProcess
from bench.cache import cache_folder
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_file, add_run, choose
from bench.posting import posted
from bench.serving import ServerProcess, WrongAnswer
from bench.targets import Target, median_detail
from bench.tools import tool
from bench.views import Column, by_arm
from pyllamabatch.compare.completion import HOST
from pyllamabatch.report.records import Record

OURS, BASE = "serve", "llama-server"
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": True}
QUICK = {"model": "default", "repeats": 1, "arms": OURS}
TARGETS = (
    Target(
        "s from start to first token, SmolLM2 on two cores",
        median_detail(OURS, "first_token_s"),
        at_most=3.0,
        where={"model_filename": "SmolLM2-135M", "n_cores": 2},
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser, "smollm2-135m")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.set_defaults(kv="the server's own choice", sampling="default")
    add_run(parser, repeats=5)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    arms = choose(options.arms, all_arms())
    cases = cases_of(options, inside.file, 0, 1, [1])
    for arm in arms:
        arm.run(cases[0])
    title = "from start to first token"
    return harness.run(options, arms, cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("healthy, s", "healthy_s", ".2f"),
        Column("first token, s", "first_token_s", ".2f"),
        Column("CPU time until then, s", "cpu_s", ".2f"),
    )
    return by_arm(records, columns)


def all_arms() -> list[Arm]:
    return [
        Arm(OURS, "`pyllamabatch serve` without other options", partial(run, our_server)),
        Arm(BASE, "the same of llama-server", partial(run, llama_server)),
    ]


def our_server(case: Case) -> list[str]:
    return [sys.executable, "-m", "pyllamabatch", "serve", "-q", "-m", str(case.model.path)]


def llama_server(case: Case) -> list[str]:
    return [str(tool("llama-server", log=False)), "--offline", "-m", str(case.model.path)]


def run(command: Callable[[Case], list[str]], case: Case) -> Measured:
    import psutil

    words = [*command(case), "--host", HOST, "-t", str(case.n_threads)]
    if case.n_gpu_layers >= 0:
        words += ["-ngl", str(case.n_gpu_layers)]
    began = time.perf_counter()
    server = ServerProcess(words, cache_folder("logs") / "start.log")
    try:
        healthy = time.perf_counter()
        asyncio.run(first_token(server.url))
        first, cpu = time.perf_counter(), psutil.Process(server.pid).cpu_times()
    finally:
        server.stop()
    detail = {
        "healthy_s": healthy - began, "first_token_s": first - began, "cpu_s": sum(cpu[:2]),
    }  # fmt: skip
    return Measured(0.0, first - began, detail=detail)


async def first_token(url: str) -> None:
    """Comes back when there is text. WrongAnswer when the answer ends without."""
    head = b""
    async with posted(url, "/v1/chat/completions", json.dumps(CHAT).encode()) as reader:
        async for line in reader:
            head += line
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    if choice["delta"].get("content"):
                        return
    raise WrongAnswer(f"{head[:300]!r}")
