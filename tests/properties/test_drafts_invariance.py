"""Batch invariance with drafts: each row that a token is sampled from has the bits that it has
alone, without drafts."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.drafters import Wanted
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from tests.properties.test_batch_invariance import (
    N_PROMPTS,
    alone,
    engine_of,
    mixed,
    prompts,
)
from tests.support.bits import recorded
from tests.support.engines import check_idle
from tests.support.invariance import Alone, assert_alone
from tests.support.models_gguf import gguf_path
from tests.support.speculating import always, check_mixes
from tests.support.speculating import engine_of as engine_of_mixes

N_MIXES = 1000


class Knows:
    """A drafter: the answers, three tokens of four as they are."""

    def __init__(self, model: Model, known: Alone, seed: int) -> None:
        texts = prompts(model.n_vocab)
        self._answers = {tuple(text): known[i][0] for i, text in enumerate(texts)}
        self._draw = random.Random(seed)

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [self._of(one) for one in wanted]

    def _of(self, one: Wanted) -> list[int]:
        answer = self._answers.get(tuple(one.tokens[: one.n_prompt].tolist()), ())
        at = len(one.tokens) - one.n_prompt
        drafted = answer[at : at + one.n]
        return [token if self._draw.random() < 0.75 else token ^ 1 for token in drafted]


def check(model: Model, known: Alone, order: Sequence[int], seed: int, **options: Any) -> Engine:
    """These prompts have the bits that they have alone. Returns the engine, closed."""
    drafter = Knows(model, known, seed)
    with engine_of(model, speculate=drafter, **options) as engine:
        with recorded(engine) as bits:
            assert_alone(mixed(engine, order, random.Random(seed)), bits, known)
        assert engine.drain(60)  # also of those that were cancelled
        check_idle(engine)
    return engine


@settings(max_examples=6)
@given(
    order=st.lists(st.integers(0, N_PROMPTS - 1), min_size=2, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    n_seq_max=st.sampled_from([1, 2, 3, 4, 8]),
    most=st.sampled_from([1, 3, 5, 16]),
    n_threads=st.sampled_from([1, 2]),
)
def test_no_draft_changes_a_bit(
    embedded_model: Model,
    embedded_bits: Alone,
    order: list[int],
    seed: int,
    n_seq_max: int,
    most: int,
    n_threads: int,
) -> None:
    """Any order, any number of sequences and threads, drafts of any length."""
    own = {"n_seq_max": n_seq_max, "policy": always(most, 1), "n_threads": n_threads}
    check(embedded_model, embedded_bits, order, seed, **own)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("gemma3", "enabled"),
        ("llama", "disabled"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [("llama", "enabled"), ("gemma3", "disabled"), ("qwen3moe", "enabled")]
        ),
    ],
)
def test_architectures(name: str, attention: str) -> None:
    """Sliding windows, experts; without flash attention a row's sum may depend on the rows of its
    sequence beside it: then there are no drafts."""
    with Model(gguf_path(name)) as model:
        own: dict[str, Any] = {"flash_attn_type": attention}
        known = alone(model, **own)
        engine = check(model, known, range(N_PROMPTS), 2, policy=always(7, 1), **own)
    stats = engine.stats()
    assert engine.invariance is not None
    possible = any(engine.invariance.drafted.values())
    assert possible or name != "gemma3" or attention == "disabled"
    if possible:
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
    else:
        assert stats.drafted_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["ngram", "draft"])
def test_a_thousand_mixes_in_streams_are_the_same_bit_by_bit(drafter: str) -> None:
    """Of requests with any sampling; the draft model is the model itself."""
    with Model(gguf_path("llama")) as model:
        own: dict[str, Any] = {"batch_invariant": True, "n_batch": 64, "n_ubatch": 32}
        own |= {"flash_attn_type": "enabled", "type_k": "f16", "type_v": "f16"}
        speculate = model if drafter == "draft" else drafter
        speculating = [
            engine_of_mixes(model, speculate=speculate, policy=always(*how), n_ctx=3 * 256, **own)
            for how in ((8, 16), (3, 1))
        ]
        with engine_of_mixes(model, n_seq_max=1, n_ctx=256, **own) as one:
            same = check_mixes(speculating, one, N_MIXES, exactly=True)
        for engine in speculating:
            engine.close()
    assert same.n_same == same.n_all
    assert same.n_accepted > 0.01 * same.n_all
