"""How long a step waits by the cost model: the rule alone, what is learnt of owners, and both with
owners in virtual time. No model, no clock."""

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyllamabatch.errors import ArgumentError
from pyllamabatch.scheduler import (
    CostWindow,
    ExpectedSequence,
    Gather,
    Gathering,
    Limits,
    Scheduler,
    Window,
)
from pyllamabatch.scheduler.gather import groups
from pyllamabatch.scheduler.idle import IdleSequences, ReturnTime
from tests.support.made_up_costs import Linear


def in_seconds(*waits: float, returns: float = 1.0) -> tuple[ExpectedSequence, ...]:
    return tuple(ExpectedSequence(0.0, wait, returns) for wait in waits)


def at(
    n_ready: int, expected: tuple[ExpectedSequence, ...], cost: Linear | None, waited: float = 0
) -> Gathering:
    return Gathering(5.0 + waited, 5.0, n_ready, expected, cost)


def test_a_window_ends_so_long_after_the_first_row() -> None:
    gathering = at(1, in_seconds(0.1, 0.1), None, waited=0.05)
    assert Window(0.2)(gathering) == pytest.approx(0.15)
    assert Window(0.05)(gathering) <= 1e-9
    assert Window(0)(gathering) < 0


def test_a_row_is_worth_its_share_of_a_step_whose_time_does_not_grow() -> None:
    flat, window = Linear(0.04), CostWindow()
    assert [limit for _, limit, _ in groups(at(1, in_seconds(0.001), flat))] == [
        pytest.approx(0.02)
    ]
    assert window(at(1, in_seconds(0.015), flat)) == pytest.approx(0.02)
    assert window(at(1, in_seconds(0.021), flat)) == 0
    assert window(at(1, in_seconds(0.004), flat)) == pytest.approx(0.008)  # then it looks again
    assert window(at(7, in_seconds(0.004), flat)) == pytest.approx(0.005)
    assert window(at(7, in_seconds(0.006), flat)) == 0


def test_rows_that_cost_as_much_later_are_not_waited_for() -> None:
    assert CostWindow(least=0)(at(1, in_seconds(1e-6), Linear(0.0, 0.02))) == 0
    tiles = Linear(0.04, tile=4)
    assert CostWindow()(at(3, in_seconds(0.001), tiles)) > 0
    assert CostWindow()(at(4, in_seconds(0.001), tiles)) == 0  # a fifth begins another pass


def test_the_little_that_no_model_knows_of_is_waited_for() -> None:
    """Steps of next to no time, owners who are there in a moment; not those who hardly return."""
    free, window = Linear(1e-6), CostWindow()
    assert window(at(1, in_seconds(50e-6), free)) == pytest.approx(200e-6)
    assert window(at(1, in_seconds(50e-6), free, waited=150e-6)) == pytest.approx(50e-6)
    assert window(at(1, in_seconds(50e-6), free, waited=210e-6)) <= 0
    assert window(at(1, in_seconds(300e-6), free)) == 0
    assert window(at(1, in_seconds(50e-6, returns=0.4), free)) == 0
    assert CostWindow(least=1e-3)(at(1, in_seconds(300e-6), free)) == pytest.approx(1e-3)
    assert CostWindow(longest=1e-4)(at(1, in_seconds(50e-6), free)) == pytest.approx(1e-4)


def test_it_waits_for_those_who_are_worth_it_and_not_for_the_rest() -> None:
    flat = Linear(0.04)
    answer = CostWindow()(at(1, in_seconds(5.0, 0.001, 0.002), flat))
    assert answer == CostWindow()(at(1, in_seconds(0.001, 0.002), flat)) == pytest.approx(0.004)


def test_who_seldom_returns_is_waited_for_seldom() -> None:
    flat = Linear(0.04)
    ((_, limit, _),) = groups(at(3, in_seconds(0.001, returns=0.5), flat))
    assert limit == pytest.approx(0.5 * 0.04 / 3.5)
    assert CostWindow()(at(3, in_seconds(0.001, returns=0.5), flat)) > 0
    assert CostWindow()(at(3, in_seconds(0.001, returns=0.05), flat)) == 0


def test_who_is_late_is_expected_as_late_again() -> None:
    assert ExpectedSequence(0.0, 0.003).wait == pytest.approx(0.003)
    assert ExpectedSequence(0.0025, 0.003).wait == pytest.approx(0.0005)
    assert ExpectedSequence(0.010, 0.003).wait == pytest.approx(0.007)


def test_without_a_level_it_is_a_window() -> None:
    for cost in (None, Linear(0.04, absolute=False)):
        assert CostWindow()(at(1, in_seconds(0.001), cost)) == pytest.approx(200e-6)
        assert CostWindow(otherwise=Window(0))(at(1, in_seconds(0.001), cost)) <= 0


@pytest.mark.parametrize("seconds", [-1e-9, math.inf, math.nan])
def test_windows_are_finite(seconds: float) -> None:
    with pytest.raises(ArgumentError, match="longest"):
        CostWindow(longest=seconds)
    with pytest.raises(ArgumentError, match="least"):
        CostWindow(least=seconds)
    with pytest.raises(ArgumentError, match="seconds"):
        Window(seconds)


SECONDS = st.floats(0, 0.1)
SHORT = st.one_of(st.floats(0, 0.005), SECONDS)
IDLE = st.builds(ExpectedSequence, SHORT, SHORT, st.floats(0.0, 1.0))
STEPS = st.builds(Linear, st.floats(0, 0.1), st.floats(0, 0.02), st.sampled_from([4, 8, 1000]))
GATHERINGS = st.builds(
    at, st.integers(1, 20), st.lists(IDLE, min_size=1, max_size=8).map(tuple), STEPS, SECONDS
)


def steps_of(g: Gathering) -> Linear:
    assert isinstance(g.cost, Linear)
    return g.cost


NEAR = 1e-9  # of a gain, in seconds: rounding decides there


@given(GATHERINGS, st.floats(0, 0.1))
def test_it_never_waits_for_longer_than_what_it_gains(g: Gathering, longest: float) -> None:
    answer = CostWindow(longest, least=0)(g)
    assert g.now + answer <= g.since + longest + 1e-12
    if answer <= 0:
        return
    bounds = [limit for wait, limit, net in groups(g) if net > 0]
    assert answer <= max(bounds)
    assert (
        answer < steps_of(g).predict(g.n_ready) + 1e-12
    )  # than those would wait who come too late


@given(GATHERINGS, st.floats(1, 10), st.floats(0, 0.1), st.floats(1, 5))
def test_it_waits_the_rather_the_dearer_a_step_and_the_sooner_and_surer_they_come(
    g: Gathering, dearer: float, sooner: float, surer: float
) -> None:
    window = CostWindow(1e9, least=0)
    if max(net for _, _, net in groups(g)) <= NEAR:
        return  # it does not wait, or rounding decides
    assert window(g) > 0
    cost = steps_of(g)
    steps = replace(cost, step_s=cost.step_s * dearer, row_s=cost.row_s * dearer)
    assert window(replace(g, cost=steps)) > 0
    soon = tuple(ExpectedSequence(0.0, max(0.0, r.wait - sooner), r.returns) for r in g.expected)
    assert window(replace(g, expected=soon)) > 0
    sure = tuple(replace(r, returns=min(1.0, r.returns * surer)) for r in g.expected)
    assert window(replace(g, expected=sure)) > 0


@given(st.integers(1, 20), st.integers(1, 8), SECONDS, st.floats(0.001, 0.1))
@example(1, 1, 0.0, 0.001)
def test_the_more_are_ready_the_sooner_they_go(n: int, k: int, wait: float, step_s: float) -> None:
    one, more = (
        CostWindow(1e9, least=0)(at(ready, in_seconds(*[wait] * k), Linear(step_s)))
        for ready in (n, n + 1)
    )
    assert more <= one + 1e-12


def test_long_times_count_only_as_such() -> None:
    return_time = ReturnTime()
    for _ in range(50):
        return_time.learn(0.002, 0.03)
    before = return_time.mean
    assert return_time.mean == pytest.approx(0.002, rel=0.01)
    assert return_time.returns > 0.99
    return_time.learn(600.0, 0.03)
    assert return_time.mean == before
    assert return_time.returns == pytest.approx(7 / 8, abs=0.01)


def test_a_new_one_is_like_those_before_it_and_then_like_itself() -> None:
    asked: list[Gathering] = []

    def gather(gathering: Gathering) -> float:
        asked.append(gathering)
        return 1.0

    idle = IdleSequences(gather)
    idle.within = 0.1
    for i in range(100):
        idle.begin(1, float(i))
        idle.learn(1, i + 0.01)
        idle.end(1)
    idle.begin(2, 100.0)
    assert idle.wait(100.004, 1, None, 0) == 1.0
    (rest,) = asked[-1].expected
    assert rest.idle == pytest.approx(0.004)
    assert rest.mean == pytest.approx(0.01, rel=0.01)
    idle.learn(2, 100.05)
    idle.end(2)
    idle.begin(1, 101.0)
    idle.begin(2, 101.0)
    idle.wait(101.0, 1, None, 0)
    one, two = sorted(asked[-1].expected, key=lambda rest: rest.mean)
    assert one.mean == pytest.approx(0.01, rel=0.01)
    assert two.mean == pytest.approx(0.01 + 0.04 / 8, rel=0.01)
    idle.learn(3, 7.0)  # who does not rest: nothing
    assert len(asked) == 2


Think = Callable[[random.Random, int], float]


@dataclass
class Run:
    seconds: float
    fill: float  # rows per step over the number of sequences
    waits: int  # holds that were more than 0


def run(gather: Gather, n: int, n_tokens: int, think: Think, cost: Linear) -> Run:
    """`n` owners ask for `n_tokens` each, the i-th `think(random, i)` seconds after the last."""
    rng = random.Random(7)
    limits = Limits(n_batch=64, n_ubatch=64, n_seq_max=n, n_cells=2**20, n_cells_seq=2**20)
    scheduler = Scheduler(limits, gather=gather, cost=cost)
    for i in range(n):
        scheduler.add(i, 1, 1, arrival=0.0, interactive=True)
    asks = [(think(rng, i), i) for i in range(n)]
    heapq.heapify(asks)
    left = [n_tokens] * n
    now, n_waits = 0.0, 0
    while asks or not scheduler.idle:
        while asks and asks[0][0] <= now:
            time, id = heapq.heappop(asks)
            scheduler.interactive.ask(id, time)
        if scheduler.idle:
            now = asks[0][0]
            continue
        pause = scheduler.hold(now)
        if pause > 0:
            n_waits += 1
            assert 0 < scheduler.n_awaited < n
            awaited = heapq.nsmallest(scheduler.n_awaited, asks)
            all_there = awaited[-1][0] if len(awaited) == scheduler.n_awaited else math.inf
            now = max(math.nextafter(now, math.inf), min(all_there, now + pause))
            continue
        step = scheduler.plan(now)
        assert step is not None
        now += cost.predict(step.n_rows)
        in_slot = {scheduler.slot(id): id for id in range(n)}
        scheduler.advance(step, 1, now)
        for id in (in_slot[slot] for slot in step.decode.tolist()):
            left[id] -= 1
            if left[id]:
                heapq.heappush(asks, (now + think(rng, id), id))
    counters = scheduler.counters
    assert counters.tokens == n * n_tokens
    return Run(now, counters.rows / counters.steps / n, n_waits)


def about(seconds: float) -> Think:
    return lambda rng, i: rng.expovariate(1 / seconds)


def at_times(seconds: float, share: float, late: float) -> Think:
    """`late` for this share, as of a thread that does not get a core."""
    return lambda rng, i: late * rng.random() if rng.random() < share else about(seconds)(rng, i)


def but_one(seconds: float, other: float) -> Think:
    return lambda rng, i: rng.expovariate(1 / (seconds if i else other))


OWNERS = {
    "at once": about(1e-4),
    "in a ms": about(1e-3),
    "some late": at_times(1e-4, 0.1, 0.01),
    "with a human": but_one(1e-4, 0.7),
    "as long as a step": about(0.02),
    "heavy tail": lambda rng, i: 3e-4 * rng.paretovariate(1.5),
}


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("cost", [Linear(0.02, 0.001), Linear(0.02, 0.01), Linear(0.001, 5e-5)])
def test_it_is_about_as_good_as_the_best_fixed_window(n: int, owners: str, cost: Linear) -> None:
    times = [
        run(Window(seconds), n, 200, OWNERS[owners], cost).seconds
        for seconds in (0, 200e-6, 2e-3, 10e-3)
    ]
    assert run(CostWindow(), n, 200, OWNERS[owners], cost).seconds <= 1.08 * min(times)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_steps_are_full_where_owners_are_quick_beside_a_step(n: int) -> None:
    for think in (about(1e-4), about(1e-3), at_times(1e-4, 0.02, 0.005)):
        assert run(CostWindow(), n, 64, think, Linear(0.03, 0.005)).fill >= 0.95
    assert run(Window(200e-6), n, 64, about(1e-3), Linear(0.03, 0.005)).fill < 0.7


def test_one_that_is_alone_never_waits() -> None:
    alone = run(CostWindow(), 1, 100, about(1e-3), Linear(0.02))
    assert (alone.waits, alone.fill) == (0, 1.0)


def test_humans_are_not_waited_for_once_they_are_known() -> None:
    """Each of two takes a second; a step 20 ms."""
    humans = run(CostWindow(), 2, 300, lambda rng, i: 0.5 + rng.random(), Linear(0.02))
    assert humans.waits <= 10
    fixed = run(Window(200e-6), 2, 300, lambda rng, i: 0.5 + rng.random(), Linear(0.02))
    assert fixed.waits > 200
