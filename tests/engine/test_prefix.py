"""What requests share, on real contexts: prefixes are computed once, and the tokens do not tell."""

from functools import partial

import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams
from tests.properties.test_invariance_engine import assert_as_alone
from tests.support import engines as support
from tests.support.decoding import loaded
from tests.support.models_gguf import Architecture
from tests.support.oracle import Reference, random_prompts, solos, tolerance

N_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=N_TOKENS)
engine_on = partial(support.engine_on, n_ctx=1024, n_ubatch=32)
COMMON, *ENDS = random_prompts(11, seed=31, shortest=8, longest=20)
COMMON = [*COMMON, *range(280, 390)]
PROMPTS = [[*COMMON, *end[1:]] for end in ENDS]


@pytest.fixture(scope="module")
def model(architecture: Architecture) -> Model:
    return loaded(architecture.name)


@pytest.fixture(scope="module")
def alone(architecture: Architecture) -> list[Reference]:
    return solos(architecture.name, PROMPTS, N_TOKENS)


def n_prompt_rows(prompts: list[list[int]]) -> int:
    """Without their last ones, which decode."""
    return sum(len(prompt) - 1 for prompt in prompts)


@pytest.mark.parametrize(("unified", "cache"), [(True, True), (False, True), (True, False)])
def test_a_common_prefix_is_computed_once(
    model: Model, architecture: Architecture, alone: list[Reference], unified: bool, cache: bool
) -> None:
    options = {"kv_unified": unified, "n_ctx": 1024 if unified else 4096, "prefix_cache": cache}
    with engine_on(model, **options) as engine:
        results = engine.generate(PROMPTS, GREEDY)
        stats = engine.stats()
    assert_as_alone([r.tokens for r in results], alone, tolerance(architecture.name), 0.98)
    n = len(COMMON)
    if not cache:
        assert (stats.prefix_tokens, stats.kv_cached) == (0, 0)
        assert stats.prefill_rows == n_prompt_rows(PROMPTS)
        return
    if not unified and (architecture.recurrent or architecture.hybrid):
        # a state in the middle of a text needs a slot of its own to be cached in
        assert stats.prefill_rows <= n_prompt_rows(PROMPTS)
        return
    assert stats.prefill_rows <= n_prompt_rows(PROMPTS) - (len(PROMPTS) - 1) * n + 16
    assert stats.prefix_tokens >= (len(PROMPTS) - 1) * n - 16
    assert stats.prefix_hit_rate > 0.6


def test_a_conversation_goes_on_from_what_it_left(model: Model, architecture: Architecture) -> None:
    """Three turns, each the whole history and more; the answer's last token was never computed."""
    with engine_on(model) as engine:
        history = PROMPTS[0]
        for turn in range(3):
            before = engine.stats()
            result = engine.submit(history, GREEDY).result(60)
            stats = engine.stats()
            if turn:
                hit = stats.prefix_tokens - before.prefix_tokens
                assert hit == len(history) - 5 - 1
                assert stats.prefill_rows - before.prefill_rows == 5
            history = [*history, *result.tokens, *range(200, 205)]
        expected = solos(architecture.name, [history], N_TOKENS)
        tokens = engine.submit(history, GREEDY).result(60).tokens
    assert_as_alone([tokens], expected, tolerance(architecture.name), 0.5)


def test_the_same_prompt_again_and_again(
    model: Model, architecture: Architecture, alone: list[Reference]
) -> None:
    with engine_on(model) as engine:
        for _ in range(3):
            result = engine.submit(PROMPTS[3], GREEDY).result(60)
            assert_as_alone([result.tokens], alone[3:4], tolerance(architecture.name), 0.5)
        stats = engine.stats()
    can = engine.capabilities
    if not (can.recurrent or can.hybrid):
        assert stats.prefix_tokens == 2 * (len(PROMPTS[3]) - 1)


def test_a_prompt_is_computed_for_nothing_but_the_cache(
    model: Model, architecture: Architecture, alone: list[Reference]
) -> None:
    nothing = SamplingParams(max_tokens=0, logprobs=2, stop=["a"], stop_token_ids=[*range(450)])
    with engine_on(model) as engine:
        streams = [engine.submit(prompt, nothing) for prompt in PROMPTS]
        assert not any(list(stream) for stream in streams)
        results = [stream.result(60) for stream in streams]
        assert {(*r.tokens, r.text, r.finish_reason, r.stop) for r in results} == {
            ("", "length", None)
        }
        assert engine.stats().tokens == 0
        n_rows = engine.stats().prefill_rows
        answers = engine.generate(PROMPTS, GREEDY)
        can = engine.capabilities
        if not (can.recurrent or can.hybrid):
            assert engine.stats().prefill_rows == n_rows
    tokens = [answer.tokens for answer in answers]
    assert_as_alone(tokens, alone, tolerance(architecture.name), 0.5)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_samples_of_one_prompt(model: Model, prefix_cache: bool) -> None:
    params = SamplingParams(temperature=1.2, seed=40, max_tokens=N_TOKENS)
    with engine_on(model, prefix_cache=prefix_cache) as engine:
        streams = engine.submit_n(PROMPTS[1], params, 4)
        samples = [stream.result(60).tokens for stream in streams]
        stats = engine.stats()
        assert len({tuple(sample) for sample in samples}) == 4
        again = engine.submit_n(PROMPTS[1], params, 4)
        assert [stream.result(60).tokens for stream in again] == samples
        can = engine.capabilities
    if prefix_cache or not (can.recurrent or can.hybrid):
        assert stats.prefill_rows == n_prompt_rows([PROMPTS[1]])
    else:
        assert stats.prefill_rows <= n_prompt_rows(4 * [PROMPTS[1]])


def test_samples_that_make_no_sense() -> None:
    with engine_on(loaded("llama")) as engine:
        for n in (0, -1, 1.5):
            with pytest.raises(ArgumentError, match="n="):
                engine.submit_n(PROMPTS[0], GREEDY, n)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="params"):
            engine.submit_n(PROMPTS[0], "greedy", 2)  # type: ignore[arg-type]
        assert engine.stats().submitted == 0


def test_cached_prefixes_never_stand_in_the_way() -> None:
    """Long prompts that have nothing in common, one after the other: each needs all the cells."""
    prompts = random_prompts(6, seed=9, shortest=200, longest=230)
    with engine_on(loaded("llama"), n_ctx=256, prefix_cache=False) as engine:
        expected = [engine.submit(p, GREEDY).result(60).tokens for p in prompts]
    with engine_on(loaded("llama"), n_ctx=256) as engine:
        assert [engine.submit(p, GREEDY).result(60).tokens for p in prompts] == expected
        stats = engine.stats()
        assert stats.preemptions == 0
        assert stats.finished["error"] == 0
        assert 0 < stats.kv_cached <= stats.kv_total
