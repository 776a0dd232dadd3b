"""Engines that speculate: prompts and requests for them, a policy that always does, and how their
answers are compared."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.results import Result
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler.policies.composed import ComposedPolicy
from pyllamabatch.scheduler.policy import PlanBuilder, Speculation
from pyllamabatch.scheduler.view import Prices
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.engines import EXACT, check_idle
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


def priced(new_graph: float, credit: float = 10.0) -> ComposedPolicy:
    """As many drafts as pay: rows cost little, a graph of another size `new_graph` seconds."""

    def speculate(builder: PlanBuilder) -> Speculation:
        drafts = builder.view.drafts
        assert drafts is not None
        seen = drafts()
        seconds = 0.008 + 0.00005 * np.arange(seen.room + 1, dtype=np.float64)
        prices = Prices(seconds, seconds, credit, 0.0, new_graph)
        return Speculation(dict.fromkeys(seen.ids, seen.n_max), 16, prices)

    return ComposedPolicy(repeat=2**31, speculate=speculate)


def engine_of(model: Model, **options: Any) -> Engine:
    """Without a cost model, where none is given, and with drafts at every step, where these are."""
    given = {"n_seq_max": 3, "n_ctx": 1024, "n_batch": 64, "cost": None, **EXACT, **options}
    if given["cost"] is None and given.get("speculate") is not None:
        given.setdefault("policy", always(4, 16))
    return Engine(model, **given)


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


class Same(NamedTuple):
    """Tokens that were the same, tokens, and drafted ones that were accepted."""

    n_same: int
    n_all: int
    n_accepted: int


def check_mixes(
    speculating: list[Engine], alone: Engine, max_examples: int, *, exactly: bool = False
) -> Same:
    """Any mix of requests, in one of these engines, has the answers that each has in `alone`.
    exactly: down to the log-probabilities."""
    n_same = n_all = n_accepted = 0

    @settings(max_examples=max_examples)
    @given(requests, st.integers(0, len(speculating) - 1))
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
            if exactly:
                assert (result.tokens, result.logprobs) == (expected.tokens, expected.logprobs)
            plain = one.temperature == 0 and one.repeat_penalty == 1 and not one.logit_bias
            same, of = as_expected(expected, result, plain)
            n_same, n_all = n_same + same, n_all + of

    check()
    return Same(n_same, n_all, n_accepted)
