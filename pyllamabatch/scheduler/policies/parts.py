"""Parts that several policies share: put them together, or replace one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import merge
from itertools import chain, takewhile
from math import inf, isinf
from typing import Any

from pyllamabatch.cost.step_cost import StepCost

from ...errors import ArgumentError
from ..policy import Budget, Order, PlanBuilder, Verdict
from ..queue import itl_target
from ..view import SequenceView, StepView

# A sequence that was not admitted is not admitted later either, unless another one leaves: decoding
# takes cells. So a steady plan stands for as long as no sequence comes or goes.
ALWAYS = 2**31

# -- order


def by_priority(seq: SequenceView) -> int:
    return -seq.priority


def by_queued(seq: SequenceView) -> int:
    return seq.queued


@dataclass(frozen=True, slots=True)
class Ranked:
    """Prompts already begun, then the waiting queue, the smallest `rank(sequence)` first. What a
    rank may look at: see `SequenceList`."""

    rank: Callable[[SequenceView], object]

    def __call__(self, view: StepView) -> Iterable[SequenceView]:
        if not view.can_admit:
            return view.prefilling
        return chain(view.prefilling, view.waiting.by(self.rank))


first_come = Ranked(by_priority)  # and among equals as they came


def first_token_due(seq: SequenceView) -> float:
    """On the scheduler's clock: at once for one that was preempted after its first token; infinity
    without a `ttft_target`, and for an interactive sequence."""
    if seq.goal is not None:
        return inf
    if seq.generated:
        return -inf
    return inf if seq.ttft_target is None else seq.arrival + seq.ttft_target


def has_ttft_target(seq: SequenceView) -> bool:
    return seq.ttft_target is not None


# In the order of those that are due, a sequence without a target has this one, and none has a later
# one: so long attention is held (Nielsen, 1993). So no flood of targets overtakes it for ever.
PATIENT_SECONDS = 10.0


def by_first_token(seq: SequenceView) -> tuple[int, float]:
    return -seq.priority, min(first_token_due(seq), seq.arrival + PATIENT_SECONDS)


@dataclass(frozen=True, slots=True)
class MostUrgent:
    """Prompts already begun and the waiting queue in one order, the smallest `rank(sequence)`
    first; among equals prompts already begun. What a rank may look at: see `SequenceList`."""

    rank: Callable[[SequenceView], Any]

    def __call__(self, view: StepView) -> Iterable[SequenceView]:
        if not view.can_admit:
            return view.prefilling.by(self.rank)
        waiting = view.waiting.by(self.rank)
        if not len(view.prefilling):
            return waiting
        return merge(view.prefilling.by(self.rank), waiting, key=self.rank)


soonest_due = MostUrgent(by_first_token)  # and among equals as they came


def lacks_cells(view: StepView, seq: SequenceView) -> bool:
    """It waits, and what it has to compute does not fit."""
    room = view.kv.free - view.kv.promised
    return not seq.running and seq.prefix.cells + seq.remaining > room


def next_due(view: StepView) -> tuple[SequenceView | None, float]:
    """The first of these that can go on now, and `first_token_due` of it: not one whose prefix is
    being computed; and with no cells for the first that waits, one that runs."""
    first = next((seq for seq in soonest_due(view) if not seq.prefix.pending), None)
    if first is not None and lacks_cells(view, first):
        first = next(iter(view.prefilling.by(by_first_token)), None)
    return first, inf if first is None else first_token_due(first)


@dataclass(frozen=True, slots=True)
class Aged:
    """As `order`, but a sequence that has waited for `steps` steps goes before all others that
    wait: so none waits for ever."""

    order: Order
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ArgumentError("patience", self.steps, "at least 1 step")

    def __call__(self, view: StepView) -> Iterable[SequenceView]:
        if not len(view.waiting):
            return self.order(view)
        return chain(view.prefilling, aged(view, self.steps), self.order(view))


@dataclass(frozen=True, slots=True)
class UntilAged:
    """The repeat of `Aged`: until the next one has waited for so long; with no slot to give,
    always."""

    steps: int

    def __call__(self, builder: PlanBuilder) -> int:
        return until_aged(builder.view, self.steps) if builder.view.can_admit else ALWAYS


def aged(view: StepView, steps: int) -> Iterable[SequenceView]:
    """The sequences that have waited for `steps` steps, the longest first."""
    last = view.step - steps
    return takewhile(lambda seq: seq.queued <= last, view.waiting.by(by_queued))


def until_aged(view: StepView, steps: int) -> int:
    """Steps until a sequence that has waited for `steps` is the first one. Where one is already,
    another one comes behind it: that changes nothing."""
    longest = next(iter(view.waiting.by(by_queued)), None)
    left = ALWAYS if longest is None else longest.queued + steps - view.step
    return left if left > 0 else ALWAYS


# -- admit


@dataclass(frozen=True, slots=True)
class WhenItFits:
    """Admit while there are cells for all that the newcomer and the running ones know,
    plus a reserve for what they will generate: the share `watermark` of the cache, at least one
    cell each. The first that does not fit stops the others, so that no long prompt starves."""

    watermark: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.watermark < 1:
            raise ArgumentError("watermark", self.watermark, "a share, from 0 to below 1")

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        n_running = builder.n_running
        if n_running == 0:
            return Verdict.ADMIT
        limits = builder.view.limits
        reserve = max(n_running + 1, int(self.watermark * limits.n_cells)) if limits.unified else 0
        spare = builder.cells - builder.promised - seq.prefix.cells - seq.remaining
        return Verdict.ADMIT if spare >= reserve else Verdict.STOP


when_it_fits = WhenItFits()

# -- budget


def has_first_token(seq: SequenceView) -> bool:
    """Its reader waits for the next token, be it preempted or not."""
    return seq.generated > 0


def whole_batch(view: StepView) -> int:
    return view.limits.n_batch


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Rows of a step: `n_batch` while no sequence decodes; else `mixed`, or by default as many
    whole ubatches as leave room for a prompt beside the decoding rows (one, normally). Where every
    sequence has a stream of cells of its own, rows of a prompt and decoding rows never share a
    ubatch (`Step.parts`): there it is an ubatch beside them."""

    mixed: int | None = None

    def __post_init__(self) -> None:
        if self.mixed is not None and self.mixed < 1:
            raise ArgumentError("budget", self.mixed, "at least 1 row")

    def __call__(self, view: StepView) -> int:
        n_decoding = len(view.decoding)
        if n_decoding == 0:
            return view.limits.n_batch
        if self.mixed is not None:
            return max(self.mixed, n_decoding)
        n_ubatch = view.limits.n_ubatch
        if not view.limits.unified:
            return n_decoding + n_ubatch
        return n_ubatch * (n_decoding // n_ubatch + 1)


token_budget = TokenBudget()

# Without a target of its own a reader waits so long for a token at most, while others' prompts are
# computed: a pause that is felt, and time for a whole ubatch on two cores of a CPU. With one second
# first tokens come a tenth later there, and no more than that is what a short stall is worth.
STALL_SECONDS = 2.0

# 32 rows of a prompt on a Mac take half a percent longer than 16, and the first 17 of them as much.
AS_LONG = 0.04


@dataclass(frozen=True, slots=True)
class WithinTarget:
    """Rows of a step: those that decode, and as many of prompts as keep its predicted time within a
    target; `least` rows of prompts in any case, and all that take as long (`most_within`).

    The target is `margin` times the smallest ITL target of the running sequences. Where none of
    them decodes it is that of those whose tokens are computed again after they were preempted;
    these have rows for all of them. For those without one it is `itl` seconds, or `stretch` times
    what the decoding rows take alone if that is longer. `otherwise`: where there is no cost model,
    or no target."""

    otherwise: Budget = token_budget
    itl: float = STALL_SECONDS
    stretch: float = 2.0
    least: int = 16
    margin: float = 1.0

    def __post_init__(self) -> None:
        if not self.itl > 0:
            raise ArgumentError("itl", self.itl, "more than 0 seconds")
        if not self.stretch >= 1:
            raise ArgumentError("stretch", self.stretch, "at least 1")
        if self.least < 1:
            raise ArgumentError("least", self.least, "at least 1 row")
        if not 0 < self.margin <= 1:
            raise ArgumentError("margin", self.margin, "above 0, at most 1")

    def __call__(self, view: StepView) -> int:
        n = len(view.decoding)
        if not (len(view.prefilling) or view.can_admit):
            return view.limits.n_batch
        if view.cost is None:
            return self.otherwise(view)
        targets, own = view.running.itl_targets(), n
        if n == 0:  # those whose tokens are computed again have readers, too
            preempted = view.waiting.split(has_first_token).get(True, ())
            again = [seq for seq in chain(view.prefilling, preempted) if has_first_token(seq)]
            if not again:
                return view.limits.n_batch
            targets = sorted(map(itl_target, again))
            own = min(sum(seq.remaining for seq in again), view.limits.n_batch)
        target = targets[0]
        if self.itl < target and targets[-1] == inf:
            alone = view.cost.predict(n, 0, view.kv.attended, n) if n else 0.0
            target = min(target, max(self.itl, self.stretch * alone))
        if target == inf:
            return max(own, self.otherwise(view))
        return max(own, n + most_within(view, self.margin * target, self.least))


@dataclass(frozen=True, slots=True)
class UntilDue:
    """Rows of a step: as `budget`, but no more beside the prompt whose first token is due next than
    the step has time for until then. Where that is late anyway it holds nothing up. margin: the
    share of that time that a predicted step may take."""

    budget: Budget
    margin: float = 0.8

    def __call__(self, view: StepView) -> int:
        rows, n = self.budget(view), len(view.decoding)
        if view.cost is None or not (len(view.prefilling) or view.can_admit):
            return rows
        first, due = next_due(view)
        if first is None or isinf(due) or first.remaining >= rows - n:
            return rows
        least, seconds = first.remaining, self.margin * (due - view.now)
        alone = beside_decodes(view, view.cost)(least)
        return min(rows, n + most_within(view, seconds, least)) if alone <= seconds else rows


def beside_decodes(view: StepView, cost: StepCost) -> Callable[[int], float]:
    """Seconds of a step in which so many rows of the next prompt are computed beside all who
    decode."""
    n, kv = len(view.decoding), view.kv.attended
    first = next(chain(view.prefilling, view.waiting), None)
    own, depth = kv / (n + 1), 0 if first is None else max(first.computed, first.prefix.hit)

    def predict(rows: int) -> float:
        return cost.predict(n + rows, rows, kv, n + 1) + cost.deeper(rows, own, depth)

    return predict


def most_within(view: StepView, seconds: float, least: int) -> int:
    """The most rows of a prompt that a step can have, beside all who decode, and be predicted to
    take no longer than `seconds`. Where `least` rows take longer, the most that take as long as
    these, but for the share `AS_LONG`: a kernel's tile may have more of them."""
    assert view.cost is not None
    predict = beside_decodes(view, view.cost)

    def excess(rows: int) -> float:
        return predict(rows) - seconds

    low, high = least, view.limits.n_batch - len(view.decoding)
    if low >= high:
        return low
    if (above := excess(high)) <= 0:
        return high
    if (below := excess(low)) > 0:
        more = below + AS_LONG * (below + seconds)
        seconds, below, above = seconds + more, below - more, above - more
        if above <= 0:
            return high
    straight = True
    while high - low > 1:  # low is within the target, high is not
        middle = (low + high) // 2
        if straight:  # where a straight line between them meets the target, every other time
            guess = low + int((high - low) * below / (below - above))
            middle = min(max(guess, low + 1), high - 1)
        straight = not straight
        if (value := excess(middle)) <= 0:
            low, below = middle, value
        else:
            high, above = middle, value
    return low


# -- chunk


def all_that_is_left(builder: PlanBuilder, seq: SequenceView) -> int:
    """As much of the prompt as the budget has left."""
    return builder.rows


def half_for_targets(builder: PlanBuilder, seq: SequenceView) -> int:
    """As much of the prompt as the budget has left; half of that where its first token has no
    target, and one that has a target, begun or with a slot to wait for, comes behind it."""
    if not isinf(first_token_due(seq)):
        return builder.rows
    view = builder.view
    waiting = view.waiting.split(has_ttft_target).get(True, ()) if builder.slots > 0 else ()
    behind = chain(filter(has_ttft_target, view.prefilling), waiting)
    if all(builder.has(one) or one.prefix.pending or lacks_cells(view, one) for one in behind):
        return builder.rows
    return max(1, builder.rows // 2)


# -- victim


@dataclass(frozen=True, slots=True)
class LastRanked:
    """The running sequence with the largest `rank(sequence)`, of equals the newest, is preempted
    for one before it; that one itself waits, and keeps its cells until another needs them. The rank
    may change only with the tokens that a sequence generates."""

    rank: Callable[[SequenceView], Any]

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> SequenceView | None:
        if not seq.running:
            return None
        rest = (one for one in reversed(builder.view.running) if one.id not in builder.preempt)
        last = max(rest, key=self.rank)  # the first of equals
        return None if last.id == seq.id else last


newest_first = LastRanked(by_priority)  # of the lowest priority
