"""Streams that decode while a long prompt arrives: how long their readers wait for a token.

Readers take their tokens from the engine's streams, one thread each; the times between two tokens
(ITL) of all of them are one sample. The prompt arrives when every reader has had more than half of
its tokens, so the median is a step without it, and what it does is the tail. p99 is the nearest
rank, so it is one of the stalls when every reader has had one.

How many rows of a prompt a step can bear is the device's matter: on two CPU cores decoding is bound
by computing at 8 rows already, so 4 more it is.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median

from bench import schema
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, case_row
from bench.models import resolve
from bench.options import Budget, add_model, add_run, out_file
from bench.quiet import undisturbed
from bench.targets import Figure, Target
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Stream
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.scheduler import make_policy
from pyllamabatch.step.sampling_params import SamplingParams

STREAMS, TOKENS, ARRIVES = 8, 72, 40  # readers, tokens of each, and after which the prompt comes
SHORT, LONG = 32, 6000  # prompt tokens: of a reader, and of the one that arrives
CHUNKED, PREFILL_FIRST = "sarathi:budget=12", "prefill-first"
ALSO = ("sarathi", "fcfs")
QUICK = ("--quick", "--arms", f"{CHUNKED},{PREFILL_FIRST}", "--prompt-tokens", "1500")


def p99_over_median(policy: str) -> Figure:
    """Median of the runs."""

    def figure(rows: Sequence[schema.Row]) -> float | None:
        values = [row.detail["p99_over_median"] for row in rows if row.arm == policy]
        return median(values) if values else None

    return figure


TARGETS = (
    Target(f"{CHUNKED}: p99 of the ITL over its median", p99_over_median(CHUNKED), at_most=3.0),
    Target(
        f"{PREFILL_FIRST}: the same, which shows that there was something to stall for",
        p99_over_median(PREFILL_FIRST),
        at_least=3.0,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.set_defaults(kv="unified")
    parser.add_argument(
        "--arms",
        default=",".join((CHUNKED, PREFILL_FIRST, *ALSO)),
        help="policies, comma separated; one option each at most (default %(default)s)",
    )
    parser.add_argument("--prompt-tokens", type=int, default=LONG, help="of the one that arrives")
    parser.add_argument("--repeats", type=int, help="runs of each policy (3; --quick 1)")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    """1 when chunks do not bound the stall, or without them there is none."""
    model = resolve(options.model)
    inside = InProcess(model, options.gpu_layers)
    case = Case(
        model=model,
        pp=options.prompt_tokens,
        tg=TOKENS,
        pl=STREAMS,
        n_threads=options.threads,
        sampling="greedy",
        seed=options.seed,
        kv_unified=options.kv == "unified",
        n_gpu_layers=options.gpu_layers,
    )
    out: Path = out_file(options, "stall", Path(options.model).stem)
    rows = []
    for row in measure(inside, case, options):
        schema.append(out, [row])
        rows.append(row)
        print(in_words(row), file=sys.stderr)
    print(view(rows))
    missed = False
    for target in TARGETS:
        value = target.measured(rows)
        if value is not None:
            missed |= not target.met_by(value)
            met = "met" if target.met_by(value) else "MISSED"
            print(f"{target.text}: {value:.2f} ({target.limit}: {met})")
    print(f"\nrows: {out}")
    return int(missed or any(row.error for row in rows))


def measure(inside: InProcess, case: Case, options: argparse.Namespace) -> Iterator[schema.Row]:
    run_id = uuid.uuid4().hex[:12]
    budget = Budget(options.budget)
    for repeat in range(options.repeats or (1 if options.quick else 3)):
        arms = [arm_of(inside, name) for name in options.arms.split(",")]
        for arm in arms if repeat % 2 == 0 else arms[::-1]:
            if budget.spent():
                return
            facts = inside.facts() | schema.now()
            try:
                measured, others = undisturbed(partial(arm.run, case), options.undisturbed)
                measured.detail["other_cpu"] = round(others, 3)
            except (PyllamabatchError, MemoryError) as failure:
                measured = Measured.failed(failure)
            yield case_row("stall", arm, case, measured, facts, run_id, repeat)


def arm_of(inside: InProcess, policy: str) -> Arm:
    includes = (
        f"{STREAMS} streams read by a thread each; a prompt of pp tokens arrives after {ARRIVES} "
        "of tg tokens and is cancelled when the streams have ended; t_tg: from the first token to "
        "the last"
    )
    return Arm(policy, includes, True, partial(run, inside, policy))


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


def run(inside: InProcess, policy: str, case: Case) -> Measured:
    """One engine, one arrival."""
    prompts = case.prompts(inside.model.n_vocab)
    greedy = SamplingParams(temperature=0, max_tokens=case.tg, ignore_eog=True)
    cells = case.pp + case.pl * (SHORT + case.tg)
    n_ctx = -(-(cells + 256) // 256) * 256
    half = threading.Semaphore(0)
    with Engine(
        inside.model,
        n_seq_max=case.pl + 1,
        n_ctx=n_ctx if case.kv_unified else (case.pl + 1) * (-(-(case.pp + 1) // 256) * 256),
        n_batch=case.n_batch,
        n_ubatch=case.n_ubatch,
        policy=make_policy(policy),
        kv_unified=case.kv_unified,
        n_threads=case.n_threads,
        n_threads_batch=case.n_threads,
    ) as engine:
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
        context = engine.n_ctx
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
    }
    return Measured(0.0, last - first, {"n_kv_max": context}, detail)


def in_words(row: schema.Row) -> str:
    detail = row.detail
    if row.error:
        return f"{row.arm:<20} {row.error}"
    return (
        f"{row.arm:<20} ITL median {1e3 * detail['itl_median_s']:7.1f} ms, "
        f"p99 {1e3 * detail['itl_p99_s']:8.1f} ms, longest {1e3 * detail['itl_max_s']:8.1f} ms"
    )


def view(rows: Sequence[schema.Row]) -> str:
    """Medians of the runs."""
    lines = [
        f"\n{STREAMS} streams, a prompt of {rows[0].pp} tokens arrives; ITL in ms\n",
        "| policy               |  median |      p99 |  longest | p99 / median |",
        "|----------------------|--------:|---------:|---------:|-------------:|",
    ]
    for arm in dict.fromkeys(row.arm for row in rows):
        details = [row.detail for row in rows if row.arm == arm and not row.error]
        if not details:
            continue

        def middle(name: str, details: list[dict[str, float]] = details) -> float:
            return median(detail[name] for detail in details)

        lines.append(
            f"| {arm:<20} | {1e3 * middle('itl_median_s'):7.1f} | {1e3 * middle('itl_p99_s'):8.1f} "
            f"| {1e3 * middle('itl_max_s'):8.1f} | {middle('p99_over_median'):12.2f} |"
        )
    return "\n".join(lines) + "\n"
