"""A server with several replicas, a GPU each, over one with one: streamed answers to many clients.

Each replica has so many clients, which ask again at once: prompts of 100 to 400 tokens, answers of
32 to 224. The clients of a replica are a process of their own, so that twice as many take no more
time of each other. The speed is that of the whole fleet. On a profile machine (--machine) each
replica has a GPU of its own, too. Wants the extra `ray`.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.cache import cache_folder
from bench.case import Arm, Case, Measured, ModelFile, cases_of
from bench.models import resolve
from bench.options import add_file, add_run, numbers
from bench.posting import posted
from bench.profile_machine import ANSWERS, CLIENTS, PROMPTS
from bench.serving import ServerProcess, WrongAnswer, check, spread
from bench.targets import Target, speed_ratio
from bench.traffic import serve
from bench.views import Column, by_arm
from pyllamabatch.compare.case import request_body
from pyllamabatch.machine.profile_machine import ProfileMachine
from pyllamabatch.report.meters import OtherCores, descendants
from pyllamabatch.report.records import Record

BETWEEN = PROMPTS[CLIENTS], ANSWERS[CLIENTS]
TOKENS = 32, 127  # that prompts are made of: in every vocabulary
LAST_BYTES = 2**16  # of an answer: its last event, which has the prompt, is in them
STOP_S = 90.0  # Ray's processes end one after the other
INCLUDES = "`pyllamabatch serve --replicas N` without other options, over HTTP, streamed"
QUICK = {"machine": "nvidia-h200-gemma-3-1b-q4_k_m", "clients": 2, "requests": 1, "repeats": 1}
TARGETS = (
    Target(
        "two replicas over one, 64 clients each",
        speed_ratio("replicas-2", "replicas-1", 64),
        at_least=1.95,
    ),
)

Job = tuple[list[int], int]
"""A prompt, and tokens to generate."""
Answered = tuple[float, float, float]
"""When it was asked for, when its first token came, and its last."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.set_defaults(kv="the server's own choice")
    parser.add_argument("--replicas", default="1,2", metavar="N", help="comma separated")
    parser.add_argument("--clients", type=int, default=64, help="of each replica")
    parser.add_argument("--requests", type=int, default=8, help="for each client")
    parser.add_argument("--machine", default="", metavar="PROFILE", help="instead of a model")
    parser.add_argument("--sampling", choices=["greedy", "default"], default="default")
    add_run(parser, repeats=2)


def main(options: argparse.Namespace) -> int:
    about = harness.facts_of()
    if options.machine:
        file = ModelFile(Path(options.machine))
        about |= ProfileMachine.named(options.machine).facts()
    else:
        file = resolve(options.model)
    pp, tg = (options.requests * sum(each) // 2 for each in BETWEEN)
    (case,) = cases_of(options, file, pp, tg, [options.clients])
    arms = [
        Arm(f"replicas-{n}", INCLUDES, partial(run, options, n)) for n in numbers(options.replicas)
    ]
    title = f"{options.clients} clients for each replica, {options.requests} requests each"
    return harness.run(options, arms, [case], about, title, options.machine or None)


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("tok/s", lambda record: record.speed_tg, ".0f"),
        Column("TTFT p50, ms", "ttft_p50_s", scale=1e3),
        Column("p99", "ttft_p99_s", scale=1e3),
    )
    return by_arm(records, columns)


def run(options: argparse.Namespace, n: int, case: Case) -> Measured:
    """Of `n` replicas: the time for as many tokens as the clients of one have asked for."""
    command = [*serve(case, options.machine), "--replicas", str(n), "--gpus-per-replica", "1"]
    with ExitStack() as stack:
        server = ServerProcess(command, cache_folder("logs") / f"replicas-{n}.log", STOP_S)
        stack.callback(server.stop)
        clients = stack.enter_context(ProcessPoolExecutor(n, get_context("spawn")))

        def answers(which: int, requests: int) -> list[Answered]:
            each = [jobs(case, requests, n * which + i) for i in range(n)]
            found = clients.map(partial(ask_all, server.url, case.sampling), each)
            return [one for ones in found for one in ones]

        answers(1, 1)  # what the first requests would else pay for
        others = OtherCores(descendants())
        began, found = time.time(), answers(0, options.requests)
        other_cpu = others.used()
    seconds = max(end for _, _, end in found) - began
    waited = [first - asked for asked, first, _ in found]
    detail = {f"ttft_p{q}_s": float(np.percentile(waited, q)) for q in (50, 99)}
    return Measured(0.0, seconds / n, detail=detail | {"other_cpu": round(other_cpu, 3)})


def jobs(case: Case, requests: int, which: int) -> list[list[Job]]:
    """Of each client of a replica, in their order. Every replica's have the same sums."""
    draw, n = np.random.default_rng([case.seed, which]), case.pl * requests
    prompts, answers = (spread(draw, n, low, high) for low, high in BETWEEN)
    each = [
        (draw.integers(*TOKENS, n_prompt).tolist(), int(n_answer))
        for n_prompt, n_answer in zip(prompts, answers, strict=True)
    ]
    return [each[i :: case.pl] for i in range(case.pl)]


def ask_all(url: str, sampling: str, each: Sequence[Sequence[Job]]) -> list[Answered]:
    """The answers to what the clients ask, each one job after the other."""

    async def client(mine: Sequence[Job]) -> list[Answered]:
        return [await ask(url, request_body(sampling), *job) for job in mine]

    async def clients() -> list[list[Answered]]:
        return await asyncio.gather(*map(client, each))

    return [one for ones in asyncio.run(clients()) for one in ones]


async def ask(url: str, body: dict[str, Any], prompt: list[int], tokens: int) -> Answered:
    """A streamed answer, of which only the last event is read."""
    body |= {"prompt": prompt, "n_predict": tokens, "stream": True, "cache_prompt": False}
    asked, answer, first = time.time(), b"", 0.0
    async with posted(url, "/completion", json.dumps(body).encode()) as reader:
        while part := await reader.read(2**16):
            if not first and b"data: " in part:
                first = time.time()
            answer = (answer + part)[-LAST_BYTES:]
    try:
        last = json.loads(answer.rpartition(b"data: ")[2].partition(b"\n")[0])
        check((last["tokens_evaluated"], last["tokens_predicted"]), (len(prompt), tokens))
    except (ValueError, KeyError) as error:
        raise WrongAnswer(f"{answer[-300:]!r}") from error
    return asked, first, time.time()
