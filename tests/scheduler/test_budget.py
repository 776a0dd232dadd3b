"""The largest prompt within a target: found exactly, and with few questions to the cost model."""

from itertools import accumulate
from math import log2

from hypothesis import given
from hypothesis import strategies as st

from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.scheduler import Limits, StepView
from pyllamabatch.scheduler.policies.parts import most_within
from tests.support import views

N_BATCH = 64


class Steps(StepCost):
    """Seconds by rows of prompts, from a table; counts the questions."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds
        self.n_asked = 0

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        assert (rows - prefill, n_seqs) == (1, 2)
        self.n_asked += 1
        return self.seconds[prefill]


def view_of(cost: Steps) -> StepView:
    limits = Limits(N_BATCH, N_BATCH, 4, 400, 400)
    return views.view_of(views.decoding(0), views.waiting(1, 200), limits=limits, cost=cost)


# Dearer with each row, by nothing, a little, or as at the edge of a tile.
curves = st.lists(
    st.sampled_from((0.0, 0.0, 0.125, 0.25, 8.0)), min_size=N_BATCH, max_size=N_BATCH
).map(lambda rises: list(accumulate(rises, initial=1.0)))


@given(curves, st.integers(0, N_BATCH), st.sampled_from((-0.0625, 0.0, 0.0625)), st.integers(1, 20))
def test_it_is_the_largest_within_the_target(
    seconds: list[float], rows: int, more: float, least: int
) -> None:
    cost, target = Steps(seconds), seconds[rows] + more
    good = [n for n in range(least, N_BATCH) if seconds[n] <= target]
    assert most_within(view_of(cost), target, least) == max(good, default=least)
    assert cost.n_asked <= 2 + 2 * log2(N_BATCH)


def test_a_cliff_takes_no_more_than_halving_twice() -> None:
    cost = Steps([1.0] * 60 + [1e9] * 5)
    assert most_within(view_of(cost), 1.5, 1) == 59
    assert cost.n_asked <= 2 + 2 * log2(N_BATCH)


def test_a_straight_curve_takes_five_questions_and_one_out_of_reach_two() -> None:
    cost = Steps([1.0 + 0.25 * n for n in range(N_BATCH)])
    for target, expected, n_most in ((9.1, 32, 5), (99.0, 63, 1), (1.5, 10, 2)):
        cost.n_asked = 0
        assert most_within(view_of(cost), target, 10) == expected
        assert cost.n_asked <= n_most
