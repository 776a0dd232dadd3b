"""Greedy answers, all at once and one by one: how many are the same to the last token."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, product
from typing import Any

import numpy as np

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
INVARIANT, NEARLY = "streams-invariant", "streams-nearly-invariant"
OPTIONS: dict[str, dict[str, Any]] = {
    "pool": {"kv_unified": True},
    "streams": {"kv_unified": False},
    INVARIANT: {"kv_unified": False, "batch_invariant": True},
    NEARLY: {"kv_unified": False, "batch_invariant": "nearly"},
}
PROMPT, ANSWER = (4, 300), 8  # tokens of mixed requests: the shortest and longest, the shortest
Work = tuple[list[list[int]], list[SamplingParams]]
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
    parser.add_argument(
        "--requests",
        type=int,
        default=0,
        help="instead of chats so many prompts of random tokens and mixed lengths",
    )
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--together", type=int, default=8, help="chats that run at once")
    parser.add_argument("--arms", default="", help="comma separated; default: what the device can")
    parser.set_defaults(sampling="greedy")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    facts = inside.facts()
    work = mixed if options.requests else chats
    n, what = (options.requests, "requests") if options.requests else (options.chats, "chats")
    arms = [
        Arm(
            name,
            f"Engine: all {what} submitted at once, then each alone in a second engine",
            partial(compare, inside, partial(work, inside.model, n), own),
        )
        for name, own in OPTIONS.items()
    ]
    on_gpu = bool(facts["gpu_info"]) and options.gpu_layers != 0
    left_out = INVARIANT if on_gpu else NEARLY  # refused there; the same as the other one here
    names = options.arms or ",".join(name for name in OPTIONS if name != left_out)
    cases = cases_of(options, inside.file, 0, options.tokens, [options.together])
    title = f"{n} {what}, greedy answers of up to {options.tokens} tokens"
    return harness.run(options, choose(names, arms), cases, facts, title)


def view(records: Sequence[Record]) -> str:
    columns = (
        Column("equal answers", "same", ".3f"),
        Column("equal tokens before the first other one", "agreement", ".3f"),
        Column("together, s", lambda record: record.t_tg, ".1f"),
        Column("alone, s", "alone_s", ".1f"),
    )
    return by_arm(records, columns)


def compare(
    inside: InProcess, work: Callable[[int, int], Work], own: dict[str, Any], case: Case
) -> Measured:
    """work(seed, tokens of an answer at most): prompts, and what to sample of each."""
    prompts, params = work(case.seed, case.tg)
    options = {"n_seq_max": case.pl, "n_ctx": case.pl * N_CTX, "n_threads": case.n_threads} | own
    with Engine(inside.model, **options) as engine:
        together = engine.generate(prompts, params)
    with Engine(inside.model, **options, prefix_cache=False) as engine:
        alone = [
            engine.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)
        ]
    pairs = [(a.tokens, b.tokens) for a, b in zip(together, alone, strict=True)]
    return Measured(
        0.0,
        max(result.e2el_s for result in together),
        detail={
            "same": sum(a == b for a, b in pairs) / len(pairs),
            "agreement": sum(n_equal(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs),
            "alone_s": sum(result.e2el_s for result in alone),
        },
    )


def n_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def mixed(model: Model, n: int, seed: int, tokens: int) -> Work:
    """Of different lengths; every fourth one begins as the one before does."""
    draw = np.random.default_rng(seed)
    prompts: list[list[int]] = []
    for i in range(n):
        own = draw.integers(0, model.n_vocab, draw.integers(*PROMPT)).tolist()
        begins = prompts[-1][: draw.integers(*PROMPT)] if i % 4 == 3 else []
        prompts.append([*begins, *own])
    lengths = draw.integers(min(ANSWER, tokens), tokens + 1, n).tolist()
    return prompts, [
        SamplingParams(temperature=0, max_tokens=length, ignore_eog=True) for length in lengths
    ]


def chats(model: Model, n: int, seed: int, tokens: int) -> Work:
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
    return found, [SamplingParams(temperature=0, max_tokens=tokens)] * len(found)
