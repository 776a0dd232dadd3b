"""An engine that speculates: the same answers in fewer steps, and its accounts agree."""

from collections.abc import Sequence
from math import inf
from typing import Any

import numpy as np
import pytest

from pyllamabatch.engine.drafters import Ngram, Wanted, make_drafter
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.llama.model import Model
from pyllamabatch.server.metrics import Metrics
from pyllamabatch.server.tokens import timings
from tests.support.decoding import loaded, with_mtp
from tests.support.engines import Checked, check_idle, greedy
from tests.support.made_up_costs import Linear
from tests.support.speculating import LOOP, PROMPTS, always, check_mixes, engine_of, priced

LAYOUTS = pytest.mark.parametrize("kv_unified", [True, False], ids=["pool", "streams"])


class Openings:
    """A drafter in Python that is seldom right: a request's first tokens."""

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [one.tokens[: one.n].tolist() if one.id % 3 else [] for one in wanted]


@pytest.fixture(params=["ngram", "draft model", "mtp", "own"])
def drafter(request: pytest.FixtureRequest, model: Model) -> Any:
    return {"draft model": model, "own": Openings()}.get(request.param, request.param)


@pytest.fixture
def target(drafter: Any, model: Model) -> Model:
    """One that it can draft for."""
    return with_mtp() if drafter == "mtp" else model


@LAYOUTS
def test_answers_are_the_same_and_the_accounts_agree(model: Model, kv_unified: bool) -> None:
    params = [greedy(60, logit_bias=LOOP), greedy(40, logit_bias=LOOP), greedy(50)]
    with engine_of(model, kv_unified=kv_unified, speculate=None) as engine:
        expected = engine.generate(PROMPTS[:3], params)
        plain = check_idle(engine)
        assert engine.limits.n_draft_max == plain.drafted_tokens == 0
    with engine_of(model, kv_unified=kv_unified, speculate="ngram", policy=always(8, 16)) as engine:
        checked = Checked(engine)
        results = engine.generate(PROMPTS[:3], params)
        stats, trace, text = check_idle(engine), engine.trace(), Metrics(engine).text().decode()
        assert checked.n_steps == stats.steps < plain.steps
    assert [r.tokens for r in results] == [r.tokens for r in expected]
    assert stats.tokens == plain.tokens == 150
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert sum(r.n_drafted for r in results) == stats.drafted_tokens
    assert sum(r.n_accepted for r in results) == stats.accepted_tokens == sum(stats.accepted_at)
    assert sum(r.n_drafts for r in results) == stats.drafts >= stats.accepted_at[0]
    assert list(stats.accepted_at) == sorted(stats.accepted_at, reverse=True)
    assert 8 * stats.drafts >= stats.drafted_tokens > stats.drafts > 0
    assert {"draft_n", "draft_n_accepted"} < timings(results[0]).keys()
    assert not {"draft_n", "draft_n_accepted"} & timings(expected[0]).keys()
    for name, n in (
        ("num_drafts_total", stats.drafts),
        ("num_draft_tokens_total", stats.drafted_tokens),
        ("num_accepted_tokens_total", stats.accepted_tokens),
        ('num_accepted_tokens_per_pos_total{position="1"}', stats.accepted_at[1]),
    ):
        for server in ("vllm", "llamacpp"):
            assert f"{server}:spec_decode_{name} {float(n)}\n" in text
    tokens = stats.step_tokens
    assert sum(tokens.values()) == stats.steps <= stats.slot_steps <= 3 * stats.steps
    assert sum(n * n_steps for n, n_steps in tokens.items()) == stats.prefill_rows + stats.tokens
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


def test_requests_that_have_ended_are_drafted_from(model: Model) -> None:
    """The second of two equal requests finds its answer in the corpus, of which no more stays than
    was asked for."""
    accepted = {}
    for corpus in (0, 1000, 20):
        how = f"ngram:corpus={corpus}" if corpus else "ngram"
        with engine_of(model, speculate=how, policy=always(8, 16)) as engine:
            first, second = (engine.generate([PROMPTS[0]], greedy(60))[0] for _ in range(2))
            assert first.tokens == second.tokens
            accepted[corpus] = second.n_accepted - first.n_accepted
    assert accepted[0] == 0
    assert accepted[1000] > 40
    assert accepted[20] < 20
    with pytest.raises(ArgumentError, match="corpus"):
        Ngram(corpus=-1)
    assert str(make_drafter("ngram:corpus=1000")) == "ngram:corpus=1000"


def test_a_policy_may_give_any_credit(model: Model) -> None:
    """What drafts have gained is known all the same."""
    cost: Any = Linear(10.0)
    with engine_of(model, speculate="ngram", cost=cost, policy=priced(0.0, inf)) as engine:
        drafting = engine._core.scheduler.drafting
        assert drafting is not None
        engine.submit(PROMPTS[0], greedy(60)).result()
        assert drafting.credit < inf


def test_an_engine_drafts_without_being_asked_where_that_is_possible(model: Model) -> None:
    def may_draft(model: Model | None, **options: Any) -> bool:
        with Engine(model, n_seq_max=2, n_ctx=512, n_threads=1, **options) as engine:
            return engine.limits.n_draft_max > 0

    assert may_draft(model)
    assert not may_draft(model, speculate=None)
    assert not may_draft(model, cost=None)  # nothing decides whether that pays
    assert not may_draft(model, policy="fcfs")
    assert not may_draft(model, batch_invariant=True)
    assert may_draft(model, batch_invariant=True, speculate="ngram")
    assert not may_draft(loaded("lfm2"))
    with Engine(machine="nvidia-h200-gemma-3-1b-q4_k_m", n_seq_max=2) as engine:
        assert engine.limits.n_draft_max == 0


@pytest.mark.parametrize("policy", ["fcfs", "sarathi"])
def test_a_drafter_that_was_asked_for_drafts_under_any_shipped_policy(
    model: Model, policy: str
) -> None:
    cost: Any = Linear(10.0)  # rows cost nothing
    with engine_of(model, speculate=model, policy=policy, cost=cost) as engine:
        drafting = engine._core.scheduler.drafting
        assert drafting is not None
        drafting.credit, drafting._gained = 1.0, 2.0  # however long a turn takes here
        engine.submit(PROMPTS[0], greedy(60)).result()
        assert engine.stats().accepted_tokens > 0
        assert "speculate" not in engine.reasons


@pytest.mark.parametrize("policy", [None, "fcfs"])
def test_without_a_cost_model_a_drafter_is_off_and_says_so(
    model: Model, policy: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Its model is not even loaded."""
    how: dict[str, Any] = {"policy": policy, "cost": None, "speculate": "draft:/no/such.gguf"}
    with Engine(model, n_seq_max=2, n_ctx=512, n_threads=1, **how) as engine:
        assert engine.limits.n_draft_max == 0
        assert "cost model" in engine.reasons["speculate"]
    assert caplog.text.count("speculate is off") == 1


def test_what_is_refused(model: Model) -> None:
    with pytest.raises(ArgumentError, match="ngram"):
        engine_of(model, speculate="n-gram")
    with pytest.raises(UnsupportedOperation, match="logits"):
        Engine(machine="nvidia-h200-gemma-3-1b-q4_k_m", speculate="ngram")


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preempted_ones_go_on_as_they_would(target: Model, drafter: Any, preemption: Any) -> None:
    params = [greedy(80, logit_bias=LOOP if drafter == "ngram" else {})] * 6
    with engine_of(target, n_seq_max=1, kv_unified=True) as engine:
        expected = [r.tokens for r in engine.generate(PROMPTS, params)]
    cells: dict[str, Any] = {"n_seq_max": 6, "n_ctx": 256, "kv_unified": True}
    how: dict[str, Any] = {"policy": always(4, 16), "preemption": preemption}
    with engine_of(target, speculate=drafter, **cells, **how) as engine:
        Checked(engine)
        assert [r.tokens for r in engine.generate(PROMPTS, params)] == expected
        stats = check_idle(engine)
        assert stats.preemptions > 0
        assert stats.drafted_tokens > 0
        least = 0.3 * stats.drafted_tokens if drafter is target else drafter in ("ngram", "mtp")
        assert stats.accepted_tokens >= least


def test_an_interactive_sequence_has_no_drafts(target: Model, drafter: Any) -> None:
    with engine_of(target, speculate=drafter, policy=always(8, 16)) as engine:
        with engine.sequence(greedy(1, logit_bias=LOOP)) as sequence:
            sequence.prompt(PROMPTS[0])
            for _ in range(20):
                sequence.sample()
            fork = sequence.fork()
            fork.sample()
            fork.close()
            assert len(sequence.tokens) == len(PROMPTS[0]) + 20
        assert engine.stats().drafted_tokens == 0
        for _ in range(2):  # `Openings` leaves out every third one
            engine.submit(PROMPTS[0], greedy(20, logit_bias=LOOP)).result()
        assert engine.stats().drafted_tokens > 0


def check_any_mix(model: Model, drafter: Any, kv_unified: bool, max_examples: int) -> None:
    """Little room, so that sequences are preempted; and, in streams, come and go in gaps."""
    cells = {"n_ctx": 192, "n_seq_max": 6} if kv_unified else {"n_ctx": 3 * 256}
    how: dict[str, Any] = {"kv_unified": kv_unified, "speculate": drafter, **cells}
    speculating = [
        engine_of(model, policy=always(8, 16), **how),
        engine_of(model, policy=always(2, 1), preemption="swap", **how),
    ]
    with engine_of(model, kv_unified=kv_unified, n_seq_max=1, n_ctx=256) as alone:
        same = check_mixes(speculating, alone, max_examples)
    for engine in speculating:
        engine.close()
    assert same.n_same >= 0.98 * same.n_all
    assert same.n_accepted > 0.01 * same.n_all or isinstance(drafter, Openings)


@LAYOUTS
def test_any_mix_of_requests_has_the_same_answers(
    target: Model, drafter: Any, kv_unified: bool
) -> None:
    check_any_mix(target, drafter, kv_unified, 10)


@pytest.mark.slow
@LAYOUTS
def test_a_thousand_mixes_have_the_same_answers(model: Model, kv_unified: bool) -> None:
    check_any_mix(model, model, kv_unified, 500)
