"""By service level: the largest prompt chunk whose predicted step keeps the ITL target of all
that decode (the idea of Sarathi-Serve's budget, OSDI 2024, found anew at each step by a cost model
of the device), and the earliest deadline first (Liu and Layland, 1973).

A plan repeats while all decode and none can be admitted: prompts always have some rows, so no
target holds one back."""

from dataclasses import dataclass
from math import inf

from ...errors import ArgumentError
from ..view import SequenceView
from .composed import ComposedPolicy
from .parts import ALWAYS, LastRanked, MostUrgent, TokenBudget, UntilDue, WhenItFits, WithinTarget


@dataclass(frozen=True, slots=True)
class Deadline:
    """The rank of a sequence: priority, then its deadline, or when its first token is due, if that
    is sooner; without a deadline it is due `ttft` seconds after its arrival, or at no time."""

    ttft: float = inf

    def __call__(self, seq: SequenceView) -> tuple[int, float, float]:
        due = seq.arrival + self.ttft if seq.deadline is None else seq.deadline
        if seq.ttft_target is not None and not seq.generated:
            due = min(due, seq.arrival + seq.ttft_target)
        return -seq.priority, due, seq.arrival


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
        order=MostUrgent(rank),
        admit=WhenItFits(watermark),
        budget=UntilDue(WithinTarget(TokenBudget(budget), itl, 1.0, least, margin)),
        victim=LastRanked(rank),
        repeat=ALWAYS,
    )
