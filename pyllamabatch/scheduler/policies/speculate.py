"""How many drafted tokens each sequence may add to a step (speculative decoding)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ..policy import NO_SPECULATION, PlanBuilder, Speculation
from ..view import Drafts, Prices

STEPS = 64  # that a decision stands for,
AT_MOST = 1024  # or as many as there were without any, up to this
TIMED = 4  # of a kind that was not timed lately
ASKED = 16  # where drafts are asked for, as they were right lately
REPAID = 2.0  # times what it takes to begin is to be gained in what is left of the answers
HOPE = 0.75  # what steps take then that were not timed, beside what the cost model says


@dataclass(frozen=True, slots=True)
class ByGain:
    """As many as give most tokens a second; none where that is not at least `gain` more than
    without. Without a cost model there are none.

    Of drafts that cost nothing to make it decides what rows cost, and how many a sequence may have
    at most. How many it has is decided in each step, by what was drafted there (`Prices`): long
    matches are right more often than short ones. Others are asked for as they were right lately, a
    number that was not timed yet for a few steps at first. No step takes longer than an ITL target.
    Where it is not paid for to look at drafts (`StepView.drafts_in`), plans are as if there were no
    drafter."""

    gain: float = 0.1

    def __post_init__(self) -> None:
        if not self.gain >= 0:
            raise ArgumentError("gain", self.gain, "0 or more")

    def __call__(self, builder: PlanBuilder) -> Speculation:
        view = builder.view
        if view.drafts is None or view.drafts_in is None:
            return NO_SPECULATION
        if view.drafts_in:
            return Speculation({}, view.drafts_in)
        drafts = view.drafts()
        if drafts.prices is None or not drafts.ids:
            return NO_SPECULATION
        n = len(view.decoding)
        steps = min(max(STEPS, drafts.n_calm), AT_MOST)
        none = Speculation({}, steps)
        if n != len(drafts.ids):
            return none
        if drafts.untimed:
            return Speculation({}, drafts.untimed)
        prices = drafts.prices()
        room = min(drafts.room, builder.cells + n)
        most = min(drafts.n_max, (room - drafts.width) // (drafts.width if drafts.even else n))
        if most < 1 or prices.credit < prices.begin:
            return none
        target = view.running.itl_targets()[0]
        seconds = np.where(prices.seconds <= target, prices.seconds, 0.0)
        own = prices._replace(seconds=seconds, gain=self.gain)
        if not view.limits.drafts_take_time:
            if not can_pay(drafts, seconds, most, self.gain):
                return none
            return Speculation(_as_many(drafts, most), steps, own)
        if not drafts.n_seen.all():  # of a new one what is usual is known soon
            return Speculation({}, 1)
        k, steps = _choice(drafts, own, most)
        return Speculation(_as_many(drafts, k), steps) if k else none


def _choice(drafts: Drafts, prices: Prices, most: int) -> tuple[int, int]:
    """How many drafted tokens of each give most tokens a second, 0 where that is too little; and
    for how many steps: if such steps were not timed, few, and no more than there is credit for."""
    n, width = len(drafts.ids), drafts.width
    plain = float(prices.seconds[width])
    if plain <= 0:  # even such a step is longer than an ITL target
        return 0, ASKED
    best = (1 + prices.gain) * n / plain
    if prices.begin:  # as much as that has to be gained before the answers end
        left = float(drafts.n_left.mean()) * plain
        repaid = 1 - REPAID * prices.begin / left
        best = max(best, n / plain / repaid) if repaid > 0 else np.inf
    choice, steps, spare = 0, ASKED, prices.credit - prices.begin
    for k in range(1, most + 1):
        rows = (width if drafts.even else n) * k + width
        seconds, worst = float(prices.seconds[rows]), float(prices.worst[rows])
        timed = worst <= seconds
        tokens = n + float(drafts.right[:, :k].sum())
        hoped = seconds if timed else max(HOPE * seconds, min(plain, seconds))
        rate = tokens / hoped if seconds > 0 else 0.0
        loss = worst + prices.new_graph - tokens * plain / n  # at worst
        if rate > best and loss <= spare:
            best, choice = rate, k
            steps = ASKED if timed else int(np.clip(spare / max(loss, 1e-9), 1, TIMED))
    return choice, steps


def _as_many(drafts: Drafts, n: int) -> dict[int, int]:
    """Of each, as far as it may still generate them."""
    left = drafts.n_left.tolist()
    return {id: min(n, left[i] - 1) for i, id in enumerate(drafts.ids) if left[i] > 1}


def can_pay(drafts: Drafts, seconds: npt.NDArray[np.float64], most: int, gain: float) -> bool:
    """Whether there is a number of drafted rows with which a step would pay if all were right."""
    n, width = len(drafts.ids), drafts.width
    plain = float(seconds[width])
    k = np.arange(1, most + 1)
    if drafts.even:
        rows, tokens = width * (k + 1), n * (k + 1)
    else:
        more = np.arange(1, n * most + 1)
        rows, tokens = n + more, n + more
    took = seconds[rows]
    return plain > 0 and bool((tokens[took > 0] * plain > (1 + gain) * n * took[took > 0]).any())
