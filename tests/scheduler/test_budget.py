"""The largest prompt within a target: found exactly, and with few questions to the cost model; and
one whose rows cost least."""

from itertools import accumulate
from math import log2

from hypothesis import example, given
from hypothesis import strategies as st

from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.scheduler import Limits, SequenceView, StepView
from pyllamabatch.scheduler.policies.device_aware import PromptsSoon
from pyllamabatch.scheduler.policies.parts import AS_LONG, WithinTarget, most_within
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


@example([1.0] * 60 + [1e9] * 5, 59, 0.0, 1)  # a cliff
@given(curves, st.integers(0, N_BATCH), st.sampled_from((-0.0625, 0.0, 0.0625)), st.integers(1, 20))
def test_it_is_the_largest_within_the_target(
    seconds: list[float], rows: int, more: float, least: int
) -> None:
    cost, target = Steps(seconds), seconds[rows] + more
    within = target if seconds[least] <= target else (1 + AS_LONG) * seconds[least]
    good = [n for n in range(least, N_BATCH) if seconds[n] <= within]
    assert most_within(view_of(cost), target, least) == max(good)
    assert cost.n_asked <= 2 + 2 * log2(N_BATCH)


def test_a_straight_curve_takes_five_questions_and_one_out_of_reach_three() -> None:
    cost = Steps([1.0 + 0.25 * n for n in range(N_BATCH)])
    for target, expected, n_most in ((9.1, 32, 5), (99.0, 63, 1), (1.5, 10, 3)):
        cost.n_asked = 0
        assert most_within(view_of(cost), target, 10) == expected
        assert cost.n_asked <= n_most


class Dear(StepCost):
    """From 32 rows on each sequence that decodes beside a prompt takes `more` seconds longer."""

    edges = (8, 16, 24, 31, 40, 48, 56, 64)

    def __init__(self, more: float = 1.0, *, measured: bool = True) -> None:
        self.more, self.layout_measured = more, measured

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        return 0.02 * rows + self.more * (rows - prefill) * (prefill > 0 and rows >= 32)


def test_a_prompt_in_a_pool_comes_in_rows_that_cost_least() -> None:
    limits = Limits(64, 64, 8, 4000, 4000)
    budget = PromptsSoon(WithinTarget(itl=100.0))

    def rows(cost: StepCost, **prompt: float) -> int:
        others = [views.decoding(i) for i in range(4)]
        prompts = views.waiting(5, 300, **prompt), views.waiting(6, 300)
        return budget(views.view_of(*others, *prompts, limits=limits, cost=cost))

    assert rows(Dear()) == 31
    assert rows(Dear(more=0.001)) == 64  # not worth it
    assert rows(Dear(measured=False)) == rows(Dear(), ttft_target=1e3) == 64
    vague = Dear()
    vague.error = (2.0, 4.0)
    assert rows(vague) == 64


def test_those_that_all_were_preempted_have_readers_too() -> None:
    limits = Limits(64, 64, 8, 4000, 4000)

    def rows(*sequences: SequenceView) -> int:
        view = views.view_of(*sequences, limits=limits, cost=Dear())  # 50 rows of prompts a second
        return WithinTarget(itl=1.0)(view)

    new, preempted = views.waiting(9, 300), views.waiting(1, 5, generated=3)
    assert rows(new) == rows(views.prefilling(2, 300, 10), new) == 64
    assert rows(preempted, new) == rows(views.prefilling(1, 5, 2, generated=3), new) == 50
    assert rows(preempted, preempted._replace(id=2, itl_target=0.5), new) == 25
    long = views.waiting(1, 57, generated=3, itl_target=0.01)  # its own rows
    assert rows(long, new) == rows(long) == 60
