"""An engine that speculates: the same answers in fewer steps, and its accounts agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Result
from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler.policies.composed import ComposedPolicy
from pyllamabatch.scheduler.policy import PlanBuilder, Speculation
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.decoding import loaded
from tests.support.engines import EXACT, Checked, check_idle, greedy
from tests.support.oracle import random_prompts

LOOP = {270: 25.0, 280: 25.0, 290: 25.0}  # of three tokens: what was drafted is often right
PROMPTS = [prompt * 2 for prompt in random_prompts(6, seed=77, shortest=8, longest=20)]


def always(most: int, steps: int) -> ComposedPolicy:
    """Every sequence that decodes has drafts, as far as there is room."""

    def speculate(builder: PlanBuilder) -> Speculation:
        drafts = builder.view.drafts
        assert drafts is not None
        seen = drafts()
        n = len(builder.view.decoding)
        k = min(most, seen.n_max, (min(seen.room, builder.cells + n) - n) // max(1, n))
        return Speculation(dict.fromkeys(seen.ids, k) if k > 0 else {}, steps)

    return ComposedPolicy(repeat=2**31, speculate=speculate)


def engine_of(model: Model, **options: Any) -> Engine:
    given = {"n_seq_max": 3, "n_ctx": 1024, "n_batch": 64, "cost": None, **EXACT, **options}
    return Engine(model, **given)


@pytest.mark.parametrize("kv_unified", [True, False], ids=["pool", "streams"])
def test_answers_are_the_same_and_the_accounts_agree(model: Model, kv_unified: bool) -> None:
    params = [greedy(60, logit_bias=LOOP), greedy(40, logit_bias=LOOP), greedy(50)]
    with engine_of(model, kv_unified=kv_unified) as engine:
        expected = engine.generate(PROMPTS[:3], params)
        plain = check_idle(engine)
        assert engine.limits.n_draft_max == plain.drafted_tokens == 0
    with engine_of(model, kv_unified=kv_unified, speculate="ngram", policy=always(8, 16)) as engine:
        checked = Checked(engine)
        results = engine.generate(PROMPTS[:3], params)
        stats, trace = check_idle(engine), engine.trace()
        assert checked.n_steps == stats.steps < plain.steps
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    assert stats.tokens == plain.tokens == 150
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert stats.rows == stats.decode_rows + stats.prefill_rows
    assert trace["drafted"].sum() == stats.drafted_tokens
    assert trace["accepted"].sum() == stats.accepted_tokens
    assert trace["rows"].sum() == stats.rows
    assert trace["prefill_rows"].sum() == stats.prefill_rows
    assert (trace["sampled"] >= trace["accepted"]).all()
    steady = (trace["ids"][1:] == trace["ids"][:-1]).all(axis=1) & (trace["prefill_rows"][1:] == 0)
    grown = np.diff(trace["kv_used"])[steady & (trace["run"][1:] == trace["run"][:-1])]
    sampled = trace["sampled"][1:][steady & (trace["run"][1:] == trace["run"][:-1])]
    assert grown.tolist() == sampled.tolist()


def test_preempted_ones_go_on_as_they_would(model: Model) -> None:
    params = [greedy(80, logit_bias=LOOP)] * 6
    with engine_of(model, n_seq_max=1, kv_unified=True) as engine:
        expected = [r.tokens for r in engine.generate(PROMPTS, params)]
    with engine_of(
        model, n_seq_max=6, n_ctx=256, kv_unified=True, speculate="ngram", policy=always(4, 16)
    ) as engine:
        Checked(engine)
        assert [r.tokens for r in engine.generate(PROMPTS, params)] == expected
        stats = check_idle(engine)
        assert stats.preemptions > 0
        assert stats.accepted_tokens > 0


def test_an_interactive_sequence_has_no_drafts(model: Model) -> None:
    with engine_of(model, speculate="ngram", policy=always(8, 16)) as engine:
        params = SamplingParams(temperature=0, ignore_eog=True, logit_bias=LOOP)
        with engine.sequence(params) as sequence:
            sequence.prompt(PROMPTS[0])
            for _ in range(20):
                sequence.sample()
            assert engine.stats().drafted_tokens == 0
            assert len(sequence.tokens) == len(PROMPTS[0]) + 20


def test_what_is_refused(model: Model) -> None:
    with pytest.raises(ArgumentError, match="ngram"):
        engine_of(model, speculate="n-gram")
    with pytest.raises(UnsupportedOperation, match="recurrent state"):
        engine_of(loaded("lfm2"), speculate="ngram")
    with pytest.raises(UnsupportedOperation, match="logits"):
        Engine(machine="nvidia-h200-gemma-3-1b-q4_k_m", speculate="ngram")


requests = st.lists(
    st.tuples(
        st.integers(0, len(PROMPTS) - 1),
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.0, 0.9]),
            seed=st.integers(0, 2**31),
            max_tokens=st.integers(1, 50),
            repeat_penalty=st.sampled_from([1.0, 1.1]),
            logit_bias=st.sampled_from([{}, LOOP, LOOP, {2: 8.0}]),
            stop_token_ids=st.sampled_from([(), (300,)]),
            stop=st.sampled_from([(), (), ("the", "e")]),
            logprobs=st.sampled_from([2]),
        ),
    ),
    min_size=1,
    max_size=7,
)


def as_expected(expected: Result, got: Result, greedy: bool) -> tuple[int, int]:
    """Tokens that are the same, and all: a first one that differs is one that rounding decides."""
    n = next(
        (i for i, (a, b) in enumerate(zip(expected.tokens, got.tokens, strict=False)) if a != b),
        min(len(expected.tokens), len(got.tokens)),
    )
    assert expected.logprobs is not None
    assert got.logprobs is not None
    assert got.logprobs[:n] == pytest.approx(expected.logprobs[:n], abs=2e-3)
    if n == len(expected.tokens) == len(got.tokens):
        assert got.text == expected.text
        assert got.finish_reason == expected.finish_reason
        assert got.stop == expected.stop
    elif greedy:
        assert expected.top_logprobs is not None
        first, second, *_ = sorted(expected.top_logprobs[n].values(), reverse=True)
        assert first - second < 1e-3
    return n, max(len(expected.tokens), len(got.tokens))


@pytest.mark.parametrize("kv_unified", [True, False], ids=["pool", "streams"])
def test_any_mix_of_requests_has_the_same_answers(model: Model, kv_unified: bool) -> None:
    n_same = n_all = n_accepted = 0
    cells = {"n_ctx": 192, "n_seq_max": 6} if kv_unified else {"n_ctx": 3 * 256}
    speculating = [
        engine_of(model, kv_unified=kv_unified, speculate="ngram", policy=always(*how), **cells)
        for how in ((8, 16), (2, 1))
    ]
    with engine_of(model, kv_unified=kv_unified, n_seq_max=1, n_ctx=256) as alone:

        @settings(max_examples=20, deadline=None)
        @given(requests, st.integers(0, 1))
        def check(mix: list[tuple[int, SamplingParams]], which: int) -> None:
            nonlocal n_same, n_all, n_accepted
            engine = speculating[which]
            before = engine.stats()
            prompts, params = [PROMPTS[i] for i, _ in mix], [one for _, one in mix]
            results = engine.generate(prompts, params)
            stats = check_idle(engine)
            n_accepted += stats.accepted_tokens - before.accepted_tokens
            for prompt, one, result in zip(prompts, params, results, strict=True):
                expected = alone.submit(prompt, one).result()
                plain = one.temperature == 0 and one.repeat_penalty == 1 and not one.logit_bias
                same, of = as_expected(expected, result, plain)
                n_same, n_all = n_same + same, n_all + of

        check()
    for engine in speculating:
        engine.close()
    assert n_same >= 0.98 * n_all
    assert n_accepted > 0.01 * n_all
