"""An engine with a draft model: the same answers, and the draft's memory stays in step."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyllamabatch.engine import layout
from pyllamabatch.engine.draft_feeds import BATCH, ModelFeed
from pyllamabatch.engine.drafters import Draft
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, NotEnoughMemory, UnsupportedOperation
from pyllamabatch.llama.limits import memory_parts
from pyllamabatch.llama.model import Model
from pyllamabatch.models import default_prompts
from pyllamabatch.planner import residency
from pyllamabatch.scheduler.drafting import Drafting
from pyllamabatch.scheduler.policies.composed import ComposedPolicy
from pyllamabatch.scheduler.policy import PlanBuilder, Speculation
from pyllamabatch.step.draft_model import DraftModel
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.decoding import loaded, with_mtp
from tests.support.engines import Checked, check_idle, greedy
from tests.support.faults import set_fault
from tests.support.made_up_costs import Linear
from tests.support.models_gguf import N_VOCAB, Architecture, write_gguf
from tests.support.speculating import PROMPTS, always, engine_of

LAYOUTS = pytest.mark.parametrize("kv_unified", [True, False], ids=["pool", "streams"])


def draft_of(engine: Engine) -> DraftModel:
    feed = engine._core._device.feed
    assert isinstance(feed, ModelFeed)
    return feed._draft


class Case(NamedTuple):
    """A model, what drafts for it, and the share of its drafts that is right at least."""

    model: Model
    drafter: Model | str
    right: float


@pytest.fixture(params=["draft model", "mtp"])
def case(request: pytest.FixtureRequest, model: Model) -> Case:
    return Case(with_mtp(), "mtp", 0.1) if request.param == "mtp" else Case(model, model, 0.3)


@LAYOUTS
def test_a_model_that_drafts_for_itself_takes_a_fraction_of_the_steps(
    model: Model, kv_unified: bool
) -> None:
    params = [greedy(60), greedy(40), SamplingParams(temperature=0.8, seed=3, max_tokens=30)]
    with engine_of(model, kv_unified=kv_unified) as engine:
        expected, plain = engine.generate(PROMPTS[:3], params), check_idle(engine)
    how: dict[str, Any] = {"kv_unified": kv_unified, "policy": always(8, 16)}
    with engine_of(model, speculate=model, **how) as engine:
        checked = Checked(engine)
        results, stats = engine.generate(PROMPTS[:3], params), check_idle(engine)
        trace = engine.trace()
        assert checked.n_steps == stats.steps < plain.steps / 2
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    assert stats.accepted_tokens > 0.5 * stats.drafted_tokens > 0
    assert trace["drafted"].sum() == stats.drafted_tokens
    assert trace["run"].max() < len(trace) - 1  # calls of several steps: it drafts without Python


def test_a_long_prompt_is_caught_up_with_bit_by_bit(model: Model) -> None:
    """A step waits for a batch of it at most; those behind have no drafts until they are done."""
    prompt = (PROMPTS[0] * 100)[: 2 * BATCH + 100]
    with engine_of(model, n_ctx=4096, n_batch=512) as engine:
        expected = engine.submit(prompt, greedy(20)).result()
    with engine_of(model, n_ctx=4096, n_batch=512, speculate=model, policy=always(4, 1)) as engine:
        assert engine.submit(prompt, greedy(20)).result().tokens == expected.tokens
        trace = engine.trace()
        drafted = trace["drafted"][trace["prefill_rows"] == 0].tolist()
        assert not any(drafted[:2])
        assert all(drafted[2:-1])


def lacks_of(drafter: Draft, model: Model, *prompts: list[int]) -> list[int]:
    """What the draft model lacked at most while each of these was answered, one after the other."""
    lacks: list[int] = []

    def look(builder: PlanBuilder) -> Speculation:
        drafting = engine._core.scheduler.drafting
        assert drafting is not None
        drafting.asks()
        lacks.append(int(drafting.lacks.sum()))
        return Speculation(dict.fromkeys(builder.view.decoding, 2), 2)

    policy, found = ComposedPolicy(repeat=1, speculate=look), list[int]()
    with engine_of(model, n_ctx=4096, speculate=drafter, policy=policy) as engine:
        for prompt in prompts:
            lacks.clear()
            engine.submit(prompt, greedy(20)).result()
            found.append(max(lacks))
    return found


def test_what_a_draft_model_lacks_is_what_none_of_its_sequences_holds(model: Model) -> None:
    first, second = PROMPTS[0] * 10, PROMPTS[1] * 10
    lacks = lacks_of(Draft(model), model, first, first + second)
    assert lacks == [len(first) + 1, len(second) + 1]


def test_it_lacks_nothing_of_a_sequence_that_is_too_long_for_it(model: Model) -> None:
    """Else the others would have no drafts for what that one seems to take at first."""
    prompt = (PROMPTS[0] * 100)[:1000]
    assert lacks_of(Draft(model, n_ctx=512), model, prompt, prompt[:400]) == [0, 401]


def test_a_drafter_is_as_large_as_what_it_computes(model: Model) -> None:
    """The model itself, all of it; of its own layers, one."""
    with engine_of(model, speculate=model) as engine:
        assert engine._core._device.feed.size == 1
    with engine_of(with_mtp(), speculate="mtp") as engine:
        assert engine._core._device.feed.size == 1 / with_mtp().n_layer


@pytest.mark.parametrize(("code", "n_times"), [(1, 4), (2, 1), (-3, 1)])
def test_requests_go_on_without_a_draft_that_fails(
    case: Case, code: int, n_times: int, caplog: pytest.LogCaptureFixture
) -> None:
    params = [greedy(40)] * 3
    with engine_of(case.model) as engine:
        expected = [r.tokens for r in engine.generate(PROMPTS[:3], params)]
    with engine_of(case.model, speculate=case.drafter, policy=always(4, 8)) as engine:
        set_fault(draft_of(engine)._stepper, 3, code, n_times=n_times)
        with caplog.at_level(logging.WARNING):
            assert [r.tokens for r in engine.generate(PROMPTS[:3], params)] == expected
        assert "draft model" in caplog.text
        before = check_idle(engine)
        assert [r.tokens for r in engine.generate(PROMPTS[:3], params)] == expected
        stats = check_idle(engine)
        drafted = stats.drafted_tokens - before.drafted_tokens
        assert stats.accepted_tokens - before.accepted_tokens > case.right * drafted > 0


def test_with_few_cells_the_shorter_sequences_have_drafts(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """There is one line about the longer ones."""
    prompts = [PROMPTS[0] * 8, PROMPTS[1], PROMPTS[2]]
    params = [greedy(30)] * 3
    with engine_of(model) as engine:
        expected = [r.tokens for r in engine.generate(prompts, params)]
    small = Draft(model, n_ctx=256)
    with engine_of(model, speculate=small, policy=always(4, 8), n_batch=512) as engine:
        assert [r.tokens for r in engine.generate(prompts, params)] == expected
        assert check_idle(engine).accepted_tokens > 30
        for _ in range(2):
            engine.generate(prompts, params)
    told = [one for one in caplog.records if "no cells for all" in one.getMessage()]
    assert [one.levelno for one in told if one.levelno >= logging.WARNING] == [logging.WARNING]


def test_the_embedded_model_has_a_draft_of_its_own(embedded_model: Model) -> None:
    chats = [[{"role": "user", "content": one.prompt}] for one in default_prompts()[:8]]
    params = SamplingParams(temperature=0, max_tokens=40)
    answers = []
    speculating: dict[str, Any] = {"speculate": "draft", "policy": always(4, 16)}
    for how in ({}, speculating):
        with Engine(embedded_model, n_seq_max=4, n_threads=1, **how) as engine:
            streams = [engine.chat.submit(chat, params) for chat in chats]
            answers.append([stream.result().message.content for stream in streams])
            stats = engine.stats()
    assert answers[0] == answers[1]
    assert stats.accepted_tokens > 0.3 * stats.drafted_tokens > 0


def test_memory_is_for_both_models(embedded_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it bounds the cells, the engine leaves the draft some, and says how many would fit."""
    free = 12 * 2**20
    for module in (layout, residency):
        monkeypatch.setattr(module, "host_available", lambda: free)
    how: dict[str, Any] = {"n_seq_max": 4, "n_threads": 1, "speculate": "draft"}
    with Engine(embedded_model, **how) as engine:
        contexts = engine._context, draft_of(engine)._context
        n_ctx = engine._context.n_ctx
        assert n_ctx <= contexts[1].n_ctx
        parts = [part for context in contexts for part in memory_parts(context)]
        assert sum(part.context + part.compute for part in parts) <= free
    with pytest.raises(NotEnoughMemory, match=r"n_ctx=\d+ would fit") as caught:
        Engine(embedded_model, n_ctx=2**16, kv_unified=True, **how)
    assert int(str(caught.value).split("n_ctx=")[1].split()[0]) >= n_ctx  # which leaves some free


def test_a_draft_that_is_loaded_is_where_the_model_is() -> None:
    with (
        Model.default(devices=[], n_gpu_layers=1) as model,
        engine_of(model, speculate="draft") as engine,
    ):
        load = draft_of(engine)._context.model._load
        assert (load["devices"], load["n_gpu_layers"]) == ([], 1)


def test_an_engine_without_credit_does_nothing_for_drafts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not looked at, and the draft model computes nothing, and hears of none."""
    monkeypatch.setattr(Drafting, "view", None)
    monkeypatch.setattr(DraftModel, "begin", None)
    cost: Any = Linear(10.0)
    with engine_of(model, speculate=model, cost=cost) as engine:
        drafting = engine._core.scheduler.drafting
        assert drafting is not None
        drafting.credit = -1e9
        for prompt in PROMPTS[:2]:
            assert len(engine.submit(prompt, greedy(60)).result().tokens) == 60
        assert draft_of(engine)._context.memory.pos_max(0) == -1
        drafting.credit = 1.0
        with pytest.raises(TypeError):
            engine.submit(PROMPTS[0], greedy(60)).result()


def test_the_default_policy_tries_a_draft_that_was_never_tried(model: Model) -> None:
    cost: Any = Linear(10.0)  # rows cost nothing
    with engine_of(model, speculate=model, cost=cost) as engine:
        drafting = engine._core.scheduler.drafting
        assert drafting is not None
        drafting.credit, drafting._gained = 1.0, 2.0  # however long a turn takes here
        engine.submit(PROMPTS[0], greedy(60)).result()
        assert engine.stats().accepted_tokens > 0


@pytest.mark.parametrize("draft_has_more", [True, False])
def test_the_larger_vocabulary_may_be_either_one_s(
    model: Model, tmp_path: Path, draft_has_more: bool
) -> None:
    """Its last tokens end a draft, and a text with one of them has no drafts."""
    path = tmp_path / "more.gguf"
    write_gguf(path, Architecture("llama", ("attention",) * 3, n_spare=100))
    with Model(path) as more:
        target, draft = (model, more) if draft_has_more else (more, model)
        prompts = [*PROMPTS[:3], *([] if draft_has_more else [[5, N_VOCAB + 1, 6]])]
        params = [greedy(40)] * len(prompts)
        with engine_of(target) as engine:
            expected = [r.tokens for r in engine.generate(prompts, params)]
        with engine_of(target, speculate=draft, policy=always(4, 8)) as engine:
            results = engine.generate(prompts, params)
            assert check_idle(engine).drafted_tokens > 10
        assert [r.tokens for r in results] == expected
        if draft_has_more:
            return
        lacked = [[i for i, t in enumerate(r.tokens) if t >= N_VOCAB] for r in results]
        assert any(first > 0 for first, *_ in filter(None, lacked[:3]))
        assert results[3].n_drafted == 0


def test_what_is_refused(model: Model, embedded_model: Model) -> None:
    with pytest.raises(ArgumentError, match=r"draft:FILE.*the model has"):
        engine_of(model, speculate="draft")
    with pytest.raises(ArgumentError, match="vocabulary must be the model's"):
        engine_of(model, speculate=embedded_model)
    with pytest.raises(UnsupportedOperation, match="recurrent state"):
        engine_of(model, speculate=loaded("mamba"))
    with pytest.raises(ArgumentError, match="speculate"):
        engine_of(model, speculate=7)
    with pytest.raises(ArgumentError, match=r"Draft\.n_ctx=1: must hold a token of each sequence"):
        engine_of(model, speculate=Draft(model, 1))


@LAYOUTS
def test_cancels_and_faults_of_the_target_leave_the_draft_in_step(
    case: Case, kv_unified: bool
) -> None:
    """A decode that fails for good, too: a fresh context, and all is computed again."""
    params = [greedy(60)] * 6
    with engine_of(case.model, kv_unified=kv_unified) as engine:
        expected = [r.tokens for r in engine.generate(PROMPTS, params)]
    how: dict[str, Any] = {"kv_unified": kv_unified, "policy": always(4, 2)}
    with engine_of(case.model, speculate=case.drafter, **how) as engine:
        stepper = engine._stepper
        for countdown, code, n_times in ((9, 2, 1), (12, -3, 3)):
            set_fault(stepper, countdown, code, n_times=n_times)
            streams = [
                engine.submit(prompt, one) for prompt, one in zip(PROMPTS, params, strict=True)
            ]
            for token, _ in zip(streams[1], range(7), strict=False):
                assert token.text is not None
            streams[1].cancel()
            results = [stream.wait() for stream in streams]
            for i, result in enumerate(results):
                n = len(result.tokens)
                assert result.tokens == expected[i][:n]
                assert n == 60 or i == 1
            check_idle(engine)
        before = engine.stats()
        assert before.restarts > 0
        engine.generate(PROMPTS[:3], greedy(60))
        stats = engine.stats()
        drafted = stats.drafted_tokens - before.drafted_tokens
        assert stats.accepted_tokens - before.accepted_tokens > case.right * drafted > 0
