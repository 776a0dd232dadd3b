"""How many drafted tokens each sequence may add to a step (speculative decoding)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ..policy import NO_SPECULATION, PlanBuilder, Speculation
from ..view import Drafts, Prices

STEPS = 64  # that a decision stands for
TIMED = 4  # of a kind that was not timed lately
ASKED = 16  # where drafts are asked for, as they were right lately
HOPE = 0.75  # what steps take then that were not timed, beside what the cost model says


@dataclass(frozen=True, slots=True)
class ByGain:
    """As many as give most tokens a second; none where that is not at least `gain` more than
    without. Without a cost model there are none.

    Of drafts that cost nothing to make it decides what rows cost, and how many a sequence may have
    at most. How many it has is decided in each step, by what was drafted there (`Prices`): long
    matches are right more often than short ones. Others are asked for as they were right lately, a
    number that was not timed yet for a few steps at first. Those that keep the sampling off the
    device begin with one step, which shows what the move takes, and go on as long as they give more
    than without. No step takes longer than an ITL target."""

    gain: float = 0.1

    def __post_init__(self) -> None:
        if not self.gain >= 0:
            raise ArgumentError("gain", self.gain, "0 or more")

    def __call__(self, builder: PlanBuilder) -> Speculation:
        view = builder.view
        drafts = None if view.drafts is None else view.drafts()
        if drafts is None or drafts.prices is None or not drafts.ids:
            return NO_SPECULATION
        n = len(view.decoding)
        if n != len(drafts.ids):
            return Speculation({}, STEPS)
        prices = drafts.prices()
        if prices is None:
            return Speculation({}, TIMED)
        room = min(drafts.room, builder.cells + n)
        most = min(drafts.n_max, (room - drafts.width) // (drafts.width if drafts.even else n))
        if most < 1 or prices.credit < prices.begin:
            return Speculation({}, STEPS)
        target = view.running.itl_targets()[0]
        seconds = np.where(prices.seconds <= target, prices.seconds, 0.0)
        own = prices._replace(seconds=seconds, gain=self.gain)
        if view.limits.drafts_take_time:
            expected = self._asked(drafts, own, most, HOPE, unknown=1)
            begins = prices.begin and expected.drafts
            return expected._replace(steps=1) if begins else expected
        if not can_pay(drafts, seconds, most, self.gain):
            return Speculation({}, STEPS)
        if not view.limits.drafts_move_sampling:
            return Speculation(_as_many(drafts, most), STEPS, own)
        if not prices.begin:
            return Speculation(_as_many(drafts, most), ASKED, own._replace(gain=0.0))
        expected = self._asked(drafts, own, most)
        return Speculation(_as_many(drafts, most), 1, own) if expected.drafts else expected

    def _asked(
        self,
        drafts: Drafts,
        prices: Prices,
        most: int,
        hope: float = 1.0,
        *,
        unknown: int = ASKED,
    ) -> Speculation:
        """unknown: steps until one without any drafts so far is looked at again."""
        if not drafts.found.any(axis=1).all():  # of a new one what is usual is known soon
            return Speculation({}, unknown)
        n, width = len(drafts.ids), drafts.width
        plain = float(prices.seconds[width])
        best = (1 + prices.gain) * n / plain if plain > 0 else np.inf
        choice, timed = 0, True
        for k in range(1, most + 1):
            rows = (width if drafts.even else n) * k + width
            seconds = float(prices.seconds[rows])
            known = prices.worst[rows] <= seconds
            tokens = n + float(drafts.right[:, :k].sum())
            hoped = seconds if known else max(hope * seconds, min(plain, seconds))
            rate = tokens / hoped if seconds > 0 else 0.0
            if rate > best:
                best, choice, timed = rate, k, known
        if not choice:
            return Speculation({}, STEPS)
        return Speculation(_as_many(drafts, choice), ASKED if timed else TIMED)


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
