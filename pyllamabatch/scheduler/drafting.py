"""Drafting: what is known of drafts and of the time that their rows take, for `Speculate`.

A step may check several drafted tokens of a sequence behind its last known one (speculative
decoding): a row each, that stays as long as its token is the one that is sampled. Whether that pays
depends on how often drafts are right, and on what more rows cost. Both are measured: the drafter
keeps a record of each sequence, also while it has no drafted rows, and the steps' own times correct
the cost model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..cost.step_cost import StepCost
from ..kv import Slots
from .view import Drafts, Limits

_LEARNED = 0.25  # the share of a new observation
_TRUSTED = 4000  # steps: what was observed longer ago is no more known

Share = npt.NDArray[np.float64]


class Drafted(NamedTuple):
    """What came of the drafts of a call. taken: tokens sampled, by slot. n_rows: of all steps,
    drafted ones included. found, right: by slot, see `Drafts`. seconds: of the call."""

    taken: npt.NDArray[np.integer]
    n_rows: int
    n_drafted: int
    n_accepted: int
    found: npt.NDArray[np.floating]
    right: npt.NDArray[np.floating]
    seconds: float


class Drafting:
    """Of one scheduler. n_slots: of its accounting."""

    def __init__(self, limits: Limits, n_slots: int) -> None:
        n = limits.n_draft_max
        self._n_max = n
        self._owner = np.zeros(n_slots, dtype=np.int64)  # id + 1 of the sequence that it is of
        self._found = np.zeros((n_slots, n))
        self._right = np.zeros((n_slots, n))
        # By how many sequences decode, and by their longest draft: a factor and its step.
        self._factors: dict[int, dict[int, tuple[float, int]]] = {}
        self._n_steps = 0

    def observe(self, slots: Slots, owner: npt.NDArray[np.int64], drafted: Drafted) -> None:
        """After a call of these slots, whose sequences have these ids (+ 1)."""
        self._owner[slots] = owner
        self._found[slots] = drafted.found[slots]
        self._right[slots] = drafted.right[slots]

    def timed(self, n: int, most: int, n_steps: int, each: float) -> None:
        """`n_steps` steps of `n` sequences with drafts of at most `most` tokens took `each` times
        what the cost model says."""
        self._n_steps += n_steps
        of_n = self._factors.setdefault(n, {})
        known = of_n.get(most)
        if known is None or self._n_steps - known[1] > _TRUSTED:
            of_n[most] = each, self._n_steps
        else:
            share = _LEARNED if n_steps > 2 else _LEARNED / 4
            of_n[most] = known[0] + share * (each - known[0]), self._n_steps

    def factor(self, n: int, most: int) -> tuple[float, bool]:
        """What the cost model's seconds are to be multiplied by, and whether that was measured
        lately with such drafts."""
        of_n = self._factors.get(n, {})
        trusted = {k: f for k, (f, at) in of_n.items() if self._n_steps - at <= _TRUSTED}
        if most in trusted:
            return trusted[most], True
        if not trusted:
            return 1.0, False
        return trusted[min(trusted, key=lambda k: abs(k - most))], False

    def view(
        self,
        slots: Slots,
        owner: npt.NDArray[np.int64],
        n_left: npt.NDArray[np.int64],
        kv: float,
        limits: Limits,
        cost: StepCost | None,
    ) -> Drafts:
        """Of the sequences that decode in these slots, with so many tokens left to generate."""
        mine = (self._owner[slots] == owner)[:, None]
        found, right = self._found[slots] * mine, self._right[slots] * mine
        n = len(slots)

        def seconds(most: int, n_rows: float) -> tuple[float, bool]:
            if cost is None:
                return 0.0, False
            factor, known = self.factor(n, most)
            low = int(n_rows)
            value = cost.predict(low, 0, kv, n)
            if n_rows > low:
                value += (n_rows - low) * (cost.predict(low + 1, 0, kv, n) - value)
            return factor * value, known

        width = n if limits.unified or not n else int(slots[-1] - slots[0]) + 1
        room = min(limits.n_outputs or limits.n_batch, limits.n_ubatch, limits.n_batch)
        return Drafts(
            limits.n_draft_max,
            (owner - 1).tolist(),
            found,
            right,
            n_left,
            width,
            room,
            even=not limits.unified,
            seconds=None if cost is None else seconds,
        )
