"""What an engine does beside its steps: readers that wake for every token, and prefixes it keeps.

The same sequences decode in every arm, and none is read before they end; but

- readers: a thread for each takes its tokens one by one.
- cached: unrelated prompts have run before, and what they left is cached.
- forgotten: they have run before, in an engine without a prefix cache.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Sequence
from functools import partial

import numpy as np

from bench import harness
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run, add_work, choose
from bench.targets import Target, speed_ratio
from bench.views import speed_table
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Stream
from pyllamabatch.report.records import Record
from pyllamabatch.step.sampling_params import SamplingParams

NONE, READERS, CACHED, FORGOTTEN = "none", "readers", "cached", "forgotten"
SEQUENCES, UNRELATED, UNRELATED_TOKENS = 8, 24, 300
QUICK = {"model": "default", "tokens": 16, "repeats": 1}
TARGETS = (
    Target(
        f"{SEQUENCES} readers: tokens per s over none",
        speed_ratio(READERS, NONE, SEQUENCES),
        at_least=0.95,
    ),
    Target(
        f"{UNRELATED} unrelated prompts cached: tokens per s over a cache that is off",
        speed_ratio(CACHED, FORGOTTEN, SEQUENCES),
        at_least=0.97,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_work(parser, prompt_tokens=32, tokens=96)
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    includes = "Engine without options, the steps from the last first token to the last one"
    arms = [
        Arm(NONE, includes, partial(decode, inside)),
        Arm(READERS, f"{includes}; a thread reads each", partial(decode, inside, read=True)),
        Arm(
            CACHED,
            f"{includes}; after {UNRELATED} prompts of {UNRELATED_TOKENS} tokens",
            partial(decode, inside, n_before=UNRELATED),
        ),
        Arm(
            FORGOTTEN,
            f"{includes}; after the same, with prefix_cache=False",
            partial(decode, inside, n_before=UNRELATED, prefix_cache=False),
        ),
    ]
    pp, tg = options.prompt_tokens, options.tokens
    cases = cases_of(options, inside.file, pp, tg, [SEQUENCES])
    title = f"{SEQUENCES} sequences, {tg} tokens each, tokens/s (ratio)"
    return harness.run(options, choose(options.arms, arms), cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    return speed_table(records, NONE)


def decode(
    inside: InProcess,
    case: Case,
    *,
    read: bool = False,
    n_before: int = 0,
    prefix_cache: bool = True,
) -> Measured:
    """t_pp: until every sequence has its first token; t_tg: from there to the end."""
    n_vocab = inside.model.n_vocab
    params = SamplingParams(temperature=0, max_tokens=case.tg, ignore_eog=True)
    with Engine(
        inside.model, n_seq_max=case.pl, n_threads=case.n_threads, prefix_cache=prefix_cache
    ) as engine:
        generator = np.random.default_rng([case.seed, 7])
        others = generator.integers(0, n_vocab, (n_before, UNRELATED_TOKENS), dtype=np.int32)
        engine.generate(list(others), SamplingParams(temperature=0, max_tokens=1))
        streams = [engine.submit(prompt, params) for prompt in case.prompts(n_vocab, 1)]
        readers = [threading.Thread(target=drain, args=(s,)) for s in streams] if read else []
        for reader in readers:
            reader.start()
        results = [stream.result() for stream in streams]
        for reader in readers:
            reader.join()
    ttft = [result.ttft_s for result in results if result.ttft_s is not None]
    if [len(result.tokens) for result in results] != [case.tg] * case.pl:
        raise RuntimeError("a sequence has not all of its tokens")
    first, end = max(ttft), max(result.e2el_s for result in results)
    return Measured(first, end - first)


def drain(stream: Stream) -> None:
    for _ in stream:
        pass
