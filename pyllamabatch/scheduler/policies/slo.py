"""By service level: the largest prompt chunk whose predicted step keeps the ITL target of all
that decode (the idea of Sarathi-Serve's budget, OSDI 2024, found anew at each step by a cost model
of the device), and the earliest deadline first (Liu and Layland, 1973).

A plan repeats while all decode and none can be admitted: prompts always have some rows, so no
target holds one back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import merge
from math import inf

from ...errors import ArgumentError
from ..view import SequenceView, StepView
from .composed import ComposedPolicy
from .parts import ALWAYS, LastRanked, TokenBudget, WhenItFits, WithinTarget


@dataclass(frozen=True, slots=True)
class Deadline:
    """The rank of a sequence: priority, then its deadline; without one it is due `ttft` seconds
    after its arrival, or at no time."""

    ttft: float = inf

    def __call__(self, seq: SequenceView) -> tuple[int, float, float]:
        due = seq.arrival + self.ttft if seq.deadline is None else seq.deadline
        return -seq.priority, due, seq.arrival


@dataclass(frozen=True, slots=True)
class EarliestDeadline:
    """Prompts already begun and newcomers in one order."""

    rank: Deadline = Deadline()

    def __call__(self, view: StepView) -> Iterable[SequenceView]:
        if not view.can_admit:
            return view.prefilling.by(self.rank)
        waiting = view.waiting.by(self.rank)
        if not len(view.prefilling):
            return waiting
        return merge(view.prefilling.by(self.rank), waiting, key=self.rank)


def slo(
    *,
    itl: float = inf,
    ttft: float = inf,
    least: int = 16,
    margin: float = 1.0,
    budget: int | None = None,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`itl`: seconds between two tokens at most, where a sequence has no target of its own. `ttft`:
    seconds from arrival to deadline, where it has no deadline. `least`: rows of a step that prompts
    get in any case. `margin`: the share of a target that a predicted step may take, below 1 because
    a prediction errs and a step is not all that a reader waits for. `budget`: rows of a step where
    nothing can be predicted (default: see `TokenBudget`). `watermark`: see `WhenItFits`."""
    for name, seconds in (("itl", itl), ("ttft", ttft)):
        if not seconds > 0:
            raise ArgumentError(name, seconds, "more than 0 seconds")
    rank = Deadline(ttft)
    return ComposedPolicy(
        order=EarliestDeadline(rank),
        admit=WhenItFits(watermark),
        budget=WithinTarget(TokenBudget(budget), itl, 1.0, least, margin),
        victim=LastRanked(rank),
        repeat=ALWAYS,
    )
