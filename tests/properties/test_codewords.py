"""A codeword per sequence never shows up in another one (the embedded default model).

All prompts have the same words and lengths and differ in the codeword alone, so a sequence that
reads one cell of a neighbour answers with the neighbour's word, in the same fluent way.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from pyllamabatch import Engine, Model, Result, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)
N = 33
SETTINGS: dict[str, Any] = {"n_threads": 1}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.default(n_gpu_layers=0) as default:
        yield default


@pytest.fixture(scope="module")
def codewords() -> list[str]:
    """Five letters each; no two share three letters in a row, so a mixture is seen too."""
    generator = random.Random(5)
    words: list[str] = []
    seen: set[str] = set()
    while len(words) < N:
        word = "".join(generator.choices(string.ascii_lowercase, k=5))
        parts = {word[i : i + 3] for i in range(3)}
        if not parts & seen and len(parts) == 3:
            words.append(word)
            seen |= parts
    return words


@pytest.fixture(scope="module")
def prompts(model: Model, codewords: list[str]) -> list[list[int]]:
    def prompt(word: str) -> list[int]:
        text = (
            "The code of lamp is 4711. The code of river is 2048. "
            f"The code of zebra is {word}. The code of stone is 1234. "
            "What is the code of zebra?"
        )
        message = model.vocab.apply_chat_template([{"role": "user", "content": text}])
        return [int(token) for token in model.vocab.tokenize(message, parse_special=True)]

    made = [prompt(word) for word in codewords]
    assert len({len(tokens) for tokens in made}) == 1
    return made


def assert_no_crossed_wires(results: Sequence[Result], codewords: Sequence[str]) -> None:
    for i, result in enumerate(results):
        for j, word in enumerate(codewords):
            parts = [word[k : k + 3] for k in range(3)]
            assert i == j or not any(part in result.text for part in parts), (
                f"request {i} ({codewords[i]}) answers {result.text!r}: that is {word}'s"
            )
    right = [r.text == word for r, word in zip(results, codewords, strict=True)]
    assert sum(right) >= len(codewords) - 1, "the model must know its own words for this to count"


def test_all_at_once(model: Model, prompts: list[list[int]], codewords: list[str]) -> None:
    with Engine(model, n_seq_max=N, n_ctx=N * 256, **SETTINGS) as engine:
        assert_no_crossed_wires(engine.generate(prompts, GREEDY), codewords)


def test_in_line_for_few_sequences_in_small_chunks(
    model: Model, prompts: list[list[int]], codewords: list[str]
) -> None:
    with Engine(model, n_seq_max=5, n_batch=32, n_ubatch=32, **SETTINGS) as engine:
        assert_no_crossed_wires(engine.generate(prompts, GREEDY), codewords)


def test_a_stream_of_cells_each(
    model: Model, prompts: list[list[int]], codewords: list[str]
) -> None:
    with Engine(model, n_seq_max=8, n_ctx=8 * 256, kv_unified=False, **SETTINGS) as engine:
        assert_no_crossed_wires(engine.generate(prompts, GREEDY), codewords)


def test_preempted_for_want_of_cells(
    model: Model, prompts: list[list[int]], codewords: list[str]
) -> None:
    longer = SamplingParams(temperature=0, max_tokens=60, ignore_eog=True)
    with Engine(model, n_seq_max=8, n_ctx=512, **SETTINGS) as engine:
        busy = [engine.submit(prompt, longer) for prompt in prompts[:4]]
        results = engine.generate(prompts, GREEDY)
        for stream in busy:
            assert stream.result(timeout=120).n_generated == 60
        assert engine.stats().preemptions > 0
    assert_no_crossed_wires(results, codewords)


def test_among_neighbours_that_are_cancelled(
    model: Model, prompts: list[list[int]], codewords: list[str]
) -> None:
    """Every other request leaves in the middle; its cells go to the next one in line."""
    with Engine(model, n_seq_max=6, n_ctx=6 * 256, **SETTINGS) as engine:
        streams = []
        for i, prompt in enumerate(prompts):
            streams.append(engine.submit(prompt, GREEDY))
            leaving = engine.submit(prompts[-1 - i], GREEDY)
            for _ in zip(range(i % 3), leaving, strict=False):
                pass
            leaving.cancel()
        results = [stream.result(timeout=120) for stream in streams]
    assert_no_crossed_wires(results, codewords)
