"""Drafters in Python: by an object, by name, by entry point; what they are told; their mistakes."""

import logging
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pyllamabatch.engine import drafters
from pyllamabatch.engine.drafters import _DRAFTERS, Draft, Mtp, Ngram, Wanted, drafter_of
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import registry
from pyllamabatch.scheduler.drafting import Drafting
from tests.support.engines import Checked, check_idle, clock, greedy
from tests.support.made_up_costs import Linear
from tests.support.speculating import PROMPTS, always, engine_of


class Knows:
    """The answers, as tokens behind their prompts; every fifth one is wrong."""

    def __init__(self, texts: Sequence[list[int]]) -> None:
        self.texts = texts
        self.ended_ids: list[int] = []
        self.asked: list[Wanted] = []

    def draft(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        self.asked += wanted
        return [self.after(one) for one in wanted]

    def after(self, one: Wanted) -> list[int]:
        known = one.tokens.tolist()
        text = next(text for text in self.texts if text[: len(known)] == known)
        return [
            270 if (len(known) + i) % 5 == 0 else token
            for i, token in enumerate(text[len(known) : len(known) + one.n])
        ]

    def ended(self, id: int) -> None:
        self.ended_ids.append(id)


@pytest.mark.parametrize("kv_unified", [True, False], ids=["pool", "streams"])
def test_a_drafter_of_ones_own(model: Model, kv_unified: bool) -> None:
    params = [greedy(40), greedy(30), greedy(20)]
    with engine_of(model, kv_unified=kv_unified) as engine:
        expected = [r.tokens for r in engine.generate(PROMPTS[:3], params)]
    own = Knows([p + e for p, e in zip(PROMPTS[:3], expected, strict=True)])
    with engine_of(model, kv_unified=kv_unified, speculate=own, policy=always(4, 16)) as engine:
        checked = Checked(engine)
        assert [r.tokens for r in engine.generate(PROMPTS[:3], params)] == expected
        stats = check_idle(engine)
        assert checked.n_steps == stats.steps < 30
    assert 0.5 * stats.drafted_tokens < stats.accepted_tokens < stats.drafted_tokens
    assert sorted(own.ended_ids) == sorted({one.id for one in own.asked}) == [1, 2, 3]
    assert {one.n_prompt for one in own.asked} == {len(prompt) for prompt in PROMPTS[:3]}
    assert all(1 <= one.n <= 4 and one.tokens.dtype == np.int32 for one in own.asked)
    with pytest.raises(ValueError, match="read-only"):
        own.asked[0].tokens[0] = 0


def test_what_comes_behind_each_step_of_a_drafter_is_lost(model: Model) -> None:
    """Without it, many steps would have gone on."""
    own, lost = wrong(lambda wanted: [[] for _ in wanted]), list[bool]()
    with engine_of(model, n_seq_max=1, speculate=own, policy=always(4, 16)) as engine:
        drafting: Any = engine._core.scheduler.drafting
        drafting.turned = lambda seconds, *, prompts: lost.append(drafting._cut)
        engine.submit(PROMPTS[0], greedy(40)).result()
    assert own.n_asked > 16
    assert sum(lost) >= 16


def test_kv_operations_are_no_time_that_a_look_at_drafts_takes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on while they are carried out alone."""
    now, turns, n_done = 0.0, list[float](), 0
    monkeypatch.setattr(clock, "perf_counter", lambda: now)
    with engine_of(model, speculate="ngram", policy=always(4, 4)) as engine:
        core: Any = engine._core
        carry_out = core.kv.carry_out

        def carried(operations: Any) -> bool:
            nonlocal now, n_done
            now, n_done = now + 5, n_done + 1
            done: bool = carry_out(operations)
            return done

        core.kv.carry_out = carried
        core.scheduler.drafting.turned = lambda seconds, *, prompts: turns.append(seconds)
        for _ in range(2):  # the second one begins as the first one did
            engine.submit(PROMPTS[0] * 3, greedy(20)).result()
        check_idle(engine)
    assert n_done
    assert turns
    assert max(turns) <= 0


def wrong(answer: Any) -> Any:
    class Wrong:
        n_asked = 0

        def draft(self, wanted: Sequence[Wanted]) -> Any:
            self.n_asked += 1
            return answer(wanted)

    return Wrong()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda wanted: 1 / 0, "division"),
        (lambda wanted: [], "must be 1"),
        (lambda wanted: [[5] * 9], "at most n=4"),
        (lambda wanted: [[5, -1]], "tokens in 0"),
        (lambda wanted: [["a"]], "not supported"),
    ],
)
def test_a_drafter_that_fails_is_not_asked_again(
    model: Model, answer: Any, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = wrong(answer)
    with engine_of(model) as engine:
        expected = engine.submit(PROMPTS[0], greedy(20)).result().tokens
    with engine_of(model, speculate=own, policy=always(4, 1)) as engine:
        with caplog.at_level(logging.ERROR):
            assert engine.submit(PROMPTS[0], greedy(20)).result().tokens == expected
        assert engine.stats().drafted_tokens == 0
    assert own.n_asked == 1
    assert why in caplog.text
    assert "not asked any more" in caplog.text


def test_once_it_has_failed_nothing_looks_at_drafts(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, cost = wrong(lambda wanted: []), cast(Any, Linear(10.0))  # rows cost nothing
    with engine_of(model, speculate=own, cost=cost) as engine:
        drafting = engine._core.scheduler.drafting
        assert drafting is not None
        drafting.credit, drafting._gained = 1.0, 2.0  # however long a turn takes here
        engine.submit(PROMPTS[0], greedy(60)).result()
        assert own.n_asked == 1
        monkeypatch.setattr(Drafting, "view", None)
        assert len(engine.submit(PROMPTS[1], greedy(60)).result().tokens) == 60


SOURCE = """
class Nothing:
    def __init__(self, n: int = 0):
        self.n = n
    def draft(self, wanted):
        return [[] for _ in wanted]
"""


def test_by_name(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drafter_of("ngram") == Ngram()
    assert drafter_of("draft") == Draft()
    assert drafter_of("mtp") == Mtp()
    assert drafter_of("draft:a:b.gguf") == Draft("a:b.gguf")
    assert drafter_of(model) == Draft(model)
    assert drafter_of(None) is None
    file = tmp_path / "mine.py"
    file.write_text(SOURCE, encoding="utf-8")
    made: Any = drafter_of(f"{file}:Nothing:n=3")
    assert (made.n, made.draft([1, 2])) == (3, [[], []])
    with engine_of(model, speculate=f"{file}:Nothing", policy=always(2, 1)) as engine:
        assert len(engine.submit(PROMPTS[0], greedy(5)).result().tokens) == 5
        assert engine.stats().drafted_tokens == 0
    point = EntryPoint("theirs", "pyllamabatch.engine.drafters:Ngram", drafters.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert _DRAFTERS.names() == ("draft", "mtp", "ngram", "theirs")
    assert drafter_of("theirs") == Ngram()


def test_what_is_refused() -> None:
    for name in ("n-gram", "off", ""):
        with pytest.raises(
            ArgumentError, match=rf"speculate='{name}': one of draft, mtp, ngram, or"
        ):
            drafter_of(name)
    wrong_model: Any = 5
    with pytest.raises(ArgumentError, match=r"Draft\.model=5: must be a GGUF file or a Model"):
        Draft(wrong_model)
    with pytest.raises(ArgumentError, match=r"Draft\.n_ctx=-5: must be in 0"):
        Draft("", -5)
    with pytest.raises(ArgumentError, match=r"Mtp\.n_ctx=-1: must be in 0"):
        Mtp(-1)
    with pytest.raises(ArgumentError, match=r"speculate='draft:'.* the embedded model"):
        drafter_of("draft:")
    with pytest.raises(ArgumentError, match=r"have draft\(wanted\)"):
        drafter_of(object())
    with pytest.raises(ArgumentError, match=r"have draft\(wanted\)"):
        drafter_of(Knows)
