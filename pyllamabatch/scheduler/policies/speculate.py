"""How many drafted tokens each sequence may add to a step (speculative decoding)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ..policy import NO_SPECULATION, PlanBuilder, Speculation
from ..view import Drafts

# Steps that a decision stands for, and a first one with drafts that were never timed.
STEPS, TRIAL = 16, 4
HOPE = 0.75  # what they take then, beside what the cost model says: a short trial tells


@dataclass(frozen=True, slots=True)
class ByGain:
    """As many as give most tokens a second, by how drafts have done lately and by what rows cost;
    none where that is not at least `gain` more than without. No step takes longer than an ITL
    target. Without a cost model there are none. Drafts of a length that was not timed lately are
    tried for a few steps where they may pay.

    The sequences whose drafts are right most often come first. Where all sequences of a step need
    the same number of rows (`Drafts.even`) one draft costs rows of all, so that there it takes
    several that are often right, or few sequences."""

    gain: float = 0.05

    def __post_init__(self) -> None:
        if not self.gain >= 0:
            raise ArgumentError("gain", self.gain, "0 or more")

    def __call__(self, builder: PlanBuilder) -> Speculation:
        view = builder.view
        drafts = None if view.drafts is None else view.drafts()
        if drafts is None or drafts.seconds is None or not drafts.ids:
            return NO_SPECULATION
        none = Speculation({}, STEPS)
        n = len(view.decoding)
        if n != len(drafts.ids) or not drafts.right[:, 0].any():
            return none
        target = float(view.running.column("itl_target").min())
        plain, _ = drafts.seconds(0, n)
        best, choice, sure = (1 + self.gain) * n / plain if plain > 0 else np.inf, None, True
        order = np.argsort(-drafts.right[:, 0], kind="stable")
        for k in range(1, drafts.n_max + 1):
            tokens, rows, most = expected(drafts, order, k)
            fits = most <= min(drafts.room, builder.cells + n)
            if not fits.any():
                break
            each = [drafts.seconds(k, x) for x in rows[fits].tolist()]
            seconds = np.array([value if known else HOPE * value for value, known in each])
            rate = np.where(seconds <= target, tokens[fits] / seconds, 0.0)
            at = int(rate.argmax())
            if rate[at] > best:
                best, choice, sure = float(rate[at]), (at + 1, k), each[at][1]
        if choice is None:
            return none
        n_first, k = choice
        ids, left = drafts.ids, drafts.n_left.tolist()
        chosen = {ids[i]: min(k, left[i] - 1) for i in order[:n_first].tolist() if left[i] > 1}
        return Speculation(chosen, STEPS if sure else TRIAL)


def expected(
    drafts: Drafts, order: npt.NDArray[np.intp], k: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Of a step in which the first 1, 2, ... sequences of `order` have drafts of up to `k` tokens:
    tokens that it gives, its rows on average, and the most rows that it can have."""
    n = len(drafts.ids)
    right, found = drafts.right[order, :k], drafts.found[order, :k]
    tokens = n + np.cumsum(right.sum(axis=1))
    if drafts.even:
        any_found = 1 - np.cumprod(1 - found[:, 0])
        most = np.full(n, drafts.width * (k + 1), dtype=np.int64)
        return tokens, drafts.width + any_found * drafts.width * k, most
    rows = n + np.cumsum(found.sum(axis=1))
    return tokens, rows, n + k * np.arange(1, n + 1, dtype=np.int64)
