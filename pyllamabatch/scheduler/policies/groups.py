"""Newcomers in groups: a prompt waits for the next one, where prompts computed together cost less.

A call of prompts costs a GPU much before its first row, and it holds up all that decode. So
newcomers that follow each other soon join together. On a CPU a call costs what its rows cost, and
newcomers are rare: each joins at once."""

from math import isinf

from ...errors import number
from ..padding import comes_behind
from ..policy import Admit, PlanBuilder, Verdict
from ..view import SequenceView
from .parts import next_due
from .width import measured

HOLD_SECONDS = 0.1  # less than what a reader notices
SAVED = 2 / 3  # of what a call for two saves; rows that fill up the shorter prompt take the rest


class InGroups:
    """Admit those that `fits` admits, as soon as it is not worth to wait for the next newcomer.

    Say k could join now, as k of n sequences, n - k of which decode, and the next one is expected
    in w seconds. P(k) is how much longer a step takes for the prompts of k. Joining together with
    the next one, each newcomer costs all of them P(k) / k - P(k + 1) / (k + 1) less, and the first
    one waits w longer. In seconds of sequences:

        gain  SAVED * (n + 1) * (P(k) / k - P(k + 1) / (k + 1))      price  w

    w is the mean time between newcomers lately, or the time since the last one, if that is longer:
    one that is late by some time is expected to be late by as much again. The first one waits for
    `hold` seconds at most, and not into the time that two such steps take before the first token
    of any is due (`ttft_target`). ArgumentError below 0. One object serves one engine."""

    __slots__ = ("_every", "_joined", "_since", "fits", "hold")

    def __init__(self, fits: Admit, hold: float = HOLD_SECONDS) -> None:
        self.fits = fits
        self.hold = number("hold", hold, 0)
        self._every = self._longest  # seconds between newcomers
        self._joined = 0.0  # when the last ones did
        self._since: float | None = None  # when the first one of these could have

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        verdict = self.fits(builder, seq)
        if verdict is not Verdict.ADMIT or builder.admitted:
            return verdict
        now, k = builder.view.now, min(len(builder.view.waiting), builder.slots)
        since = now if self._since is None else self._since
        if self._waits(builder, seq, k, now - since):
            self._since = since
            builder.ask_again(since + self.hold)
            return Verdict.STOP
        every = min((now - self._joined) / k, self._longest)
        self._every += (every - self._every) / 8
        self._joined, self._since = now, None
        return verdict

    @property
    def _longest(self) -> float:
        """Seconds between newcomers that are as good as for ever."""
        return 2 * self.hold

    def _waits(self, builder: PlanBuilder, seq: SequenceView, k: int, waited: float) -> bool:
        """seq: the first one, whose prompt is taken to be as long as the others'."""
        view, cost, rows = builder.view, builder.view.cost, seq.remaining
        decoding = len(view.decoding)
        wait = max(self._every, view.now - next(reversed(view.waiting)).arrival)
        if waited + wait >= self.hold or not decoding or len(view.prefilling) or not measured(cost):
            return False
        limits = view.limits
        together = limits.unified or (limits.fills and comes_behind(limits, cost, k + 1, decoding))
        if not together or (k + 1) * rows > builder.rows:
            return False
        kv = view.kv.attended

        def step(k: int) -> float:
            return cost.predict(decoding + k * rows, k * rows, kv, decoding + k)

        alone = cost.predict(decoding, 0, kv, decoding)
        gain = (step(k) - alone) / k - (step(k + 1) - alone) / (k + 1)
        if SAVED * (decoding + k + 1) * gain <= wait:
            return False
        _, due = next_due(view)
        return isinf(due) or due - view.now > 2 * step(k + 1)
