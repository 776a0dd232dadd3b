"""Drafting: what is known of drafts and of the time that their rows take, for `Speculate`.

A step may check several drafted tokens of a sequence behind its last known one (speculative
decoding): a row each, that stays as long as its token is the one that is sampled. Whether that pays
depends on how often drafts are right, and on what more rows cost. Both are measured: the drafter
keeps a record of each sequence, also while it has no drafted rows, and the steps' own times correct
the cost model.

To find out takes time as well: to decide, to try, to bring a draft model to where a sequence is.
All of that is paid from one account (`Drafting.credit`). A share of the time fills it, the smaller
the more was lost lately, and what drafts have gained; while it is empty, steps are as if there were
no drafter (`Drafting.due`)."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, exp, inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..cost.step_cost import StepCost
from ..kv import Slots
from .invariance import Invariance
from .view import Drafts, Limits, Prices

LOSS = 0.01
"""The share of the time that drafts may lose, in trials and by bad luck."""

ADVANCE = 1.0
"""Seconds whose share they may lose before any has passed."""

RISKED = 0.5
"""The share of what drafts have gained lately that they may lose again."""

LATELY = 60.0
"""Seconds of steps: what was gained longer ago counts little, and so much time at most."""

Seconds = npt.NDArray[np.float64]

_NEAR = 0.25  # octaves of rows: how far the times of one number of rows speak for another one
_COUNTS = 16  # steps: what was known counts as so many new ones at most
_TRUSTED = 4000  # steps: what was observed longer ago is no more known
_OFF_MOST = 1.6  # a call whose steps are further off counts as this: something has disturbed it;
# where the next one is, too, or little was known, what is known begins anew with it
_FEW = 2  # steps in a row, which can't show that: the first ones of a kind may take much longer
_ENOUGH = 8  # steps without drafts that are timed before those with drafts are compared with them,
_AGAIN = 4  # of a call that only times some once more,
_NEW = 2  # and more of a call than that: its first ones may have a new graph, and tell nothing
_RENEWED = (16, 512)  # steps with drafts: then some without are timed again, as soon, as late
_LOST_MOST = 8.0  # steps' time, that one whose drafts were asked for may have lost; likewise,
# and looks' or turns' time, that one look may have lost
_LEARNED = 0.125  # the share of a new observation
_OTHERS = 1024  # steps: see `Drafting._n_passed`


class Drafted(NamedTuple):
    """What came of the drafts of a call. taken: tokens sampled, by slot. n_rows: of all steps,
    drafted ones included. found, right: by slot, see `Drafts`. seconds: of the call. n_timed,
    seconds_timed: of steps with 0, 1, ... rows, how many were timed, and how long they took in all,
    at their mean speed. gained: seconds, of the credit in its `Prices`; None where it had none.
    n_drafts: of which the drafted tokens were, one a sequence and step; n_right: of how many of
    them token i was right. catch_up: seconds in which a draft model has computed what it lacked of
    sequences."""

    taken: npt.NDArray[np.integer]
    n_rows: int
    n_drafted: int
    n_accepted: int
    found: npt.NDArray[np.floating]
    right: npt.NDArray[np.floating]
    seconds: float
    n_timed: npt.NDArray[np.integer]
    seconds_timed: npt.NDArray[np.floating]
    gained: float | None = None
    n_drafts: int = 0
    n_right: npt.NDArray[np.integer] | None = None
    catch_up: float = 0.0


def width_of(slots: Slots, *, even: bool) -> int:
    """Rows of a step of these slots without drafts. even: streams, of which each up to the last
    one has a row."""
    return int(slots[-1] - slots[0]) + 1 if even and len(slots) else len(slots)


class StepTimes:
    """What steps of so many rows take beside what a cost model says. Each number of rows that was
    timed lately has its factor, the more of its near neighbours' in it the fewer its own steps are:
    else the one that was measured too low would be chosen. Between them the factor is in between;
    beyond the largest a step takes, at worst, in proportion to its rows."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, float, int]] = {}  # by rows: factor, weight, step
        self._doubted = dict[int, int]()  # of these the last calls' steps, so many, were far off
        self._n_steps = 0

    def observe(self, n_rows: int, n_steps: int, ratio: float) -> bool:
        """`n_steps` steps took `ratio` times what the model says. Returns whether that is about
        what was known."""
        new = self.factor(n_rows) if self._known else ratio, 0.0, 0
        factor, weight, _ = self._known.get(n_rows, new)
        near = min(max(ratio, factor / _OFF_MOST), factor * _OFF_MOST)
        agrees, weight = near == ratio, min(weight, _COUNTS)
        doubted = self._doubted.pop(n_rows, 0)
        if not agrees:
            if (doubted or weight < _ENOUGH) and doubted + n_steps > _FEW:
                factor, near, weight = ratio, ratio, 0.0
            else:
                self._doubted[n_rows] = doubted + n_steps
                if not weight:
                    return False
        n = weight + n_steps
        # the mean of speeds: what was disturbed counts little
        self._known[n_rows] = n / (weight / factor + n_steps / near), n, self._n_steps
        return agrees

    def passed(self, n_steps: int) -> None:
        """So many steps were computed."""
        self._n_steps += n_steps
        if self._known and min(at for *_, at in self._known.values()) < self._n_steps - _TRUSTED:
            self._known = {
                n: seen for n, seen in self._known.items() if seen[2] >= self._n_steps - _TRUSTED
            }

    def missing(self, first: int, last: int) -> float:
        """Steps of these numbers of rows that are to be timed until they are known; 0: they are."""
        known = self._known.items()
        return max(0, _ENOUGH - sum(w for n, (_, w, _) in known if first <= n <= last))

    def factor(self, n_rows: int) -> float:
        """Of steps of so many rows."""
        return float(np.interp(n_rows, *self._factors()))

    def _factors(self) -> tuple[list[int], Seconds]:
        """Numbers of rows, ascending, and their factors."""
        if not self._known:
            return [1], np.ones(1)
        known = sorted(self._known)
        factors, weights, _ = np.array([self._known[n] for n in known]).T
        octaves = np.log2(known)
        near = np.exp(-(((octaves[:, None] - octaves) / _NEAR) ** 2)) * weights
        return known, (near @ factors) / near.sum(axis=1)

    def prices(
        self, said: Seconds, plain: tuple[int, float] | None = None
    ) -> tuple[Seconds, Seconds]:
        """Expected and worst seconds of steps of 0, 1, ... rows, where a cost model has `said`
        them. plain: rows and factor of steps without drafts, where these times are of others."""
        rows = np.arange(len(said))
        known, factors = self._factors()
        if plain is not None:
            first = int(np.searchsorted(known, plain[0], side="right"))
            known, factors = [plain[0], *known[first:]], np.append(plain[1], factors[first:])
        seconds = said * np.interp(rows, known, factors)
        largest = min(known[-1], len(said) - 1)
        worst = np.maximum(seconds, seconds[largest] * rows / max(1, largest))
        worst[: largest + 1] = seconds[: largest + 1]
        return seconds, worst


class Drafting:
    """Of one scheduler. n_slots: of its accounting."""

    def __init__(self, limits: Limits, n_slots: int, invariance: Invariance | None = None) -> None:
        n = limits.n_draft_max
        self._invariance = invariance
        self.limits = limits
        self.times = StepTimes()
        # a step of as many rows takes longer with drafts where these take time
        self.drafted = StepTimes() if limits.drafts_take_time else self.times
        self.credit = LOSS * ADVANCE
        self._gained = 0.0  # seconds, less what was lost
        self._seconds = ADVANCE  # of all steps that might have had drafts
        self._owner = np.zeros(n_slots, dtype=np.int64)  # id + 1 of the sequence that it is of
        self._n_seen = np.zeros(n_slots, dtype=np.int64)  # steps of that one
        self._calm_owner = self._owner[:0]  # what decoded in the last call,
        self._n_calm = 0  # and for so many steps, without drafts
        self._spell = 0  # steps with drafts, as long as those without take what they did
        self._n_asked = 0  # of these since some without were timed
        self._found = np.zeros((n_slots, n))
        self._right = np.zeros((n_slots, n))
        # Of a draft model, told by what asks it: tokens of each slot that it has to compute before
        # it can draft, once `asks` was called, and its share of the model's size.
        self.asks: Callable[[], None] = lambda: None
        self.lacks: npt.NDArray[np.integer] = np.zeros(n_slots, dtype=np.int32)
        self.size = 0.0
        self._wanted = 0.0  # credit without which it is of no use to look at drafts again,
        self._n_passed = 0  # unless so many steps have passed: these may be others by now
        self.looked = False  # for the next step
        self.stands = 0  # steps for which the last look has said that there are none
        self.cuts = 0  # steps after which its call ends for that alone,
        self._cut = False  # as the one before did
        self._n_changes = 0  # when it was planned
        self._turn: float | None = None  # seconds of Python for a step of decoding without a look
        self._look = 0.0  # seconds that one has lost lately

    @property
    def due(self) -> int | None:
        """After how many steps drafts are to be looked at, 0: before the next one; None: that is
        not paid for. At first a turn is timed without a look, and the steps that follow it. That
        there are none stands while none comes or goes, also where something ends a call sooner."""
        if not self._pays_for(0.0):
            return None
        return _ENOUGH + _NEW if self._turn is None else self.stands

    def _pays_for(self, seconds: float) -> bool:
        """So many seconds from now."""
        wanted = self._wanted if self._n_passed < _OTHERS else 0.0
        return self.credit + LOSS * seconds >= wanted

    def planned(self, n_changes: int) -> None:
        """The next step is about to be planned. n_changes: see `Sequences`."""
        same = n_changes == self._n_changes
        self._cut, self.stands = self.cuts > 0 and same, self.stands * same
        self._n_changes, self.looked, self.cuts = n_changes, False, 0

    def turned(self, seconds: float, *, prompts: bool) -> None:
        """What was done for that step, which has rows of prompts or not, took so long beside the
        step itself and KV operations, a drafter's time in Python included. All of it is lost where
        nothing but a look at drafts has ended the step before, nothing has changed, and none has
        joined: without a drafter, what came before would have gone on. Else what it takes longer
        than a turn for decoding does without a look."""
        known, lost = seconds if self._turn is None else self._turn, 0.0
        if self._cut and not prompts:
            lost = seconds
        elif self.looked:
            self._turn = min(known, seconds)
            lost = seconds - self._turn
        elif not prompts:
            self._turn = known + (seconds - known) * _LEARNED
        if lost > 0 and self._turn is not None:  # of the first one that is off, as of steps' times
            most = _LOST_MOST * max(self._turn, self._look)
            self._look += (lost - self._look) * _LEARNED
            lost = min(lost, most)
        self._gained -= lost
        self.credit -= lost

    def stop(self) -> None:
        """There will be no drafts any more: nothing pays for a look at them."""
        self.credit = -inf

    def move(self, source: int, slot: int) -> None:
        """The sequence in `source` goes on in `slot`."""
        for by_slot in (self._owner, self._n_seen, self._found, self._right):
            by_slot[slot] = by_slot[source]

    def passes(self, n_steps: int, seconds: float, *, asked: bool) -> bool:
        """`n_steps` steps have decoded for so many seconds (0: that is not known), and might have
        had drafts or not (`asked`). Whether that is all to be told of them: else `observe` is."""
        self._n_passed += n_steps
        self.stands = max(0, self.stands - n_steps)
        if asked or self.looked or self._pays_for(seconds):
            return False
        self._fill(seconds)
        return True

    def _fill(self, seconds: float, gained: float = 0.0) -> None:
        self._seconds += seconds
        self._gained = self._gained * exp(-seconds / LATELY) + gained
        most = LOSS * min(self._seconds, LATELY) + max(0.0, RISKED * self._gained)
        # Each trial in vain makes the next one rarer: all of them cost as the root of the time.
        free = LOSS * ADVANCE + self._wanted
        share = LOSS * free / (free + max(0.0, -self._gained))
        self.credit = min(self.credit + gained + share * seconds, max(most, self._wanted))

    def observe(
        self,
        slots: Slots,
        owner: npt.NDArray[np.int64],
        drafted: Drafted,
        n_steps: int,
        kv: float,
        cost: StepCost | None,
        *,
        asked: bool = False,
    ) -> None:
        """After a call of `n_steps` steps of these slots, whose sequences have these ids (+ 1) and
        attended `kv` cells on average. asked: it might have had drafts. cost: None for steps that
        tell nothing of what decoding takes."""
        mine = self._owner[slots] == owner
        self._n_seen[slots] = self._n_seen[slots] * mine + n_steps
        self._owner[slots] = owner
        self._found[slots] = drafted.found[slots]
        self._right[slots] = drafted.right[slots]
        calm = self._n_calm if np.array_equal(owner, self._calm_owner) else 0
        self._calm_owner, self._n_calm = owner, 0 if drafted.n_drafted else calm + n_steps
        if cost is None:  # prompts: they have no drafts
            return
        times = self.drafted if asked else self.times
        for each in {self.times, self.drafted}:
            each.passed(n_steps)
        agrees, width = False, self._width(slots)
        for n_rows in np.flatnonzero(drafted.n_timed).tolist():
            n = int(drafted.n_timed[n_rows])
            said = cost.predict(n_rows, 0, kv, len(slots))
            if said > 0:
                ratio = float(drafted.seconds_timed[n_rows]) / n / said
                agrees = times.observe(n_rows, n, ratio) or agrees
        if asked:
            self._spell += n_steps
            renewed = times is self.times and drafted.n_timed[width]
            self._n_asked = 0 if renewed else self._n_asked + n_steps
        elif drafted.n_timed.any():
            self._spell, self._n_asked = self._spell * agrees, 0
        gained = 0.0
        if drafted.gained is not None:
            gained = drafted.gained
        elif asked and not self.times.missing(width, max(width, self.limits.n_seq_max)):
            plain = cost.predict(width, 0, kv, len(slots)) * self.times.factor(width)
            worth = plain * float(drafted.taken[slots].sum()) / len(slots)
            own = drafted.seconds - drafted.catch_up
            gained = max(worth - own, -_LOST_MOST * n_steps * plain) - drafted.catch_up
        self._fill(drafted.seconds, gained)

    def _begin(self, slots: Slots, cost: StepCost) -> float:
        """Seconds that it takes to bring a draft model to where these are."""
        n = int(self.lacks[slots].sum())
        if not n:
            return 0.0
        return self.size * cost.predict(n, n, n / 2, 1) * self.times.factor(len(slots))

    def _width(self, slots: Slots) -> int:
        if self._invariance is not None:
            return self._invariance.width(slots[-1:].tolist())
        return width_of(slots, even=not self.limits.unified)

    def view(
        self,
        slots: Slots,
        owner: npt.NDArray[np.int64],
        n_left: npt.NDArray[np.int64],
        kv: float,
        cost: StepCost | None,
        new_graph: float | None = None,
    ) -> Drafts:
        """Of the sequences that decode in these slots, with so many tokens left to generate.
        new_graph: seconds, as measured; None: as the cost model says."""
        self.asks()
        limits, self._wanted, self._n_passed = self.limits, 0.0, 0
        self.looked = cost is not None  # else nothing can be said to be lost
        mine = self._owner[slots] == owner
        found, right = (share[slots] * mine[:, None] for share in (self._found, self._right))
        n = len(slots)
        width = self._width(slots)
        room = min(limits.n_outputs or limits.n_batch, limits.n_ubatch, limits.n_batch)

        # a step without drafts has at least `width` rows, and with padding more
        missing = self.times.missing(width, max(width, limits.n_seq_max))
        untimed = ceil(missing) + _NEW if missing else 0
        if not missing and self._n_asked >= np.clip(self._spell - self._n_asked, *_RENEWED):
            untimed = _AGAIN

        def prices() -> Prices:
            assert cost is not None
            rows = range(room + 1)
            said = np.array([cost.predict(n_rows, 0, kv, n) if n_rows else 0.0 for n_rows in rows])
            own = None if self.drafted is self.times else (width, self.times.factor(width))
            seconds, worst = self.drafted.prices(said, own)
            if self._invariance is not None:
                seconds = self._invariance.allowed(seconds, width)
            graph = cost.new_graph.step if new_graph is None else new_graph
            self._wanted = self._begin(slots, cost)
            return Prices(seconds, worst, self.credit, new_graph=graph, begin=self._wanted)

        return Drafts(
            limits.n_draft_max,
            (owner - 1).tolist(),
            found,
            right,
            self._n_seen[slots] * mine,
            n_left,
            width,
            room,
            even=limits.even_rows,
            n_calm=self._n_calm if np.array_equal(owner, self._calm_owner) else 0,
            untimed=untimed,
            prices=None if cost is None or width > room else prices,
        )
