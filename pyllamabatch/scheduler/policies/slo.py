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
from ..policy import Budget
from ..view import SequenceView, StepView
from .composed import ComposedPolicy
from .parts import ALWAYS, LastRanked, TokenBudget, WhenItFits, most_within


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


@dataclass(frozen=True, slots=True)
class WithinTarget:
    """Rows of a step: those that decode, and as many of prompts as keep its predicted time within
    `margin` times the smallest ITL target of the running sequences (`itl` for those without one),
    but `least` at the least. `otherwise`: where there is no cost model, or no target."""

    otherwise: Budget
    itl: float = inf
    least: int = 16
    margin: float = 1.0

    def __call__(self, view: StepView) -> int:
        n, most = len(view.decoding), view.limits.n_batch
        if n == 0 or not (len(view.prefilling) or view.can_admit):
            return most
        targets = view.running.column("itl_target")
        target = float(targets.min())
        if self.itl < target and targets.max() == inf:
            target = self.itl
        if view.cost is None or target == inf:
            return self.otherwise(view)
        return n + most_within(view, self.margin * target, self.least)


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
    if least < 1:
        raise ArgumentError("least", least, "at least 1 row")
    if not 0 < margin <= 1:
        raise ArgumentError("margin", margin, "above 0, at most 1")
    rank = Deadline(ttft)
    return ComposedPolicy(
        order=EarliestDeadline(rank),
        admit=WhenItFits(watermark),
        budget=WithinTarget(TokenBudget(budget), itl, least, margin),
        victim=LastRanked(rank),
        repeat=ALWAYS,
    )
