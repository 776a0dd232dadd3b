"""Thousands of short requests from many threads, some cancelled: nothing lost or left over."""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from bench import harness
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run
from bench.targets import Target, worst_detail
from bench.views import Column, by_arm
from pyllamabatch.report.records import Record

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
    parser.add_argument("--limit", type=float, help="seconds after which no more begin (none)")
    parser.set_defaults(sampling="greedy")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    """1 when a token is wrong or a counter does not add up."""
    inside = InProcess.of(options)
    work = partial(soak, inside, options.requests, options.cancelled, options.limit)
    arm = Arm("engine", "everything, from submit to the result in the client's thread", work)
    cases = cases_of(options, inside.file, 12, 16, [options.clients])
    title = f"{options.requests} requests from {options.clients} threads"
    return harness.run(
        "soak", [arm], cases, inside.facts(), options, view=view, targets=TARGETS, title=title
    )


def view(records: Sequence[Record]) -> str:
    names = ("requests", "cancelled", "tokens", "sampled", "wrong", "unbalanced", "rss_slope_kib")
    columns = [Column(name, name, ".0f") for name in names]
    return by_arm(records, [*columns, Column("requests/s", "requests_per_s", ".1f")])


@dataclass
class Tally:
    """What the clients saw."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    finished: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    rss: list[tuple[int, int]] = field(default_factory=list)  # requests done, bytes

    @property
    def n(self) -> int:
        return sum(self.finished.values())


def soak(
    inside: InProcess, n_requests: int, cancelled: float, limit: float | None, case: Case
) -> Measured:
    from pyllamabatch.engine.engine import Engine
    from pyllamabatch.step.sampling_params import SamplingParams

    prompts = np.random.default_rng(case.seed).integers(0, inside.model.n_vocab, (2000, 12))
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
        each: list[tuple[object, SamplingParams]] = []
        alone: list[list[int]] = []
        for i, prompt in enumerate(prompts):
            if len(each) == N_PROMPTS:
                break
            greedy = SamplingParams(temperature=0, max_tokens=2 + i % 15, ignore_eog=True)
            asked = replace(greedy, logprobs=2)
            result = engine.submit(prompt[: 4 + i % 9], asked).result(60)
            if min(map(_margin, result.top_logprobs or ())) > MARGIN:
                each.append((prompt[: 4 + i % 9], greedy))
                alone.append(result.tokens)
        before = engine.stats()
        tally, numbers = Tally(), iter(range(n_requests))
        start = time.perf_counter()
        end = None if limit is None else start + limit
        threads = [
            threading.Thread(
                target=_client,
                args=(engine, each, alone, numbers, tally, random.Random(i), cancelled, end),
            )
            for i in range(case.pl)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        after = engine.stats()
    if tally.errors:
        raise RuntimeError(f"{len(tally.errors)} clients failed, the first with {tally.errors[0]}")
    finished = {name: n - before.finished[name] for name, n in after.finished.items()}
    unbalanced = sum(abs(n - tally.finished.get(name, 0)) for name, n in finished.items())
    unbalanced += abs(after.submitted - before.submitted - tally.n)
    unbalanced += after.waiting + after.running
    sampled = after.tokens - before.tokens
    # A cancelled request may have sampled tokens that were never handed out.
    unbalanced += max(0, tally.tokens - sampled)
    return Measured(
        0.0,
        seconds,
        detail={
            "requests": float(tally.n),
            "cancelled": float(tally.finished.get("cancelled", 0)),
            "tokens": float(tally.tokens),
            "sampled": float(sampled),
            "wrong": float(tally.wrong),
            "unbalanced": float(unbalanced),
            "kv_used": float(after.kv_used),
            "rss_slope_kib": slope(tally.rss),
            "requests_per_s": tally.n / seconds,
        },
    )


def _margin(top: dict[int, float]) -> float:
    first, second = top.values()
    return first - second


def _client(
    engine: object,
    each: Sequence[tuple[object, object]],
    alone: Sequence[Sequence[int]],
    numbers: Iterator[int],
    tally: Tally,
    dice: random.Random,
    cancelled: float,
    end: float | None,
) -> None:
    try:
        while end is None or time.perf_counter() < end:
            with tally.lock:
                i = next(numbers, None)
            if i is None:
                return
            which = i % len(each)
            stream = engine.submit(*each[which])  # type: ignore[attr-defined]
            if dice.random() < cancelled:
                time.sleep(dice.random() * 0.02)
                stream.cancel()
            shown = [token.token for token in stream] if i % 2 else None
            result = stream.result(120)
            expected = alone[which]
            good = result.tokens == (
                expected if result.finish_reason == "length" else expected[: len(result.tokens)]
            )
            with tally.lock:
                reason = result.finish_reason
                tally.finished[reason] = tally.finished.get(reason, 0) + 1
                tally.tokens += len(result.tokens)
                if not (good and shown in (None, result.tokens)):
                    tally.wrong += 1
                    what = f"{result.finish_reason} {result.tokens}, shown {shown}, not {expected}"
                    print(f"request {i}: {what}", file=sys.stderr)
                if tally.n % 100 == 0:
                    tally.rss.append((tally.n, resident()))
    except BaseException as error:
        with tally.lock:
            tally.errors.append(repr(error))


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(rss: Sequence[tuple[int, int]]) -> float:
    """KiB per 1,000 requests: a line through what was resident once the run had settled."""
    first = SETTLED * rss[-1][0] if rss else 0
    late = [(n, size) for n, size in rss if n >= first]
    if len(late) < 3:
        print("too short for a slope of memory", file=sys.stderr)
        return 0.0
    n, size = np.array(late, dtype=float).T
    return float(np.polyfit(n, size, 1)[0] * 1000 / 1024)
