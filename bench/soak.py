"""Thousands of short requests from many threads, some cancelled: nothing lost or left over."""

import argparse
import gc
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bench import harness
from bench.arms import InProcess
from bench.case import I32, Arm, Case, Measured, cases_of
from bench.options import add_model, add_run
from bench.targets import Target, worst_detail
from bench.views import Column, by_arm
from pyllamabatch.engine.engine import Engine
from pyllamabatch.report.records import Record
from pyllamabatch.step.sampling_params import SamplingParams

QUICK = {"requests": 1500}
N_PROMPTS = 50  # different ones; what each gives is known from a run of its own
MARGIN = 1.0  # nats between the two most likely tokens: rounding can't turn it around
SETTLED = 0.2  # the share of the run after which memory should not grow any more


TARGETS = (
    Target("requests that got other tokens than alone", worst_detail("wrong"), None, 0, must=True),
    Target(
        "requests and tokens that no counter knows, or two",
        worst_detail("unbalanced"),
        at_most=0,
        must=True,
    ),
    Target("memory that grows, KiB per 1,000 requests", worst_detail("rss_slope_kib"), None, 64),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, model="default", kv="unified", threads=1)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--clients", type=int, default=64, help="threads that submit")
    parser.add_argument("--cancelled", type=float, default=0.05, help="share of the requests")
    parser.set_defaults(sampling="greedy")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    """1 when a token is wrong or a counter does not add up."""
    inside = InProcess.of(options)
    work = partial(soak, inside, options.requests, options.cancelled)
    arm = Arm("engine", "everything, from submit to the result in the client's thread", work)
    cases = cases_of(options, inside.file, 12, 16, [options.clients])
    title = f"{options.requests} requests from {options.clients} threads"
    return harness.run(options, [arm], cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    names = ("requests", "cancelled", "tokens", "sampled", "wrong", "unbalanced", "rss_slope_kib")
    columns = [Column(name, name, ".0f") for name in names]
    return by_arm(records, [*columns, Column("requests/s", "requests_per_s", ".1f")])


@dataclass(frozen=True)
class Expected:
    """A request, and the tokens that it gives when it is alone."""

    prompt: I32
    params: SamplingParams
    tokens: list[int]


def soak(inside: InProcess, n_requests: int, cancelled: float, case: Case) -> Measured:
    """`cancelled`: a share of the requests. RuntimeError and the like of a client are raised."""
    numbers = itertools.count()
    rss: list[tuple[int, int]] = []  # requests begun, bytes

    def client(k: int) -> Counter[str]:
        """Requests until there are no more: how often each finish reason was seen, and of all of
        them the tokens and those that were wrong."""
        seen, dice = Counter[str](), random.Random(k)
        while (i := next(numbers)) < n_requests:
            expected = each[i % len(each)]
            stream = engine.submit(expected.prompt, expected.params)
            if dice.random() < cancelled:
                time.sleep(dice.random() * 0.02)
                stream.cancel()
            shown = [token.token for token in stream] if i % 2 else None
            result = stream.result(120)
            seen[result.finish_reason] += 1
            seen["tokens"] += len(result.tokens)
            n = None if result.finish_reason == "length" else len(result.tokens)
            if result.tokens != expected.tokens[:n] or shown not in (None, result.tokens):
                seen["wrong"] += 1
                what = (
                    f"{result.finish_reason} {result.tokens}, shown {shown}, not {expected.tokens}"
                )
                print(f"request {i}: {what}", file=sys.stderr)
            if i % 100 == 0:
                rss.append((i, resident()))
        return seen

    with Engine(
        inside.model,
        n_seq_max=min(case.pl, 32),
        n_ctx=32 * 32,
        n_batch=256,
        n_ubatch=256,
        n_threads=case.n_threads,
        n_threads_batch=case.n_threads,
        kv_unified=case.kv_unified,
        n_trace=256,  # full before memory is looked at
        flash_attn_type="disabled",
        type_k="f32",
        type_v="f32",
    ) as engine:
        each = list(itertools.islice(decided(engine, case.seed), N_PROMPTS))
        before, start = engine.stats(), time.perf_counter()
        with ThreadPoolExecutor(case.pl) as threads:
            seen = sum(threads.map(client, range(case.pl)), Counter[str]())
        seconds, after = time.perf_counter() - start, engine.stats()
    finished = {name: n - before.finished[name] for name, n in after.finished.items()}
    sampled = after.tokens - before.tokens
    n_seen = sum(seen[name] for name in finished)
    unbalanced = sum(abs(n - seen[name]) for name, n in finished.items())
    unbalanced += abs(after.submitted - before.submitted - n_seen)
    unbalanced += after.waiting + after.running
    # A cancelled request may have sampled tokens that no client has seen.
    unbalanced += max(0, seen["tokens"] - sampled)
    return Measured(
        0.0,
        seconds,
        detail={
            "requests": float(n_seen),
            "cancelled": float(seen["cancelled"]),
            "tokens": float(seen["tokens"]),
            "sampled": float(sampled),
            "wrong": float(seen["wrong"]),
            "unbalanced": float(unbalanced),
            "kv_used": float(after.kv_used),
            "rss_slope_kib": slope(sorted(rss)),
            "requests_per_s": n_seen / seconds,
        },
    )


def decided(engine: Engine, seed: int) -> Iterator[Expected]:
    """Requests of different lengths that rounding can't turn around: at each of their tokens the
    most likely one is so by far."""
    prompts = np.random.default_rng(seed).integers(0, engine.model.n_vocab, (2000, 12))
    for i, prompt in enumerate(prompts.astype(np.int32)):
        params = SamplingParams(temperature=0, max_tokens=2 + i % 15, ignore_eog=True)
        asked = prompt[: 4 + i % 9]
        result = engine.submit(asked, replace(params, logprobs=2)).result(60)
        tops = [tuple(top.values()) for top in result.top_logprobs or ()]
        if min(first - second for first, second in tops) > MARGIN:
            yield Expected(asked, params, result.tokens)


def resident() -> int:
    """Bytes of this process in memory."""
    import psutil

    gc.collect()
    return int(psutil.Process().memory_info().rss)


def slope(rss: Sequence[tuple[int, int]]) -> float:
    """KiB per 1,000 requests: a line through what was resident once the run had settled."""
    first = SETTLED * rss[-1][0] if rss else 0
    late = [(n, size) for n, size in rss if n >= first]
    if len(late) < 3:
        print("too short for a slope of memory", file=sys.stderr)
        return 0.0
    n, size = np.array(late, dtype=float).T
    return float(np.polyfit(n, size, 1)[0] * 1000 / 1024)
