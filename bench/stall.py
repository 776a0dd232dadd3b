"""Streams that decode while a long prompt arrives: how long their readers wait for a token.

A thread for each of the streams reads its tokens; the times between two tokens (ITL) of all of them
are one sample. The prompt arrives when every reader has had more than half of its tokens: the
median is a step without it, and what it does is the tail. p99 is the nearest rank.

An arm is a policy; `engine` is an engine without options, which chooses its layout, too. It bounds
what readers wait for a prompt by seconds, not by the time of a step.
"""

import argparse
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from statistics import median
from typing import Any

from bench import harness
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run
from bench.targets import Target, median_detail
from bench.views import Column, by_arm
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Stream
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.report.records import Record
from pyllamabatch.scheduler import make_policy
from pyllamabatch.scheduler.policies.parts import STALL_SECONDS
from pyllamabatch.step.sampling_params import SamplingParams

STREAMS, TOKENS, ARRIVES = 8, 72, 40  # readers, tokens of each, and after which the prompt comes
SHORT, LONG = 32, 6000  # prompt tokens: of a reader, and of the one that arrives
CHUNKED, PREFILL_FIRST = "sarathi:budget=12", "prefill-first"
ENGINE = "engine"
ALSO = ("sarathi", "fcfs")
QUICK = {"arms": f"{CHUNKED},{PREFILL_FIRST},{ENGINE}", "prompt_tokens": 1500, "repeats": 1}
TARGETS = (
    Target(
        f"{CHUNKED}: p99 of the ITL over its median",
        median_detail(CHUNKED, "p99_over_median"),
        at_most=3.0,
        must=True,
    ),
    Target(
        f"{PREFILL_FIRST}: the same, which shows that there was something to stall for",
        median_detail(PREFILL_FIRST, "p99_over_median"),
        at_least=3.0,
        must=True,
    ),
    Target(
        f"{ENGINE}: p99 of the ITL, s",
        median_detail(ENGINE, "itl_p99_s"),
        at_most=STALL_SECONDS,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, kv="unified")
    parser.add_argument(
        "--arms",
        default=",".join((CHUNKED, PREFILL_FIRST, ENGINE, *ALSO)),
        help=f"policies, comma separated, one option each at most; {ENGINE}: without options",
    )
    parser.add_argument("--prompt-tokens", type=int, default=LONG, help="of the one that arrives")
    parser.set_defaults(sampling="greedy")
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    """1 when chunks do not bound the stall, or without them there is none."""
    inside = InProcess.of(options)
    includes = (
        f"{STREAMS} streams read by a thread each; a prompt of pp tokens arrives after {ARRIVES} "
        "of tg tokens and is cancelled when the streams have ended; t_tg: from the first token to "
        "the last"
    )
    arms = [Arm(name, includes, partial(run, inside, name)) for name in options.arms.split(",")]
    cases = cases_of(options, inside.file, options.prompt_tokens, TOKENS, [STREAMS])
    title = f"{STREAMS} streams, a prompt of {options.prompt_tokens} tokens arrives; ITL"
    title += f" ({ENGINE} chooses its own KV)"
    return harness.run(options, arms, cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("median, ms", "itl_median_s", ".1f", 1e3),
        Column("p99, ms", "itl_p99_s", ".1f", 1e3),
        Column("longest, ms", "itl_max_s", ".1f", 1e3),
        Column("p99 / median", "p99_over_median", ".2f"),
    )
    return by_arm(records, columns)


@dataclass
class Reader:
    """Takes tokens as they come; `times`: when."""

    stream: Stream
    times: list[float]
    half: threading.Semaphore

    def __call__(self) -> None:
        try:
            for _ in self.stream:
                self.times.append(time.perf_counter())
                if len(self.times) == ARRIVES:
                    self.half.release()
        except PyllamabatchError:
            return  # the stream's result says it again
        finally:
            if len(self.times) < ARRIVES:
                self.half.release()


def run(inside: InProcess, arm: str, case: Case) -> Measured:
    """One engine, one arrival."""
    prompts = case.prompts(inside.model.n_vocab)
    greedy = SamplingParams(temperature=0, max_tokens=case.tg, ignore_eog=True)
    with_late = replace(case, pl=case.pl + 1)
    if case.kv_unified:
        with_late = replace(with_late, n_cells=SHORT + case.tg + case.pp // (case.pl + 1))
    half = threading.Semaphore(0)
    options: dict[str, Any] = {"n_seq_max": with_late.pl, "n_threads": case.n_threads}
    if arm != ENGINE:
        options = with_late.context_params() | {"policy": make_policy(arm)}
    with Engine(inside.model, speculate=None, **options) as engine:
        began_unified = engine.limits.unified
        readers = [Reader(engine.submit(prompt[:SHORT], greedy), [], half) for prompt in prompts]
        threads = [threading.Thread(target=reader) for reader in readers]
        for thread in threads:
            thread.start()
        for _ in readers:
            half.acquire()
        late = engine.submit(prompts.reshape(-1)[: case.pp], SamplingParams(max_tokens=1))
        for thread in threads:
            thread.join()
        late.cancel()
        for reader in readers:
            reader.stream.result()
        settings = {"n_kv_max": engine.n_ctx, "kv_unified": engine.limits.unified}
    gaps = sorted(
        after - before
        for reader in readers
        for before, after in zip(reader.times, reader.times[1:], strict=False)
    )
    first = min(reader.times[0] for reader in readers)
    last = max(reader.times[-1] for reader in readers)
    p99 = gaps[ceil(0.99 * len(gaps)) - 1]  # nearest rank: one that was measured
    detail = {
        "itl_median_s": median(gaps),
        "itl_p99_s": p99,
        "itl_max_s": gaps[-1],
        "p99_over_median": p99 / median(gaps),
        "arrives_after": ARRIVES,
        "reader_prompt_tokens": SHORT,
        "began_unified": float(began_unified),
    }
    return Measured(0.0, last - first, settings, detail)
