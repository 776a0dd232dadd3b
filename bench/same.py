"""Greedy answers to chats, all at once and one by one: how many are the same to the last token."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import islice, product
from typing import Any

from bench import harness
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run, choose
from bench.targets import Target, median_detail
from bench.views import Column, by_arm
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.report.records import Record
from pyllamabatch.step.sampling_params import SamplingParams

N_CTX = 1024  # of each sequence
INVARIANT = "streams, batch-invariant"
OPTIONS: dict[str, dict[str, Any]] = {
    "pool": {"kv_unified": True},
    "streams": {"kv_unified": False},
    INVARIANT: {"kv_unified": False, "batch_invariant": True},
}
QUICK = {"model": "default", "chats": 12, "tokens": 16}
TARGETS = (
    Target(
        "share of equal answers with batch_invariant",
        median_detail(INVARIANT, "same"),
        at_least=1.0,
        must=True,
    ),
)
THINGS = (
    "a bicycle", "the tide", "bread", "a library", "chess", "the heart", "gold", "a rainbow",
    "Madrid", "a volcano", "the bee", "paper", "a bridge", "sleep", "the piano", "salt",
    "an orchard", "glass", "the moon", "a lighthouse",
)  # fmt: skip
QUESTIONS = (
    "What is {}?", "Tell me a short story about {}.", "List three facts about {}.",
    "Explain {} to a child.", "Why do people care about {}?", "Write two lines of verse on {}.",
    "What would be missing without {}?", "Ask me a question about {}.",
    "Describe {} in one sentence, then again in other words.", "What goes well with {}, and why?",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--chats", type=int, default=len(THINGS) * len(QUESTIONS))
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--together", type=int, default=8, help="chats that run at once")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.set_defaults(sampling="greedy")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    arms = [
        Arm(
            name,
            "Engine: all chats submitted at once, then each alone in a second engine",
            partial(compare, inside, options.chats, own),
        )
        for name, own in OPTIONS.items()
    ]
    cases = cases_of(options, inside.file, 0, options.tokens, [options.together])
    title = f"{options.chats} chats, greedy answers of up to {options.tokens} tokens"
    return harness.run(options, choose(options.arms, arms), cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("equal answers", "same", ".3f"),
        Column("equal tokens before the first other one", "agreement", ".3f"),
        Column("together, s", lambda record: record.t_tg, ".1f"),
        Column("alone, s", "alone_s", ".1f"),
    )
    return by_arm(records, columns)


def compare(inside: InProcess, n: int, own: dict[str, Any], case: Case) -> Measured:
    prompts = chats(inside.model, n)
    params = SamplingParams(temperature=0, max_tokens=case.tg)
    options = {"n_seq_max": case.pl, "n_ctx": case.pl * N_CTX, "n_threads": case.n_threads} | own
    with Engine(inside.model, **options) as engine:
        together = engine.generate(prompts, params)
    with Engine(inside.model, **options, prefix_cache=False) as engine:
        alone = [engine.generate([prompt], params)[0] for prompt in prompts]
    pairs = [(a.tokens, b.tokens) for a, b in zip(together, alone, strict=True)]
    return Measured(
        0.0,
        max(result.e2el_s for result in together),
        detail={
            "same": sum(a == b for a, b in pairs) / n,
            "agreement": sum(n_equal(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs),
            "alone_s": sum(result.e2el_s for result in alone),
        },
    )


def n_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def chats(model: Model, n: int) -> list[list[int]]:
    """The first `n`, as the model's own template has them; plain text where it has none."""
    texts = [question.format(thing) for question, thing in product(QUESTIONS, THINGS)]
    vocab = model.vocab
    found: list[list[int]] = []
    for text in islice(texts, n):
        if model.chat_template() is None:
            found.append(vocab.tokenize(text).tolist())
            continue
        prompt = vocab.apply_chat_template([{"role": "user", "content": text}])
        found.append(vocab.tokenize(prompt, add_special=False, parse_special=True).tolist())
    return found
