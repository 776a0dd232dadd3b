"""Speculate: rows for drafts where they give more tokens a second, none where they do not."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError, PlanError
from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import KvOptions, Limits, Plan, Scheduler, StepView
from pyllamabatch.scheduler.drafting import (
    ADVANCE,
    LATELY,
    LOSS,
    RISKED,
    Drafted,
    Drafting,
    StepTimes,
)
from pyllamabatch.scheduler.kv_options import Pool
from pyllamabatch.scheduler.policies.composed import ComposedPolicy
from pyllamabatch.scheduler.policies.speculate import ASKED, AT_MOST, STEPS, TIMED, ByGain
from pyllamabatch.scheduler.policy import PlanBuilder, Speculation
from pyllamabatch.scheduler.rules import check_plan
from pyllamabatch.scheduler.step import AT_A_TIME
from pyllamabatch.scheduler.step_builder import AT_WORST
from pyllamabatch.scheduler.view import Drafts, Prices
from tests.support.made_up_costs import Linear
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


HALF = Linear(0.01, 0.005)


def half(rows: float) -> float:
    return HALF.predict(rows)  # type: ignore[arg-type]


def decided(price: Any, n: int, *, even: bool = False, credit: float = 1.0, **facts: Any) -> Any:
    """Of `n` sequences whose steps take `price(rows)` seconds."""
    rows = np.arange(41)
    seconds = np.array([price(float(n_rows)) if n_rows else 0.0 for n_rows in rows])
    worst = np.where(rows > facts.pop("timed", 40), 2 * seconds, seconds)
    prices = Prices(seconds, worst, credit, begin=facts.pop("begin", 0.0))
    limits, right = facts.pop("limits", LIMITS), facts.pop("right", np.ones((n, 4)))
    drafts = Drafts(
        n_max=4,
        ids=[*range(n)],
        found=np.ones((n, 4)),
        right=right,
        n_seen=np.array(facts.pop("n_seen", [1] * n)),
        n_left=np.full(n, facts.pop("n_left", 90)),
        width=n,
        room=40,
        even=even,
        prices=facts.pop("prices", lambda: prices),
        untimed=facts.pop("untimed", 0),
        n_calm=facts.pop("n_calm", 0),
    )
    sequences = [decoding(i, **facts) for i in range(n)]
    view = view_of(*sequences, limits=limits)._replace(drafts=lambda: drafts)
    builder = PlanBuilder(view, 64, view.kv.free, view.kv.promised)
    return ByGain()(builder)


@pytest.mark.parametrize(
    ("price", "n", "even", "expected"),
    [
        (free, 1, False, {0: 4}),
        (half, 1, False, {0: 4}),
        (half, 2, True, {0: 4, 1: 4}),
        (dear, 1, False, {}),
        (dear, 2, True, {}),
        (free, 8, True, dict.fromkeys(range(8), 4)),
    ],
)
def test_drafts_are_had_where_they_can_pay(
    price: Any, n: int, even: bool, expected: dict[int, int]
) -> None:
    drafts, steps, prices = decided(price, n, even=even)
    assert (drafts, steps) == (expected, STEPS)
    assert (prices is None) == (not expected)
    assert decided(price, n, even=even, right=np.array([BAD] * n))[0] == expected


def test_what_bounds_them() -> None:
    assert decided(half, 1, n_left=3)[0] == {0: 2}
    assert decided(half, 1, n_left=1)[0] == {}
    assert decided(half, 1, credit=-0.1)[0] == {}
    assert decided(half, 1, untimed=7) == ({}, 7, None)
    assert decided(half, 1, prices=None) == ({}, None, None)
    for n_calm, steps in ((0, STEPS), (200, 200), (9999, AT_MOST)):
        for price in (half, dear):  # with drafts and without
            assert decided(price, 1, n_calm=n_calm)[1] == steps
    drafts, _, prices = decided(half, 1, itl_target=0.026)
    assert drafts == {0: 4}
    assert np.flatnonzero(prices.seconds).tolist() == [1, 2, 3]
    assert decided(half, 1, itl_target=0.012)[0] == {}
    with pytest.raises(ArgumentError, match="gain"):
        ByGain(-0.1)


GOOD, FAIR, BAD = [0.9, 0.8, 0.7, 0.6], [0.5, 0.25, 0.1, 0.05], [0.05, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("price", "right", "even", "expected"),
    [
        (free, [GOOD], False, 4),
        (free, [BAD], False, 0),
        (dear, [GOOD], False, 0),
        (half, [GOOD], False, 4),
        (half, [FAIR], False, 1),
        (half, [BAD, GOOD, BAD], True, 0),
        (half, [GOOD, GOOD], True, 3),
    ],
)
def test_drafts_that_take_time_are_asked_for_as_they_were_right(
    price: Any, right: list[list[float]], even: bool, expected: int
) -> None:
    own: dict[str, Any] = {
        "limits": replace(LIMITS, drafts_take_time=True),
        "right": np.array(right),
    }
    drafts, steps, prices = decided(price, len(right), even=even, **own)
    assert drafts == (dict.fromkeys(range(len(right)), expected) if expected else {})
    assert steps == (ASKED if expected else STEPS)
    assert prices is None
    if price is half and expected == 4:  # what was not timed lately is tried first
        assert decided(price, 1, timed=1, **own)[:2] == ({0: 4}, TIMED)
        for credit, tried in ((0.021, ({0: 4}, 2)), (0.011, ({0: 4}, 1)), (0.0, ({}, STEPS))):
            assert decided(price, 1, timed=1, credit=credit, **own)[:2] == tried
            assert decided(price, 1, timed=1, begin=0.01, credit=0.01 + credit, **own)[:2] == tried
        assert decided(price, 1, n_seen=[0], **own) == ({}, 1, None)


def test_a_call_with_a_draft_ends_the_calm() -> None:
    """However long it was: what drafts gain and take is to be looked at again soon."""
    drafting, seen = Drafting(LIMITS, 8), list[int]()
    slots, shares = np.array([0], np.int32), np.ones((8, 4))
    for id, n_steps, n_drafted, asked in (
        (1, 64, 0, True),
        (1, 64, 0, False),
        (1, 1000, 5, True),
        (1, 64, 0, True),
        (2, 9, 0, True),
    ):
        timed = np.bincount([1], minlength=9) * n_steps
        drafted = Drafted(slots + n_steps, n_steps + n_drafted, n_drafted, 0, shares, shares,
                          half(1) * n_steps, timed, timed * half(1))  # fmt: skip
        owner = np.array([id])
        drafting.observe(slots, owner, drafted, n_steps, 100, HALF, asked=asked)
        seen.append(drafting.view(slots, owner, owner, 100.0, HALF).n_calm)
    assert seen == [64, 128, 0, 64, 9]


def test_nothing_is_repaid_where_a_step_without_drafts_is_longer_than_a_target() -> None:
    limits = replace(LIMITS, drafts_take_time=True)
    assert decided(half, 1, begin=0.01, limits=limits)[0] == {0: 4}
    assert decided(half, 1, begin=0.01, itl_target=0.012, limits=limits)[0] == {}


def test_the_times_of_steps_correct_the_cost_model() -> None:
    times, said = StepTimes(), np.array([0.0, *map(half, range(1, 13))])
    assert times.missing(1, 4) == 8
    seconds, worst = times.prices(said)  # a policy may look at them all the same
    assert seconds == pytest.approx(said)
    assert worst == pytest.approx(np.arange(13) * half(1))
    times.observe(2, 5, 1.5)
    assert times.missing(1, 4) == 3
    times.observe(2, 3, 1.5)
    assert times.missing(1, 4) == 0
    seconds, worst = times.prices(said)
    assert seconds == pytest.approx(1.5 * said)
    assert worst[:3] == pytest.approx(seconds[:3])
    assert worst[3:] == pytest.approx(seconds[2] * np.arange(3, 13) / 2)
    times.observe(6, 8, 2.5)
    seconds, worst = times.prices(said)
    assert seconds[[2, 4, 6, 9]] == pytest.approx(said[[2, 4, 6, 9]] * [1.5, 2.0, 2.5, 2.5])
    assert worst[6] == seconds[6] < worst[7]
    times.observe(6, 8, 100.0)  # disturbed
    assert times.prices(said)[0][6] == pytest.approx(said[6] * 2 / (1 / 2.5 + 1 / 4.0))  # of speeds
    few, many = StepTimes(), StepTimes()  # of steps that were quick by chance
    for one, n_steps in ((few, 3), (many, 16)):
        one.observe(20, 16, 2.0)
        one.observe(24, n_steps, 1.0)
        one.observe(1, 16, 3.0)
    assert few.factor(1) == many.factor(1) == pytest.approx(3.0)
    assert 1.0 < many.factor(24) < 1.3 < 1.6 < few.factor(24) < few.factor(20) < 2.0
    times.passed(10**6)
    assert times.missing(1, 9) == 8


def test_the_first_step_of_its_kind_is_not_taken_at_its_word() -> None:
    """It may have waited for memory. Else such steps are thought to be slow, and never tried."""
    times = StepTimes()
    times.observe(4, 64, 0.9)
    assert not times.observe(28, 1, 40.0)
    assert times.factor(28) < 1.5
    times.observe(28, 1, 1.3)
    assert times.factor(28) == pytest.approx(1.3)
    for _ in range(2):
        times.observe(12, 1, 40.0)
    assert times.factor(12) < 4
    times.observe(12, 1, 8.0)  # these are slow
    assert times.factor(12) == pytest.approx(8.0)
    times.observe(20, 8, 4.0)  # so many are no accident
    assert times.factor(20) > 3.0


def test_drafts_lose_no_more_than_a_share_of_the_time() -> None:
    drafting = Drafting(LIMITS, 8)
    slots, owner = np.array([0], np.int32), np.array([1])

    def call(seconds: float, gained: float | None) -> float:
        drafting.observe(slots, owner, drafted_of(seconds, gained), 8, 100, HALF)
        return drafting.credit

    def drafted_of(seconds: float, gained: float | None = None) -> Drafted:
        times = np.zeros(9, np.int32), np.zeros(9)
        shares = np.zeros((8, 4))
        return Drafted(slots, 8, 0, 0, shares, shares, seconds, *times, gained)

    assert drafting.credit == LOSS * ADVANCE
    assert call(2.0 - ADVANCE, None) == pytest.approx(2 * LOSS)
    slower = LOSS * ADVANCE / (LOSS * ADVANCE + 0.5)
    assert call(1.0, -0.5) == pytest.approx((2 + slower) * LOSS - 0.5)
    second = np.exp(-1 / LATELY)
    gained = 7.0 - 0.5 * second
    assert call(1.0, 7.0) == pytest.approx(4 * LOSS + RISKED * gained)
    assert call(1.0, None) == pytest.approx(5 * LOSS + RISKED * gained * second)
    for _ in range(10):  # what was gained long ago is not lost again
        drafting.observe(slots, owner, drafted_of(100.0), 8, 100, HALF)
    assert drafting.credit == pytest.approx(LOSS * LATELY, rel=1e-3)


def test_nor_do_drafts_that_take_time() -> None:
    """Of a drafter that is never right, but is said to have been right lately, each time."""
    limits = replace(LIMITS, drafts_take_time=True)
    drafting = Drafting(limits, 8)
    slots, owner, one = np.array([0], np.int32), np.array([1]), np.ones(1, np.int64)
    shares = np.tile(np.array(GOOD), (8, 1))

    def decide() -> Speculation:
        drafts = drafting.view(slots, owner, 1000 * one, 100.0, HALF)
        view = view_of(decoding(0), limits=limits)._replace(drafts=lambda: drafts)
        return ByGain()(PlanBuilder(view, 64, view.kv.free, view.kv.promised))

    total = lost = worst = 0.0
    for _ in range(2000):
        asked, steps, _ = decide()
        assert steps is not None
        n_rows = 1 + sum(asked.values())
        seconds = steps * (half(n_rows) + 0.004 * bool(asked))
        total, lost = total + seconds, lost + seconds - steps * half(1)
        worst = max(worst, seconds - steps * half(1))
        timed = np.bincount([n_rows], minlength=9) * steps
        drafted = Drafted(slots + steps, n_rows * steps, 0, 0, shares, shares, seconds, timed,
                          timed * half(n_rows))  # fmt: skip
        drafting.observe(slots, owner, drafted, steps, 100, HALF, asked=bool(asked))
    assert 0 < lost < 0.4 * LOSS * total + worst  # the longer in vain, the less


@pytest.mark.parametrize("changes", [0, 1])
def test_to_look_at_drafts_is_paid_for_as_what_they_lose(changes: int) -> None:
    """Of drafts that are never right. A turn with a look takes as long as five steps, and three
    without; but that is lost as well where nothing has changed."""
    limits, look = replace(LIMITS, drafts_take_time=True), 5 * half(1)
    drafting = Drafting(limits, 8)
    slots, owner = np.array([0], np.int32), np.array([1])
    shares, timed = np.tile(np.array(BAD), (8, 1)), np.bincount([1], minlength=9)
    total, lost, passed, steps = 0.0, 0.0, 0, 20
    drafting.planned(-1)
    drafting.turned(100 * look, prompts=True)  # that tells nothing of others
    assert drafting.due  # the first one for decoding has none
    for i in range(3000):
        drafting.planned(i * changes)
        more, steps = steps < 20, 20
        if drafting.due == 0:
            drafts = drafting.view(slots, owner, owner * 1000, 100.0, HALF)
            view = view_of(decoding(0), limits=limits)._replace(drafts=partial(Drafts, *drafts))
            asked, most, _ = ByGain()(PlanBuilder(view, 64, view.kv.free, view.kv.promised))
            assert (asked, most is None) == ({}, False)
            steps, drafting.cuts = min(steps, 10), 10
        seconds = steps * half(1)
        if drafting.passes(steps, seconds, asked=False):
            passed += 1
        else:
            drafted = Drafted(slots + steps, steps, 0, 0, np.ones((8, 4)), shares, seconds,
                              steps * timed, timed * seconds)  # fmt: skip
            drafting.observe(slots, owner, drafted, steps, 100, HALF)
        turn = look if drafting.looked else 0.6 * look
        drafting.turned(turn, prompts=False)
        needed = 0.0 if more and not changes else 0.6 * look
        lost, total = lost + turn - needed, total + seconds + turn
    # not in proportion to the time: what was in vain is looked at more rarely
    assert 0.05 * LOSS * total < lost < 0.2 * LOSS * total + look
    assert passed > 2000


@pytest.mark.parametrize(
    ("steps", "n_prompt", "n", "prompts", "lost"),
    [
        (4, 1, 4, False, 1.0),
        (4, 1, 4, True, 0.0),
        (20, 1, 10, False, 0.0),
        (4, 1, 1, False, 0.0),
        (4, 24, 3, False, 0.0),
        (9, 1, AT_A_TIME, False, 0.0),
    ],
)
def test_a_turn_is_lost_where_a_look_at_drafts_alone_has_brought_it(
    steps: int, n_prompt: int, n: int, prompts: bool, lost: float
) -> None:
    """Not where the plan had ended there anyhow, where something else has ended its step before,
    as where cells are short, a command has come or adapters take turns, or where a newcomer that
    had waited joins."""
    speculate = iter([Speculation({}, steps), Speculation({})])

    def look(builder: PlanBuilder) -> Speculation:
        assert builder.view.drafts is not None
        speculation = next(speculate)
        if speculation.steps:
            builder.view.drafts()
        return speculation

    limits = replace(LIMITS, n_cells=54)
    scheduler = Scheduler(limits, ComposedPolicy(speculate=look, repeat=10), cost=HALF)
    for id in (1, 2):
        scheduler.add(id, n_prompt, 20, arrival=0.0)
    drafting = scheduler.drafting
    assert drafting is not None
    for n_steps in (1, n, 1):  # prompts, with a look, without
        step = scheduler.plan(0.0)
        assert step is not None
        parts = step.by_group(lambda slot: slot, 0) if n == AT_A_TIME else (step,)
        for part in parts:
            scheduler.advance(part, n_steps)
    credit = drafting.credit
    drafting.turned(1.0, prompts=prompts)
    assert credit - drafting.credit == lost


def test_what_is_not_paid_for_is_not_looked_at() -> None:
    def never() -> Drafts:
        raise AssertionError

    view = view_of(decoding(0), limits=LIMITS)._replace(drafts=never)
    for drafts_in in (None, 7):
        builder = PlanBuilder(view._replace(drafts_in=drafts_in), 64, 9, 0)
        assert ByGain()(builder) == ({}, drafts_in, None)
    scheduler = Scheduler(LIMITS, ComposedPolicy(speculate=ByGain(), repeat=20), cost=HALF)
    scheduler.add(1, 1, 90, arrival=0.0)
    drafting = scheduler.drafting
    assert drafting is not None
    prompt = scheduler.plan(0.0)
    assert prompt is not None
    scheduler.advance(prompt)
    drafting.turned(1e-3, prompts=False)
    for credit, looked, repeat in ((-0.1, False, 20), (0.1, True, 10), (-0.1, False, 20)):
        drafting.credit = credit
        step = scheduler.plan(0.0)
        assert step is not None
        assert (drafting.looked, step.repeat) == (looked, repeat)
        scheduler.advance(step)


def test_what_a_draft_model_lacks_is_computed_where_that_is_paid_for() -> None:
    drafting = Drafting(replace(LIMITS, drafts_take_time=True), 8)
    drafting.size = 1 / 4
    slots, owner, shares = np.array([0], np.int32), np.array([1]), np.ones((8, 4))
    prompt = HALF.predict(200, 200, 100, 1)  # seconds

    def look() -> float:
        drafts = drafting.view(slots, owner, np.array([90]), 0.0, HALF)
        assert drafts.prices is not None
        return drafts.prices().begin

    def call(catch_up: float, *, asked: bool) -> float:
        before, timed = drafting.credit, np.bincount([1], minlength=9) * 8
        drafted = Drafted(np.full(8, 8), 8, 0, 0, shares, shares, 8 * half(1) + catch_up, timed,
                          timed * half(1), catch_up=catch_up)  # fmt: skip
        drafting.observe(slots, owner, drafted, 8, 0, HALF, asked=asked)
        return before - drafting.credit

    call(0.0, asked=False)
    assert look() == 0
    drafting.lacks[:2] = 200, 999
    begin = look()
    assert begin == pytest.approx(prompt / 4)
    drafting.credit = begin - 0.001
    assert drafting.due is None
    while drafting.due is None:  # it is saved for, however long that takes
        if not drafting.passes(8, 8 * half(1), asked=False):
            call(0.0, asked=False)
    assert drafting.credit >= begin
    drafting.credit = begin - 0.001
    assert drafting.due is None
    drafting.passes(1024, 0.0, asked=True)
    assert drafting.due is not None  # others may lack less
    drafting.credit = begin
    assert call(2 * prompt, asked=True) == pytest.approx(2 * prompt, rel=0.01)  # all of it counts


def lost_by(
    pace: Callable[[int], float], drafted_step: float, tokens: float, drafter: float = 0.0
) -> tuple[float, int]:
    """Of one sequence whose drafts take time: the share of the time that it has lost in 3,000
    steps, and how many of these had drafts. pace: of the machine at each step; drafted_step: as
    many times what one without takes, and gives so many tokens. drafter: likewise, in Python."""
    limits = replace(LIMITS, drafts_take_time=True)
    drafting = Drafting(limits, 8)
    slots, owner, one = np.array([0], np.int32), np.array([1]), np.ones(1, np.int64)
    shares = np.tile(np.array([0.9, 0.8, 0.0, 0.0]), (8, 1))
    total = worth = 0.0
    at = n_asked = 0
    while at < 3000:
        drafts = drafting.view(slots, owner, 10000 * one, 100.0, HALF)
        view = view_of(decoding(0), limits=limits)._replace(drafts=partial(Drafts, *drafts))
        asked, steps, _ = ByGain()(PlanBuilder(view, 64, view.kv.free, view.kv.promised))
        assert steps is not None
        paces = np.array([pace(at + i) for i in range(steps)])
        each = drafted_step * half(1) if asked else half(1)
        seconds = float(paces.sum()) * each
        total += seconds
        worth += float(paces.sum()) * half(1) * (tokens if asked else 1)
        n_rows = 1 + sum(asked.values())
        timed = np.bincount([n_rows], minlength=9) * steps
        n_taken = round(steps * (tokens if asked else 1))
        n_drafted, found = (n_rows - 1) * steps, np.ones((8, 4))
        drafted = Drafted(slots + n_taken, n_rows * steps, n_drafted, n_taken - steps, found,
                          shares, seconds, timed, timed * seconds / steps)  # fmt: skip
        drafting.observe(slots, owner, drafted, steps, 100, HALF, asked=bool(asked))
        turn = drafter * half(1) * steps * bool(asked)
        drafting.turned(turn, prompts=False)
        total += turn
        at, n_asked = at + steps, n_asked + steps * bool(asked)
    return 1 - worth / total, n_asked


def test_steps_without_drafts_are_timed_again_where_they_become_rare() -> None:
    """Else an engine's first steps, which are slow, would be what drafts are compared with."""
    for slow in (4, 10, 12):
        lost, n_asked = lost_by(lambda at, slow=slow: 12.0 if at < slow else 1.0, 4.0, 2.7)  # type: ignore[misc]
        assert 0 < n_asked < 100
        assert lost < 0.03
    lost, n_asked = lost_by(lambda at: 5.0 if at // 500 % 2 else 1.0, 4.0, 2.7)
    assert lost < 0.04
    lost, n_asked = lost_by(lambda at: 5.0 if at // 500 % 2 else 1.0, 1.2, 2.7)
    assert lost < -1.0
    assert n_asked > 2500


def test_drafts_are_to_gain_what_a_drafter_takes_in_python() -> None:
    lost, n_asked = lost_by(lambda at: 1.0, 1.2, 2.7, drafter=1.0)
    assert lost < -0.1
    assert n_asked > 2600
    lost, n_asked = lost_by(lambda at: 1.0, 1.2, 2.7, drafter=2.0)
    assert 0 < lost < 0.03
    assert 0 < n_asked < 300


@pytest.mark.parametrize("takes_time", [True, False])
def test_what_drafts_take_is_no_price_of_as_many_rows_without(takes_time: bool) -> None:
    """Two sequences with a drafted token each have as many rows as four without."""
    drafting = Drafting(replace(LIMITS, drafts_take_time=takes_time), 8)
    shares, timed = np.zeros((8, 4)), np.bincount([4], minlength=9) * 16
    for n, longer in ((2, 1.5), (4, 1.0)):
        slots, each = np.arange(n, dtype=np.int32), longer * half(4)
        drafted = Drafted(np.full(8, 32), 64, 0, 0, shares, shares, 16 * each, timed, timed * each)
        drafting.observe(slots, 1 + slots, drafted, 16, 100, HALF, asked=n == 2)  # type: ignore[arg-type]
    seconds = []
    for n in (4, 2):
        slots = np.arange(n, dtype=np.int32)
        view = drafting.view(slots, 1 + slots, np.full(n, 9), 100.0, HALF)  # type: ignore[arg-type]
        assert view.prices is not None
        seconds.append(view.prices().seconds[4])
    mixed = pytest.approx(1.2 * half(4), rel=0.01)
    assert seconds == ([half(4), 1.5 * half(4)] if takes_time else [mixed, mixed])


def test_where_drafts_take_time_steps_of_which_none_had_one_are_not_what_others_take() -> None:
    for takes_time in (True, False):
        drafting = Drafting(replace(LIMITS, drafts_take_time=takes_time), 8)
        slots, owner, shares = np.array([0], np.int32), np.array([1]), np.zeros((8, 4))
        timed = np.bincount([1], minlength=9) * 64
        drafted = Drafted(slots, 64, 0, 0, shares, shares, 1.0, timed, 0.015 * timed)
        seen = []
        for asked in (False, *[True] * 9):
            drafting.observe(slots, owner, drafted, 64, 100, HALF, asked=asked)
            drafts = drafting.view(slots, owner, np.array([9]), 100.0, HALF)
            assert drafts.prices is not None
            seen.append(not drafts.untimed)
        assert seen[0]
        assert all(seen) != takes_time


def test_no_drafts_where_those_that_decode_fill_a_call() -> None:
    slots = np.arange(8, dtype=np.int32)
    limits = replace(LIMITS, n_ubatch=4)
    owner, left = np.arange(1, 9), np.full(8, 9)
    drafts = Drafting(limits, 8).view(slots, owner, left, 100.0, HALF)
    assert drafts.prices is None


def test_a_disturbed_step_does_not_stop_drafts_for_long() -> None:
    slots, shares = np.array([0], np.int32), np.zeros((8, 4))
    lost = []
    for n_rows, n_timed in ((5, 0), (5, 1), (1, 0)):
        drafting = Drafting(LIMITS, 8)
        for n, rows, seconds, asked in ((64, 1, 64 * half(1), False), (1, n_rows, 50.0, True)):
            timed = np.bincount([rows], minlength=9) * (n if n > 1 else n_timed)
            drafted = Drafted(slots + n, n * rows, 0, 0, shares, shares, seconds, timed,
                              timed * seconds / n)  # fmt: skip
            before = drafting.credit
            drafting.observe(slots, slots + 1, drafted, n, 0, HALF, asked=asked)  # type: ignore[arg-type]
        lost.append(before - drafting.credit)
    assert 0 < max(lost) < 10 * half(1)


def scheduler(
    speculate: Any, limits: Limits = LIMITS, most: int = 30, kv: KvOptions | None = None
) -> Scheduler:
    made = Scheduler(limits, ComposedPolicy(repeat=2**31, speculate=speculate), kv=kv)
    for id in (1, 2):
        made.add(id, 6, most, arrival=float(id))
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
    timed = np.zeros(9, np.int32), np.zeros(9)
    before, tokens = made.accounting.used, made.counters.tokens
    made.advance(step, 5, 2.0, Drafted(taken, 19, 9, 6, found, found / 2, 0.5, *timed))
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
    assert [drafts.n_seen.tolist() for drafts in seen] == [[0, 0], [5, 5]]
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
    assert [*seen[-1].n_seen] == [0, 5]


@pytest.mark.parametrize(
    ("kind", "repeat"),
    [({}, 24 // 5), ({"even": True}, 24 // 8), ({"unified": False}, 24 // 8)],
    ids=["pool", "even", "streams"],
)
def test_steps_with_drafts_have_cells(kind: dict[str, bool], repeat: int) -> None:
    """Where all sequences have as many rows as the one with most, for all of these."""
    limits = replace(LIMITS, n_cells=12 + 24, **kind)
    step = scheduler(lambda builder: Speculation({1: 3}, 5), limits).plan(1.0)
    assert step is not None
    assert (step.drafts, step.repeat) == ({0: 3}, repeat)


def test_steps_with_drafts_end_with_a_stream() -> None:
    """Where its budget is larger: each step may fill as many cells as it has rows."""
    seen: list[Drafts] = []

    def speculate(builder: PlanBuilder) -> Speculation:
        assert builder.view.drafts is not None
        seen.append(builder.view.drafts())
        return Speculation({1: 3}, 64)

    kv = KvOptions(pool=Pool(LIMITS, Sharing()))
    limits = replace(LIMITS, n_cells_seq=50, unified=False)
    step = scheduler(speculate, limits, 300, kv).plan(1.0)
    assert step is not None
    assert step.repeat == (50 - 6) // 4
    assert seen[-1].n_left.tolist() == [50 - 6] * 2


def test_answers_that_fit_end_in_one_call() -> None:
    """However many drafts a step may have: of all rows no more stay than tokens are left."""
    limits = replace(LIMITS, n_cells=12 + 2 * 9 + 3)
    step = scheduler(lambda builder: Speculation({1: 3}, 64), limits, most=10).plan(1.0)
    assert step is not None
    assert step.repeat == 9
    limits = replace(limits, n_cells=limits.n_cells - 1)
    step = scheduler(lambda builder: Speculation({1: 3}, 64), limits, most=10).plan(1.0)
    assert step is not None
    assert step.repeat == (2 * 9 + 2) // 5


def test_a_long_answer_empties_few_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached goes for a few steps with drafts, not for all that there might be."""
    limits = replace(LIMITS, n_cells=4096)
    made = scheduler(lambda builder: Speculation({1: 3}, 64), limits, most=100)
    wanted: list[int] = []
    monkeypatch.setattr(type(made.admission.cache), "make_cells", lambda cache, n: wanted.append(n))
    step = made.plan(1.0)
    assert step is not None
    assert wanted == [5 * AT_WORST]


def test_a_plan_with_drafts_keeps_the_rules() -> None:
    view = view_of(decoding(1), decoding(2), limits=LIMITS)
    _, rows = check_plan(Plan(decode_all=True, drafts={1: 4, 2: 1}), view)
    assert rows.n_decodes == 2
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


class OfSize(ComposedPolicy):
    """Made otherwise than its base, and with something of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(budget=lambda view: size)
        object.__setattr__(self, "planned", [])

    def plan(self, view: StepView) -> Plan:
        self.planned.append(view.now)  # type: ignore[attr-defined]
        return super().plan(view)


def test_a_policy_built_on_the_parts_drafts_and_stays_what_it_is() -> None:
    mine = OfSize(5)
    scheduler = Scheduler(LIMITS, mine)
    assert isinstance(scheduler.policy, OfSize)
    assert scheduler.policy.speculate == ByGain()
    assert mine.speculate is None
    scheduler.add(1, 20, 4, arrival=0.0)
    step = scheduler.plan(2.0)
    assert step is not None
    assert step.n_rows == 5
    assert mine.planned == [2.0]  # type: ignore[attr-defined]
