"""Speculate: rows for drafts where they give more tokens a second, none where they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError, PlanError
from pyllamabatch.scheduler import Limits, Plan, Scheduler, StepView
from pyllamabatch.scheduler.drafting import Drafted, Drafting
from pyllamabatch.scheduler.policies.composed import ComposedPolicy
from pyllamabatch.scheduler.policies.speculate import STEPS, TRIAL, ByGain
from pyllamabatch.scheduler.policy import PlanBuilder, Speculation
from pyllamabatch.scheduler.rules import check_plan
from pyllamabatch.scheduler.view import Drafts
from tests.support.views import decoding, view_of

LIMITS = Limits(
    n_batch=64, n_ubatch=64, n_seq_max=8, n_cells=400, n_cells_seq=400, n_draft_max=4, n_outputs=40
)


def free(rows: float) -> float:
    """Up to 16 rows for the price of one, more in proportion."""
    return 0.01 * max(1.0, rows / 16)


def dear(rows: float) -> float:
    """Twice the rows take twice as long."""
    return 0.01 * rows


def half(rows: float) -> float:
    return 0.01 + 0.005 * rows


def decided(
    price: Any,
    right: list[list[float]],
    *,
    found: list[list[float]] | None = None,
    even: bool = False,
    known: bool = True,
    **facts: Any,
) -> Speculation:
    n = len(right)
    shares = np.array(right, dtype=float)
    drafts = Drafts(
        n_max=shares.shape[1],
        ids=[*range(n)],
        found=np.ones_like(shares) if found is None else np.array(found, dtype=float),
        right=shares,
        n_left=np.full(n, facts.pop("n_left", 90)),
        width=n,
        room=40,
        even=even,
        seconds=None if price is None else lambda k, rows: (price(rows), known),
    )
    sequences = [decoding(i, **facts) for i in range(n)]
    view = replace(view_of(*sequences, limits=LIMITS), drafts=lambda: drafts)
    builder = PlanBuilder(view, 64, view.kv.free, view.kv.promised)
    return ByGain()(builder)


GOOD, FAIR, BAD = [0.9, 0.8, 0.7, 0.6], [0.5, 0.25, 0.1, 0.05], [0.05, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("price", "right", "expected"),
    [
        (free, [GOOD], {0: 4}),
        (free, [BAD], {}),
        (free, [FAIR], {0: 4}),
        (dear, [GOOD], {}),
        (half, [GOOD], {0: 4}),
        (half, [FAIR], {0: 1}),
        (half, [BAD], {}),
        (half, [[0.0] * 4], {}),
        (half, [BAD, GOOD, BAD], {1: 3}),  # to the one that gains
        (None, [GOOD], {}),
    ],
)
def test_as_many_as_pay(price: Any, right: list[list[float]], expected: dict[int, int]) -> None:
    drafts, steps = decided(price, right)
    assert drafts == expected
    assert steps == (None if price is None else STEPS)


def test_rows_of_all_are_paid_for_where_all_need_as_many() -> None:
    assert decided(half, [BAD, GOOD, BAD], even=True) == ({}, STEPS)
    assert decided(half, [GOOD, GOOD], even=True)[0] == {0: 3, 1: 3}
    # a draft that is rarely there costs as rarely
    rare = [[0.1] * 4]
    assert decided(half, rare, even=True) == ({}, STEPS)
    assert decided(half, rare, found=rare, even=True) == ({0: 4}, STEPS)


def test_a_first_trial_is_short_and_within_a_target() -> None:
    assert decided(half, [GOOD], known=False) == ({0: 4}, TRIAL)
    assert decided(half, [GOOD], itl_target=0.026)[0] == {0: 2}
    assert decided(half, [GOOD], itl_target=0.012)[0] == {}
    assert decided(half, [GOOD], n_left=3)[0] == {0: 2}
    with pytest.raises(ArgumentError, match="gain"):
        ByGain(-0.1)


class Linear:
    """A cost model of `half`."""

    absolute = calibrated = True
    switch = 0.0
    new_graph = (0.0, 0.0)

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return half(rows)


def test_the_times_of_steps_correct_the_cost_model() -> None:
    drafting = Drafting(LIMITS, 8)
    assert drafting.factor(2, 4) == (1.0, False)
    drafting.timed(2, 0, 8, 1.5)
    assert drafting.factor(2, 4) == (1.5, False)
    drafting.timed(2, 4, 8, 3.0)
    drafting.timed(2, 4, 8, 2.0)
    assert drafting.factor(2, 4) == (2.75, True)
    assert drafting.factor(2, 0) == (1.5, True)
    assert drafting.factor(3, 4) == (1.0, False)
    drafting.timed(5, 0, 10**6, 1.0)
    assert drafting.factor(2, 4) == (1.0, False)  # long ago


def scheduler(speculate: Any, limits: Limits = LIMITS) -> Scheduler:
    made = Scheduler(limits, ComposedPolicy(repeat=2**31, speculate=speculate))
    for id in (1, 2):
        made.add(id, 6, 30, arrival=float(id))
    step = made.plan(0.0)
    assert step is not None
    made.advance(step)
    return made


def test_each_sequence_advances_by_what_it_took() -> None:
    seen: list[Drafts] = []

    def speculate(builder: PlanBuilder) -> Speculation:
        assert builder.view.drafts is not None
        seen.append(builder.view.drafts())
        return Speculation({1: 3} if 1 in seen[-1].ids else {}, 5)

    made = scheduler(speculate)
    step = made.plan(1.0)
    assert step is not None
    assert step.drafts == {made.slot(1): 3}
    assert (step.n_rows, step.repeat) == (2, 5)
    taken, found = np.zeros(8, np.int32), np.zeros((8, 4), np.float32)
    slots = made.slot(1), made.slot(2)
    taken[slots[0]], taken[slots[1]] = 11, 5
    found[slots[0]] = 0.5
    before, tokens = made.accounting.used, made.counters.tokens
    made.advance(step, 5, 2.0, Drafted(taken, 19, 9, 6, found, found / 2, 0.5))
    assert made.sequence(1).generated == 1 + 11
    assert made.sequence(2).generated == 1 + 5
    assert made.sequence(1).decoding
    assert made.accounting.used == before + 16
    counters = made.counters
    assert counters.tokens == tokens + 16
    assert (counters.drafted_tokens, counters.accepted_tokens) == (9, 6)
    assert counters.rows == counters.decode_rows + counters.prefill_rows
    made.plan(3.0)
    assert [drafts.found[:, 0].tolist() for drafts in seen] == [[0, 0], [0.5, 0]]
    assert seen[1].right[0].tolist() == [0.25] * 4
    assert seen[1].n_left.tolist() == [30 - 12, 30 - 6]
    made.remove(1)
    made.add(3, 6, 30, arrival=3.0)
    for now in (4.0, 5.0):
        step = made.plan(now)
        assert step is not None
        made.advance(step)
    assert made.slot(3) == slots[0]
    assert not seen[-1].found.any()  # another one's


def test_a_plan_with_drafts_keeps_the_rules() -> None:
    view = view_of(decoding(1), decoding(2), limits=LIMITS)
    assert check_plan(Plan(decode_all=True, drafts={1: 4, 2: 1}), view).n_decodes == 2
    few = replace(LIMITS, n_outputs=5)
    bad: list[tuple[StepView, Plan]] = [
        (view, Plan(decode_all=True, drafts={1: 5})),
        (view, Plan(decode_all=True, drafts={1: 0})),
        (view, Plan(decode_all=True, drafts={1: 1.0})),  # type: ignore[dict-item]
        (view, Plan(decode_all=True, drafts={3: 1})),
        (view, Plan(decode_all=True, sit_out=frozenset({1}), drafts={1: 1})),
        (view, Plan({1: 1}, preempt=(2,), drafts={1: 1})),
        (view_of(decoding(1), decoding(2), limits=few), Plan(decode_all=True, drafts={1: 4})),
        (view_of(decoding(1, goal=6), limits=LIMITS), Plan(decode_all=True, drafts={1: 1})),
    ]
    for one, plan in bad:
        with pytest.raises(PlanError) as error:
            check_plan(plan, one)
        assert error.value.rule == "drafts", plan
