"""Engines that speculate with models whose layers keep a state: rejected tokens are taken back from
it by libllama's snapshots (n_rs_seq), and answers are the same."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from pyllamabatch.engine.drafters import Wanted
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, NotEnoughMemory, UnsupportedOperation
from pyllamabatch.llama.model import Model
from pyllamabatch.planner import residency
from pyllamabatch.planner.residency import Projector
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.decoding import loaded, recurrent_with_mtp
from tests.support.engines import Checked, check_idle, greedy
from tests.support.faults import set_fault
from tests.support.models_gguf import gguf_path
from tests.support.speculating import LOOP, PROMPTS, always, check_mixes, engine_of, priced


class Own:
    """A drafter in Python: what a sequence began with."""

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        return [one.tokens[: one.n].tolist() for one in wanted]


class Case(NamedTuple):
    model: Model
    drafter: Any


@pytest.fixture(params=["lfm2 ngram", "lfm2 draft", "lfm2 own", "qwen35 ngram", "qwen35 mtp"])
def case(request: pytest.FixtureRequest, model: Model) -> Case:
    name, drafter = request.param.split()
    target = loaded("lfm2") if name == "lfm2" else recurrent_with_mtp(drafter == "mtp")
    return Case(target, {"draft": model, "own": Own()}.get(drafter, drafter))


def test_any_mix_of_requests_has_the_same_answers(case: Case) -> None:
    """Little room, so that sequences are preempted; what ended is in the prefix cache, as it was
    rolled back to."""
    check_any_mix(case, 15)


@pytest.mark.slow
def test_a_thousand_mixes_have_the_same_answers() -> None:
    for case in (
        Case(loaded("lfm2"), "ngram"),
        Case(recurrent_with_mtp(), "mtp"),
        Case(recurrent_with_mtp(False), "ngram"),
    ):
        check_any_mix(case, 500)


def check_any_mix(case: Case, max_examples: int) -> None:
    how: dict[str, Any] = {"n_ctx": 128, "n_seq_max": 6, "speculate": case.drafter}
    speculating = [
        engine_of(case.model, policy=always(8, 16), **how),
        engine_of(case.model, policy=always(2, 1), preemption="swap", **how),
    ]
    with engine_of(case.model, n_seq_max=1, n_ctx=256, speculate=None) as alone:
        same = check_mixes(speculating, alone, max_examples)
    for engine in speculating:
        engine.close()
    assert same.n_same >= 0.98 * same.n_all
    assert same.n_accepted > 0.01 * same.n_all or case.drafter not in ("ngram", "mtp")


def test_rows_that_fill_up_can_be_taken_back(case: Case) -> None:
    """A graph is dear, and that of four sequences has more rows than one alone could take back."""
    params = [greedy(30, logit_bias=LOOP)] * 3 + [greedy(120, logit_bias=LOOP)]
    with engine_of(case.model, n_seq_max=1, speculate=None) as engine:
        expected = [r.tokens for r in engine.generate(PROMPTS[:4], params)]
    how: dict[str, Any] = {"n_seq_max": 4, "policy": priced(0.005)}
    with engine_of(case.model, speculate=case.drafter, **how) as engine:
        checked = Checked(engine)
        assert [r.tokens for r in engine.generate(PROMPTS[:4], params)] == expected
        stats, trace = check_idle(engine), engine.trace()
        assert checked.n_steps == stats.steps
        assert not trace["code"].any()
        assert stats.drafted_tokens > 0


def test_rows_that_can_not_be_taken_back_cost_no_token() -> None:
    """The context keeps fewer snapshots than there are drafts: the sequence is computed again, and
    so is what is cached."""
    model, params = loaded("lfm2"), [greedy(n, logit_bias=LOOP) for n in (33, 34, 60)]
    with engine_of(model, n_seq_max=1, speculate=None) as engine:
        expected = [r.tokens for r in engine.generate(PROMPTS[:3], params)]
    with engine_of(model, speculate="ngram", policy=always(4, 16)) as engine:
        engine._context._native.n_rs_seq = 1
        engine._core.commands.post(engine._context.renew)
        for _ in range(2):
            assert [r.tokens for r in engine.generate(PROMPTS[:3], params)] == expected
        assert check_idle(engine).preemptions > 0


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preempted_ones_go_on_as_they_would(case: Case, preemption: Any) -> None:
    params = [greedy(80, logit_bias=LOOP if case.drafter == "ngram" else {})] * 6
    with engine_of(case.model, n_seq_max=1, speculate=None) as engine:
        expected = [r.tokens for r in engine.generate(PROMPTS, params)]
    how: dict[str, Any] = {"n_seq_max": 6, "n_ctx": 256, "policy": always(4, 16)}
    with engine_of(case.model, speculate=case.drafter, preemption=preemption, **how) as engine:
        Checked(engine)
        assert [r.tokens for r in engine.generate(PROMPTS, params)] == expected
        stats = check_idle(engine)
        assert stats.preemptions > 0
        assert stats.drafted_tokens > 0


def test_the_accounts_agree_in_chunks_of_prompts() -> None:
    """And without a copy of what ended, which was rolled back, no turn would go on from it."""
    model, drawn = loaded("lfm2"), SamplingParams(temperature=0.7, seed=3, max_tokens=30)
    params = [greedy(60, logit_bias=LOOP), greedy(40, logit_bias=LOOP), drawn]
    prompts = [PROMPTS[0] * 6, PROMPTS[1] * 4, PROMPTS[2]]
    tokens = {}
    for drafter in (None, "ngram"):
        with engine_of(model, speculate=drafter, policy=always(8, 16)) as engine:
            checked = Checked(engine)
            results = engine.generate(prompts, params)
            before = engine.stats()
            turns = [[*p, *r.tokens, 300, 301] for p, r in zip(prompts, results, strict=True)]
            again = engine.generate(turns, params)
            stats, trace = check_idle(engine), engine.trace()
            assert checked.n_steps == stats.steps
        tokens[drafter] = [r.tokens for r in (*results, *again)]
        hits = stats.prefix_tokens - before.prefix_tokens
        assert hits == sum(len(turn) - 3 for turn in turns)
        assert sum(r.n_drafted for r in (*results, *again)) == stats.drafted_tokens
        assert sum(r.n_accepted for r in (*results, *again)) == stats.accepted_tokens
        assert trace["drafted"].sum() == stats.drafted_tokens
        assert trace["accepted"].sum() == stats.accepted_tokens == sum(stats.accepted_at)
        assert stats.rows == stats.decode_rows + stats.prefill_rows
        assert engine.limits.n_draft_max == (4 if drafter else 0)
    assert tokens["ngram"] == tokens[None]
    assert 0 < stats.accepted_tokens < stats.drafted_tokens <= 4 * stats.drafts


@pytest.mark.parametrize(("code", "n_times"), [(1, 3), (2, 1), (-3, 1), (-3, 2)])
@pytest.mark.parametrize("n_rows", [0, 1, 3, -1], ids="{} rows done".format)
def test_a_step_that_failed_leaves_nothing(code: int, n_times: int, n_rows: int) -> None:
    """Nor does a fresh context: no answer has a token of a state that was not its own."""
    model, params = loaded("lfm2"), [greedy(40, logit_bias=LOOP)] * 3
    with engine_of(model, speculate=None) as engine:
        expected = [r.tokens for r in engine.generate(PROMPTS[:3], params)]
    with engine_of(model, speculate="ngram", policy=always(4, 8)) as engine:
        for nth in (1, 4, 9):
            set_fault(engine._stepper, nth, code, n_rows, n_times)
            assert [r.tokens for r in engine.generate(PROMPTS[:3], params)] == expected
            check_idle(engine)
        stats = engine.stats()
        assert stats.restarts == (3 if n_times == 2 else 0)
        assert stats.accepted_tokens > 0


def test_an_interactive_sequence_beside_them() -> None:
    """It is trimmed, forked and saved while others have drafts."""
    model = loaded("lfm2")

    def told(engine: Engine) -> list[list[int]]:
        streams = [engine.submit(prompt, greedy(60, logit_bias=LOOP)) for prompt in PROMPTS[:2]]
        with engine.sequence(greedy(1)) as one:
            one.prompt(PROMPTS[2])
            got = [[one.sample().token for _ in range(6)]]
            with one.fork() as fork:
                got.append([fork.sample().token for _ in range(3)])
            one.trim(one.position - 4)
            got.append([one.sample().token for _ in range(3)])
            saved = one.snapshot()
            got.append([one.sample().token for _ in range(3)])
            one.restore(saved)
            got.append([one.sample().token for _ in range(3)])
        return [*got, *(stream.result().tokens for stream in streams)]

    with engine_of(model, speculate=None) as engine:
        expected = told(engine)
    with engine_of(model, speculate="ngram", policy=always(4, 4)) as engine:
        assert told(engine) == expected
        assert check_idle(engine).accepted_tokens > 0


def test_so_many_snapshots_as_are_asked_for() -> None:
    for given, n in ({}, 4), ({"n_rs_seq": 9}, 9), ({"n_rs_seq": 20}, 16), ({"n_ubatch": 4}, 2):
        with engine_of(loaded("lfm2"), speculate="ngram", **given) as engine:
            assert engine.limits.n_draft_max == n
            assert engine._context.n_rs_seq == given.get("n_rs_seq", n)
    with engine_of(loaded("lfm2"), n_rs_seq=3, speculate=None) as engine:
        assert engine.limits.n_draft_max == 0


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_a_state_without_snapshots_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made."""
    made: list[object] = []
    monkeypatch.setattr("pyllamabatch.engine.layout.NativeContext", lambda *a, **b: made.append(a))
    for drafter in ("ngram", Own()):
        with pytest.raises(UnsupportedOperation, match=f"{name}.*libllama keeps no snapshots"):
            engine_of(loaded(name), speculate=drafter)
    assert not made


def test_what_is_refused() -> None:
    model = loaded("lfm2")
    with pytest.raises(UnsupportedOperation, match="kv_unified=True"):
        engine_of(model, speculate="ngram", kv_unified=False)
    for n in (0, 63):
        with pytest.raises(ArgumentError, match=f"n_rs_seq={n}: must be in 1..62"):
            engine_of(model, speculate="ngram", n_rs_seq=n)
    with pytest.raises(ArgumentError, match="n_ubatch=2"):
        engine_of(model, speculate="ngram", n_ubatch=2)
    with pytest.raises(ArgumentError, match="no layers that predict"):
        engine_of(model, speculate="mtp")


def test_snapshots_count_in_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"n_ctx": 1024, "n_seq_max": 4, "kv_unified": True, "n_ubatch": 64}
    with Projector(gguf_path("lfm2")) as projector:
        kv = [projector.footprint(n_rs_seq=n, **sizes).host.kv for n in (0, 1, 9)]
    state = 4 * 2 * 3 * 64 * 4  # sequences, layers, tokens that each one sees, width, f32
    assert kv[1] - kv[0] == state
    assert kv[2] - kv[0] == 9 * state
    monkeypatch.setattr(residency, "host_available", lambda: kv[2] + 2**19)
    with pytest.raises(NotEnoughMemory, match="n_rs_seq"):
        engine_of(loaded("lfm2"), speculate="ngram", n_rs_seq=60)
