"""What an engine does beside its steps: readers that wake for every token, and prefixes it keeps.

The same sequences decode in turns with and without it, many times in one run: so the ratio of each
pair says more on a machine whose speed drifts than two long runs would.

- readers: a thread for each sequence takes its tokens one by one. Without: they are not read before
  they end.
- cached: unrelated prompts have run before, and what they left is cached. Without: the same in an
  engine without a prefix cache.
"""

import argparse
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

import numpy as np

from bench import harness
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run, add_work, choose
from bench.targets import Target, median_detail
from bench.views import Column, by_arm
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Stream
from pyllamabatch.report.records import Record
from pyllamabatch.step.sampling_params import SamplingParams

READERS, CACHED = "readers", "cached"
SEQUENCES, UNRELATED, UNRELATED_TOKENS = 8, 24, 300
QUICK = {"model": "default", "tokens": 8, "rounds": 4}
RATIO = "over_without"
TARGETS = (
    Target(
        f"{SEQUENCES} readers: tokens per s over none", median_detail(READERS, RATIO), at_least=0.95
    ),
    Target(
        f"{UNRELATED} unrelated prompts cached: tokens per s over a cache that is off",
        median_detail(CACHED, RATIO),
        at_least=0.97,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_work(parser, prompt_tokens=32, tokens=24)
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument("--rounds", type=int, default=20, help="pairs in a run")
    add_run(parser, repeats=1)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    includes = "Engine without options, the steps from the last first token to the last one"
    arms = [
        Arm(
            READERS,
            f"{includes}; a thread reads each, or none",
            partial(readers, inside, options.rounds),
        ),
        Arm(
            CACHED,
            f"{includes}; after {UNRELATED} prompts of {UNRELATED_TOKENS} tokens, with prefix_cache"
            " or without",
            partial(cached, inside, options.rounds),
        ),
    ]
    pp, tg = options.prompt_tokens, options.tokens
    cases = cases_of(options, inside.file, pp, tg, [SEQUENCES])
    title = f"{SEQUENCES} sequences, {tg} tokens each, tokens/s"
    return harness.run(options, choose(options.arms, arms), cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    return by_arm(records, [Column("tokens/s over without, median of pairs", RATIO, ".3f")])


def readers(inside: InProcess, n_rounds: int, case: Case) -> Measured:
    with engine(inside, case) as one:
        return in_turns(
            partial(decode, inside, case, one, read=True),
            partial(decode, inside, case, one),
            n_rounds,
        )


def cached(inside: InProcess, n_rounds: int, case: Case) -> Measured:
    generator = np.random.default_rng([case.seed, 7])
    n_vocab = inside.model.n_vocab
    others = list(generator.integers(0, n_vocab, (UNRELATED, UNRELATED_TOKENS), dtype=np.int32))
    with ExitStack() as opened:
        both = [opened.enter_context(engine(inside, case, keep)) for keep in (True, False)]
        for one in both:
            one.generate(others, SamplingParams(temperature=0, max_tokens=1))
        with_, without = (partial(decode, inside, case, one) for one in both)
        return in_turns(with_, without, n_rounds)


def engine(inside: InProcess, case: Case, prefix_cache: bool = True) -> Engine:
    return Engine(
        inside.model,
        n_seq_max=case.pl,
        n_threads=case.n_threads,
        prefix_cache=prefix_cache,
        speculate=None,
    )


def in_turns(
    with_: Callable[[], Measured], without: Callable[[], Measured], n_rounds: int
) -> Measured:
    """t_pp, t_tg: the median round with it. One round of each goes before, untimed."""
    with_(), without()
    mine: list[Measured] = []
    ratios: list[float] = []
    for i in range(n_rounds):
        if i % 2:
            other = without()
            mine.append(with_())
        else:
            mine.append(with_())
            other = without()
        ratios.append(other.t_tg / mine[-1].t_tg)
    middle = sorted(mine, key=lambda one: one.t_tg)[len(mine) // 2]
    middle.detail.update({RATIO: median(ratios), "rounds": float(n_rounds)})
    return middle


def decode(inside: InProcess, case: Case, engine: Engine, *, read: bool = False) -> Measured:
    """t_pp: until every sequence has its first token; t_tg: from there to the end."""
    params = SamplingParams(temperature=0, max_tokens=case.tg, ignore_eog=True)
    streams = [engine.submit(prompt, params) for prompt in case.prompts(inside.model.n_vocab, 1)]
    threads = [threading.Thread(target=drain, args=(s,)) for s in streams] if read else []
    for thread in threads:
        thread.start()
    results = [stream.result() for stream in streams]
    for thread in threads:
        thread.join()
    ttft = [result.ttft_s for result in results if result.ttft_s is not None]
    if [len(result.tokens) for result in results] != [case.tg] * case.pl:
        raise RuntimeError("a sequence has not all of its tokens")
    first, end = max(ttft), max(result.e2el_s for result in results)
    return Measured(first, end - first)


def drain(stream: Stream) -> None:
    for _ in stream:
        pass
