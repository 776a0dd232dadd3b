"""libllama itself: what a sequence gets in a shared batch is what it gets alone.

The ground that the stepper's and the engine's invariance stands on, with the tolerances stated in
`oracle`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.models_gguf import (
    ARCHITECTURES,
    SLIDING_WINDOW,
    Architecture,
    gguf_path,
    write_gguf,
)
from tests.support.oracle import (
    DEFAULT,
    RawModel,
    random_prompts,
    raw_context,
    raw_model,
    solo,
    together,
    tolerance,
    tolerance_default,
)

N_TOKENS = 16


@pytest.fixture(scope="module")
def model(architecture: Architecture) -> Iterator[RawModel]:
    with raw_model(gguf_path(architecture.name)) as model:
        yield model


def largest_difference(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
def test_each_sequence_of_a_batch_gets_what_it_gets_alone(
    model: RawModel, architecture: Architecture, n: int
) -> None:
    """Different lengths, chunked prompts, one arrival per step; unified cells."""
    prompts = random_prompts(n, seed=n)
    alone = [solo(model, prompt, N_TOKENS) for prompt in prompts]
    batched = together(model, prompts, alone, chunk=11, stagger=1)
    limit = tolerance(architecture.name)
    assert largest_difference(batched, [r.logits for r in alone]) <= limit
    same = [
        row.argmax() == token
        for rows, r in zip(batched, alone, strict=True)
        for row, token, margin in zip(rows, r.tokens, r.margins, strict=True)
        if margin > 2 * limit
    ]
    assert all(same)
    assert len(same) >= 0.9 * n * N_TOKENS


def test_a_stream_per_sequence_gives_the_same(model: RawModel, architecture: Architecture) -> None:
    prompts = random_prompts(5, seed=50)
    alone = [solo(model, prompt, N_TOKENS) for prompt in prompts]
    batched = together(model, prompts, alone, chunk=64, kv_unified=False, n_ctx=5 * 256)
    assert largest_difference(batched, [r.logits for r in alone]) <= tolerance(architecture.name)


def test_libllamas_default_settings_stay_within_their_own_tolerance(
    model: RawModel, architecture: Architecture
) -> None:
    """Flash attention and F16 cells: the one-row kernel sums in F16, the many-row one in F32."""
    prompts = random_prompts(5, seed=51)
    alone = [solo(model, prompt, N_TOKENS, settings=DEFAULT) for prompt in prompts]
    batched = together(model, prompts, alone, settings=DEFAULT, stagger=1)
    assert largest_difference(batched, [r.logits for r in alone]) <= tolerance_default(
        architecture.name
    )


def test_a_row_under_a_neighbours_id_is_far_outside_the_tolerance(
    model: RawModel, architecture: Architecture
) -> None:
    """Crossed wires show: the same token after another sequence's past gives other logits."""
    first, second = random_prompts(2, seed=52, shortest=40)
    second = second[: len(first)] + first[len(second) :]  # same length, so the same positions
    with raw_context(model, n_ctx=512, n_seq_max=2, kv_unified=True) as context:
        context.feed(first, seq=0)
        context.feed(second, seq=1)
        right, crossed = context.decode(
            [(first[5], len(first), 0, True), (first[5], len(first), 1, True)]
        )
    assert np.abs(right - crossed).max() > 20 * tolerance(architecture.name)


def test_the_sliding_window_matters_at_the_lengths_used_here(tmp_path: Path) -> None:
    """The same weights without the window agree up to its length and part after it."""
    gemma3 = ARCHITECTURES["gemma3"]
    write_gguf(tmp_path / "full.gguf", replace(gemma3, layers=("attention",) * 4))
    prompt = random_prompts(1, seed=53, shortest=60, longest=60)[0]
    with raw_model(gguf_path("gemma3")) as windowed, raw_model(tmp_path / "full.gguf") as full:
        for length, same in ((SLIDING_WINDOW, True), (2 * SLIDING_WINDOW, False)):
            one, other = (solo(model, prompt[:length], 1).logits for model in (windowed, full))
            difference = float(np.abs(one - other).max())
            assert (difference <= tolerance("gemma3")) == same, (length, difference)
            assert same or difference > 0.2
