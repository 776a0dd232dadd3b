"""Newcomers in groups: a prompt waits for the next one, where prompts computed together cost less.

A call of prompts costs a GPU much before its first row, and it holds up all that decode. So
newcomers that follow each other soon join together. On a CPU a call costs what its rows cost, and
newcomers are rare: each joins at once."""

from collections.abc import Sequence
from itertools import islice
from math import inf

from ...errors import number
from ..neighbours import MOST
from ..padding import comes_behind
from ..policy import Admit, PlanBuilder, Verdict
from ..view import SequenceView, StepView
from .parts import by_first_token, first_token_due
from .width import measured

GROUP_WAIT_SECONDS = 0.1  # less than what a reader notices
SAVED = 2 / 3  # of what a call for two saves; rows that fill up the shorter prompt take the rest


class InGroups:
    """Admit those that `fits` admits, as soon as it is not worth to wait for the next newcomer.

    Say k could join now, as k of n sequences, n - k of which decode, and the next one is expected
    in w seconds. P(k) is how much longer a step takes for the prompts of k, each as long as the
    longest of them. Joining together with the next one, each newcomer costs all of them
    P(k) / k - P(k + 1) / (k + 1) less, and the first one waits w longer. In seconds of sequences:

        gain  SAVED * (n + 1) * (P(k) / k - P(k + 1) / (k + 1))      price  w

    w is the mean time between newcomers lately, or the time since the last one, if that is longer:
    one that is late by some time is expected to be late by as much again. Where more wait than
    could join, the next one has come, and w is the mean. So it is where these take the last slots:
    one of those that decode ends as often as one comes. Each waits for `group_wait` seconds at
    most, and not into the time that two such steps take before the first token of any is due
    (`ttft_target`), or its `deadline`; one that was preempted after its first token does not wait.
    Of those that join, no more are admitted in a step than are computed together behind those that
    decode (`comes_behind`, `MOST`), with the prompts that were begun before: with one more each
    would have a call of its own. One whose prompt is cached joins at once. ArgumentError below 0.
    One object serves one engine, whose order is `soonest_due`."""

    __slots__ = ("_came", "_every", "_since", "fits", "group_wait")

    def __init__(self, fits: Admit, group_wait: float = GROUP_WAIT_SECONDS) -> None:
        self.fits = fits
        self.group_wait = number("group_wait", group_wait, 0)
        self._every = self._longest  # seconds between newcomers
        self._came = 0.0  # when the last ones could first have joined
        self._since: dict[int, float] = {}  # when each of these could

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        verdict = self.fits(builder, seq)
        if verdict is not Verdict.ADMIT or not has_prompt(seq):
            return verdict
        view = builder.view
        if behind(view, 2):
            k = builder.n_ending
            if behind(view, k) and not behind(view, k + 1):
                return Verdict.STOP
        if any(map(has_prompt, builder.admitted)):
            return verdict
        now = view.now
        waiting = view.waiting.by(by_first_token)
        ready = (s for s in waiting if has_prompt(s) and not s.prefix.pending)
        these = [*islice(ready, builder.slots)]
        if n := sum(s.id not in self._since for s in these):
            every = min((now - self._came) / n, self._longest)
            self._every += (every - self._every) / 8
            self._came = now
        self._since = {s.id: self._since.get(s.id, now) for s in these}
        until = min(self._since.values()) + self.group_wait
        more = next(ready, None) is not None
        if self._waits(builder, these, until, more):
            builder.ask_again(until)
            free = len(view.waiting) <= builder.slots + len(builder.admitted)
            return Verdict.SKIP if free else Verdict.STOP
        return verdict

    @property
    def _longest(self) -> float:
        """Seconds between newcomers that are as good as for ever."""
        return 2 * self.group_wait

    def _waits(
        self, builder: PlanBuilder, these: Sequence[SequenceView], until: float, more: bool
    ) -> bool:
        """Whether these, which could join now, wait for the next one. more: it has come, and waits
        for a slot."""
        view, cost, limits, k = builder.view, builder.view.cost, builder.view.limits, len(these)
        decoding = len(view.decoding)
        wait = self._every
        if not more:
            wait = max(wait, view.now - max(seq.arrival for seq in these))
        if view.now + wait >= until or not decoding or len(view.prefilling) or not measured(cost):
            return False
        most = builder.rows
        if not limits.unified:
            if not behind(view, k + 1):
                return False
            most = min(most, limits.rows_together)
        rows = max(seq.remaining for seq in these)
        if (k + 1) * rows > most:
            return False
        kv = view.kv.attended

        def step(k: int) -> float:
            return cost.predict(decoding + k * rows, k * rows, kv, decoding + k)

        alone = cost.predict(decoding, 0, kv, decoding)
        gain = (step(k) - alone) / k - (step(k + 1) - alone) / (k + 1)
        if SAVED * (decoding + k + 1) * gain <= wait:
            return False
        due = min(min(first_token_due(seq), seq.deadline or inf) for seq in these)
        return due == inf or due - view.now > 2 * step(k + 1)


def has_prompt(seq: SequenceView) -> bool:
    """Not only its last token, which a newcomer whose prompt is cached computes as those that
    decode do."""
    return seq.remaining > 1


def behind(view: StepView, k: int) -> bool:
    """Whether k prompts are computed together, behind those that decode."""
    limits, cost = view.limits, view.cost
    if cost is None or not limits.fills or k > MOST:
        return False
    return comes_behind(limits, cost, k, len(view.decoding))
