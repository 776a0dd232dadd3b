"""Embeddings: many texts in one call, beside one call for each."""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from bench import harness
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run
from bench.targets import Target, speed_ratio, worst_detail
from bench.views import Column, by_arm
from pyllamabatch.engine.embedding_core import Vectors
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.vocab import TokenArray
from pyllamabatch.report.records import Record

LENGTHS = (8, 32, 128)  # tokens of the texts, in turns
TOGETHER, ONE_BY_ONE = "together", "one by one"
QUICK = {"model": "default", "texts": 24}
TARGETS = (
    Target("texts per second together, over one by one", speed_ratio(TOGETHER, ONE_BY_ONE, 96), 1),
    Target(
        "1 - cosine of a text's vector and of its vector alone, the largest",
        worst_detail("apart"),
        at_most=1e-3,
        must=True,
    ),
)

Embed = Callable[[Engine, list[TokenArray]], Vectors]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, model="smollm2-135m")
    parser.add_argument("--texts", type=int, default=96)
    parser.set_defaults(sampling="none")
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    arms = [
        Arm(TOGETHER, "Engine.embed of all texts", partial(timed, inside, together)),
        Arm(ONE_BY_ONE, "Engine.embed of each text", partial(timed, inside, one_by_one)),
    ]
    # A text counts as one token generated: the speed is texts per second.
    cases = cases_of(options, inside.file, sum(LENGTHS) // len(LENGTHS), 1, [options.texts])
    title = f"{options.texts} texts of {', '.join(map(str, LENGTHS))} tokens, mean pooling"
    return harness.run(options, arms, cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("texts/s", lambda record: record.speed_tg, ".1f"),
        Column("tokens/s", "tokens_per_s", ".0f"),
        Column("1 - cosine to the text alone, the largest", "apart", ".1e"),
    )
    return by_arm(records, columns)


def timed(inside: InProcess, embed: Embed, case: Case) -> Measured:
    draw = np.random.default_rng(case.seed)
    n_vocab = inside.model.n_vocab
    texts = [
        draw.integers(0, n_vocab, LENGTHS[i % len(LENGTHS)]).astype(np.int32)
        for i in range(case.pl)
    ]
    with Engine(
        inside.model, n_seq_max=1, n_ctx=512, n_threads=case.n_threads, prefix_cache=False
    ) as engine:
        engine.embed(texts[:1])  # makes the context, and graphs
        start = time.perf_counter()
        vectors = embed(engine, texts)
        seconds = time.perf_counter() - start
        some = range(0, case.pl, max(1, case.pl // 16))
        alone = np.concatenate([engine.embed([texts[i]]) for i in some])
    return Measured(
        0.0,
        seconds,
        detail={
            "tokens_per_s": sum(map(len, texts)) / seconds,
            "apart": 1 - float((vectors[list(some)] * alone).sum(axis=1).min()),
        },
    )


def together(engine: Engine, texts: list[TokenArray]) -> Vectors:
    return engine.embed(texts)


def one_by_one(engine: Engine, texts: list[TokenArray]) -> Vectors:
    return np.concatenate([engine.embed([text]) for text in texts])
