"""`Engine(batch_invariant=True)`: all logits of a request are those that it has alone, bit by bit,
whatever a policy does, which others come, go and fail beside it, and whatever is cached."""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, RequestTooLong, UnsupportedOperation
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Invariance, policy_names
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.bits import recorded
from tests.support.engines import check_idle
from tests.support.faults import set_fault
from tests.support.invariance import Alone, AnyPolicy, assert_alone, each_alone
from tests.support.models_gguf import gguf_path

N_PROMPTS, N_UBATCH, N_CELLS = 10, 32, 512
OPTIONS: dict[str, Any] = {"batch_invariant": True, "n_ubatch": N_UBATCH, "cost": None}


def prompts(n_vocab: int) -> list[list[int]]:
    """Of 1 to 200 tokens; every third one begins like the one before, one is another one whole."""
    draw = random.Random(16)
    found: list[list[int]] = []
    for i in range(N_PROMPTS):
        own = [draw.randrange(5, n_vocab) for _ in range(draw.choice([1, 2, 33, 34, 65, 90, 120]))]
        found.append(found[-1][: draw.randrange(200)] + own if i % 3 == 2 else own)
    return [*found[:-1], found[2] + found[0]]


def wanted(i: int, max_tokens: int = 0) -> SamplingParams:
    """Of prompt `i`. Every second one is drawn."""
    n = max_tokens or 3 + 2 * (i % 6)
    return SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=n, ignore_eog=True)


def engine_of(model: Model, **options: Any) -> Engine:
    n = options.setdefault("n_seq_max", 4)
    return Engine(model, **{"n_ctx": n * N_CELLS, **OPTIONS, **options})


def alone(model: Model, **options: Any) -> Alone:
    """What each prompt has by itself: nothing is cached, nothing runs beside it."""
    with engine_of(model, prefix_cache=False, policy="fcfs", **options) as engine:
        return each_alone(engine, prompts(model.n_vocab), wanted)


def mixed(engine: Engine, order: Sequence[int], draw: random.Random) -> list[tuple[int, Any]]:
    """Prompts in this order, some after a token of the one before; others beside them that are
    cancelled or fail. The finished (prompt, result)."""
    texts = prompts(engine.model.n_vocab)
    nothing = dict.fromkeys(range(engine.model.n_vocab), float("-inf"))
    failing = SamplingParams(temperature=0, max_tokens=2, logit_bias=nothing)
    streams = []
    for i in order:
        streams.append((i, engine.submit(texts[i], wanted(i))))
        beside = draw.random()
        if beside < 0.2:
            engine.submit(texts[-i][::-1], wanted(i, 30)).cancel()
        elif beside < 0.3:
            engine.submit(texts[i][:40], failing)
        elif beside < 0.5:
            next(iter(streams[-1][1]), None)
    return [(i, stream.result(timeout=120)) for i, stream in streams]


@settings(max_examples=10)
@given(
    order=st.lists(st.integers(0, N_PROMPTS - 1), min_size=2, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    n_seq_max=st.sampled_from([2, 3, 4, 8]),
    policy=st.sampled_from(["any", *policy_names()]),
    preemption=st.sampled_from(["swap", "recompute"]),
    fault=st.none() | st.integers(1, 60),
    n_threads=st.sampled_from([1, 2]),
)
def test_no_policy_changes_a_bit(
    embedded_model: Model,
    embedded_bits: Alone,
    order: list[int],
    seed: int,
    n_seq_max: int,
    policy: str,
    preemption: str,
    fault: int | None,
    n_threads: int,
) -> None:
    """Any order, any number of sequences and threads, any policy; `fault`: a decode fails twice,
    so that all goes on with a fresh context."""
    chosen = AnyPolicy(seed) if policy == "any" else policy
    own = {"policy": chosen, "preemption": preemption, "n_threads": n_threads}
    with engine_of(embedded_model, n_seq_max=n_seq_max, **own) as engine:
        if fault is not None:
            set_fault(engine._stepper, fault, -3, n_times=2)
        with recorded(engine) as bits:
            assert_alone(mixed(engine, order, random.Random(seed)), bits, embedded_bits)
        set_fault(engine._stepper, 0, 0)


def test_what_it_takes_does_happen(embedded_model: Model, embedded_bits: Alone) -> None:
    """Preempted and computed again, rows that decoded among them; restarts; prefixes; and runs of
    many steps in one native call."""
    order = [*range(N_PROMPTS)] * 2
    for preemption in ("recompute", "swap"):
        own = {"policy": AnyPolicy(3), "preemption": preemption}
        with engine_of(embedded_model, **own) as engine, recorded(engine) as bits:
            assert_alone(mixed(engine, order, random.Random(5)), bits, embedded_bits)
            stats = engine.stats()
        assert stats.preemptions > 0
        assert stats.prefix_tokens > 0
        # A state is not loaded into a stream that a copy still reads: it is computed again.
        assert stats.recomputed_rows > 0 or preemption == "swap"
        assert (stats.swapped_tokens > 0) == (preemption == "swap")
    with engine_of(embedded_model) as engine:
        set_fault(engine._stepper, 40, -3, n_times=2)
        results = engine.generate(prompts(engine.model.n_vocab), [wanted(i) for i in range(10)])
        assert engine.stats().restarts == 1
        assert [r.tokens for r in results] == [tokens for tokens, _ in embedded_bits]
        check_idle(engine)


@pytest.mark.parametrize(
    ("name", "file_type"),
    [
        ("llama", "f32"), ("qwen2", "f32"), ("gemma3", "f32"), ("qwen3moe", "f32"),
        ("llama", "q8_0"), ("gemma3", "q4_0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("attention", ["enabled", "disabled"])
@settings(max_examples=2)
@given(
    order=st.lists(st.integers(0, N_PROMPTS - 1), min_size=4, max_size=8),
    seed=st.integers(0, 2**32 - 1),
    n_seq_max=st.integers(2, 6),
)
def test_architectures_and_types(
    name: str, file_type: str, attention: str, order: list[int], seed: int, n_seq_max: int
) -> None:
    own: dict[str, Any] = {"flash_attn_type": attention}
    known, policy = known_of(name, file_type, attention), AnyPolicy(seed)
    with (
        Model(gguf_path(name, file_type)) as model,
        engine_of(model, n_seq_max=n_seq_max, policy=policy, **own) as engine,
        recorded(engine) as bits,
    ):
        assert_alone(mixed(engine, order, random.Random(seed)), bits, known)


@cache
def known_of(name: str, file_type: str, attention: str) -> Alone:
    with Model(gguf_path(name, file_type)) as model:
        return alone(model, flash_attn_type=attention)


def test_what_it_says_of_itself(embedded_model: Model) -> None:
    with engine_of(embedded_model, n_seq_max=3) as engine:
        assert engine.invariance is not None
        assert engine.invariance.grid == N_UBATCH
        assert engine.invariance.widths[-1] >= 3
        assert min(engine.invariance.widths) >= 2
        assert "batch_invariant" in engine.layout
        assert engine.n_ctx_seq == N_CELLS - 1
        with pytest.raises(RequestTooLong):
            engine.submit([5] * N_CELLS, wanted(0))
    with Engine(embedded_model, n_seq_max=2) as engine:
        assert engine.invariance is None
    with engine_of(embedded_model, n_seq_max=1, prefix_cache=False) as engine:
        assert engine.generate([[5, 6]], wanted(0))[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kv_unified": True}, "kv_unified=True"),
        ({"swa_full": False}, "swa_full=False"),
        ({"n_ubatch": 2}, "n_ubatch=2"),
        ({"batch_invariant": 1}, "batch_invariant=1"),
        ({"batch_invariant": "mostly"}, "batch_invariant='mostly'"),
        ({"batch_invariant": "nearly", "speculate": "ngram"}, "speculate='ngram'"),
    ],
)
def test_options_that_stand_in_its_way(
    embedded_model: Model, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ArgumentError, match=text):
        engine_of(embedded_model, **options)


def test_a_swapped_state_has_not_all_cells_of_a_window() -> None:
    with Model(gguf_path("gemma3")) as model, pytest.raises(ArgumentError, match="'swap'"):
        engine_of(model, preemption="swap")


def test_a_gpu_has_nearly_the_same_bits_at_most(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows that decode have one width there, and nothing is promised. The CPU stands in."""
    monkeypatch.setattr(embedded_model, "offloaded", 1.0)
    with pytest.raises(UnsupportedOperation, match="nearly"):
        engine_of(embedded_model)
    with engine_of(embedded_model, batch_invariant="nearly", n_seq_max=3) as engine:
        assert engine.invariance == Invariance(N_UBATCH, (3,))
        texts = prompts(embedded_model.n_vocab)
        params = [wanted(i) for i in range(N_PROMPTS)]
        together = [result.tokens for result in engine.generate(texts, params)]
    with engine_of(embedded_model, batch_invariant="nearly", prefix_cache=False) as engine:
        one_by_one = [engine.generate([t], p)[0].tokens for t, p in zip(texts, params, strict=True)]
    assert together == one_by_one


@pytest.mark.parametrize("name", ["mamba", "jamba", "lfm2"])
def test_recurrent_models_are_refused(name: str) -> None:
    with Model(gguf_path(name)) as model, pytest.raises(UnsupportedOperation, match="recurrent"):
        engine_of(model)
