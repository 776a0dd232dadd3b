"""Narrower rounds, where k of them are faster than one wide batch: a kernel that serves few rows
ends at some width (8 on CUDA and on Metal's older builds, see `cost/kernels.py`), and a batch of
one row more takes so much longer that rounds of the narrow width give more tokens in a second. Of n
sequences that decode, w have a row at a step, in rotation: round robin (as Kleinrock's processor
sharing, 1967, in quanta of `hold` steps), so that all get the same share.

Where every sequence has a stream of cells of its own (`Limits.unified` is False) only sequences in
consecutive slots share a ubatch. There a round is a window of slots, and windows do not overlap:
of 9 sequences 5 and 4, never 8 and 1 and 7 and so on."""

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import replace
from math import ceil, gcd, inf
from typing import NamedTuple, TypeGuard

from pyllamabatch.cost.step_cost import StepCost

from ...errors import ArgumentError
from ..policy import PlanBuilder, Round
from ..view import StepView
from .composed import ComposedPolicy
from .rotation import Queue, Rotation, Windows
from .sarathi import sarathi

ROUNDS = 4  # at most: each adds to the wait
MANY = 32
REVIEW = 512  # steps after which a choice is made again, as the cells fill; sooner in new turns
TRIAL = 12  # steps of all before the first turns of so many
RENEW = 8192  # steps after which these are old
LOSS = 0.01  # share of the time that switches take, if the targets allow it
LOSS_MOST = 0.06  # that they may take
GAIN = 0.04  # that turns must win, unless told otherwise
PATIENCE = 0.1  # so much more must be won where one waits as long as the targets allow
PROBE = 32  # steps of a round while it is not known what a switch costs


class Split(NamedTuple):
    """`width` rows at a step, the same ones for `hold` steps. `gain`: predicted tokens per second
    over those of all at once. `lasting`: tokens of each until the graph of these rows, which is
    another one, has paid."""

    width: int
    hold: int
    gain: float
    lasting: int = 0


class Turns:
    """All who decode have a row at every step, unless the cost model says that fewer at a time, in
    turns, give more tokens in a second: at least `gain` more, and twice the model's own median
    error. The longest time between two tokens of a sequence that this makes stays within its ITL
    target (`itl` where it has none), or below that of the wide batch. Where it is longer than that
    more must be won, up to a tenth more at the target.

    A change of who decodes costs `CostModel.switch` seconds (a new graph, where the device samples
    for each row); a round is held until that is 1% of the time, or as long as the targets allow,
    and where it would be more than 6% there are no turns.
    Turns begin when the same ones have decoded for as long as a round is held: where others come
    and go sooner, a switch would not pay. The first narrow step needs a graph of its own
    (`CostModel.new_graph`): so they begin only where the same ones usually decode together for so
    long that it pays, or have done so already. And a round of more than one step is so short that
    all have sat out once before the first may be at its end (`max_tokens`): else some are left
    behind, and decode in a narrow batch.

    Before the first turns of n sequences all of them have decoded for `TRIAL` steps at least, and
    the choice is made again by what an engine has learned from these (`CostModel.observe`): once
    turns are taken the wide step is made no more, and nothing would show that the profile is wrong
    about it. After `RENEW` steps that is old, and they do so again. One object serves one engine:
    it keeps whose turn it is."""

    __slots__ = (
        *("_answer", "_had", "_known", "_lasted", "_renew", "_review", "_rotation"),
        *("_split", "_tried", "_turning", "_until", "gain", "itl"),
    )

    def __init__(self, itl: float = 0.1, gain: float = GAIN) -> None:
        if not itl > 0:
            raise ArgumentError("itl", itl, "more than 0 seconds")
        if not 0 <= gain < inf:
            raise ArgumentError("gain", gain, "at least 0")
        self.itl, self.gain = itl, gain
        self._known: Set[int] = set()  # ids that decode
        self._had = 0.0  # tokens of each since then
        self._lasted = 0.0  # of those before, on average
        self._rotation: Rotation | None = None
        self._split: Split | None = None
        self._turning = False  # turns are taken, and the graph of these rows is there
        self._until: int | None = None  # the step before which the same ones go; None: all do
        self._review = 0
        self._tried: Counter[int] = Counter()  # steps of all n sequences that decoded
        self._renew = RENEW
        self._answer = 0, 0, 0  # the last one: at which step, for how many, how many have a row

    def __call__(self, builder: PlanBuilder) -> Round:
        view, step, n = builder.view, builder.view.step, len(builder.view.decoding)
        kind = Queue if view.limits.unified else Windows
        rotation = self._rotation
        if not isinstance(rotation, kind):
            rotation = self._rotation = kind()
        others = view.decoding != self._known
        self._count(step, others)
        if self._until is not None and (others or step >= self._until):
            assert self._split is not None
            rotation.turn(self._split.width)
            self._until = None
        if others:
            if self._known:
                self._lasted += (self._had - self._lasted) / 4
            self._known, self._had, self._turning = set(view.decoding), 0.0, False
        if others or step >= self._review:
            self._split = best_split(view, self.itl, self.gain, begun=self._turning)
            self._review = step + REVIEW
            if self._split is None:
                self._until = None
            else:
                rotation.follow(view)
            if step >= self._renew:
                self._tried.clear()
                self._renew = step + RENEW
        split = self._split
        wait = self._review - step if split is None else self._wait(split, n)
        if split is None or wait > 0:
            # A choice that is to be carried out is made again by what these steps have told.
            self._review, self._turning = min(self._review, step + wait), False
            self._answer = step, self._review - step, n
            return Round(frozenset(), self._review - step)
        if self._until is None:
            self._until = step + split.hold
        self._turning = True
        self._review = min(self._review, step + max(TRIAL, int(self._had)))
        self._answer = step, min(self._until, self._review) - step, split.width
        return Round(rotation.out(split.width), self._answer[1])

    def _count(self, step: int, others: bool) -> None:
        """The steps since the last answer. Where one has come, some may have had rows of its
        prompt: only the first one is known to be of these rows alone."""
        at, steps, rows = self._answer
        n, passed = len(self._known), min(step - at, steps)
        if n:
            self._had += passed * rows / n
        if rows == n:
            self._tried[n] += min(passed, 1) if others else passed
        self._answer = step, 0, 0

    def _wait(self, split: Split, n: int) -> int:
        """For how many steps all decode yet."""
        if self._turning and self._tried[n] >= TRIAL:
            return 0
        need = split.hold - 1
        if self._lasted < split.lasting:
            need = max(need, split.lasting)
        if self._had < need:
            return ceil(need - self._had)
        return int(self._tried[n] < TRIAL)  # by itself: if it is disturbed it counts as one


def best_split(view: StepView, itl: float, gain: float, *, begun: bool = False) -> Split | None:
    """How to take turns; None where all at once is as good, or nothing was measured. begun: the
    graph of narrow steps is there. Rows that fill gaps between slots are not reckoned with."""
    cost, n = view.cost, len(view.decoding)
    if n < 2 or not measured(cost):
        return None
    kv = view.kv.attended
    wide: float = cost.predict(n, 0, kv, n)
    least = least_gain(cost, gain)
    unified, rounds_of = view.limits.unified, {}
    for width in widths(n, cost, unified):
        steps = times(cost, n, width, kv, unified)
        if min(steps) > 0 and wide >= least * all_once(steps, n, width, unified):
            rounds_of[width] = steps
    if not rounds_of:  # not even if switches were free
        return None
    targets = view.running.itl_targets()
    most = max(wide, min(targets[0], itl) if targets[-1] == inf else targets[0])
    known: float | None = cost.switch
    switch = known or 0.0
    left = tokens_left(view)
    entry: float = 0.0 if begun else sum(cost.new_graph)
    best, found = 0.0, None
    for width, steps in rounds_of.items():
        mean, k = sum(steps) / len(steps), len(steps)
        share = all_once(steps, n, width, unified)
        wanted = PROBE if known is None else max(1, ceil(switch / (LOSS * mean)))
        # Rounds until all have had the same.
        cycle = n // gcd(n, width) if unified else k
        wanted = min(wanted, max(1, left // cycle))
        # A wait: the others' rounds, and one's own first step.
        rounds, least_wait = sum(steps) - min(steps), min(steps) + k * switch
        longest = min(wanted, int((most - least_wait) / rounds))
        holds = {longest}
        if known is not None:
            # A short round would tell at every step what one long round can.
            holds |= {1, min(longest, int((wide - least_wait) / rounds))}
        for hold in holds:
            if hold < 1 or hold > longest:
                continue
            each = share * (1 + switch / (hold * mean))
            won = wide / each
            need = needed(least_wait + hold * rounds, wide, most)
            if won <= 1 or won < least or won / need <= best or switch > LOSS_MOST * hold * mean:
                continue
            lasting = ceil(entry / (wide - each)) if entry else 0
            if lasting <= left:
                best, found = won / need, Split(width, hold, won, lasting)
    return found


def least_gain(cost: StepCost, gain: float) -> float:
    """Times as much as before, from which it pays: `gain` more, and twice the median error."""
    return 1 + max(gain, 2 * cost.error[0])


def needed(wait: float, wide: float, most: float) -> float:
    """The gain from which a wait pays that is longer than the wide step; `most`: the longest."""
    if wait <= wide:
        return 1.0
    return 1 + PATIENCE * (min(1.0, (wait - wide) / (most - wide)) if most > wide else 1.0)


def measured(cost: StepCost | None) -> TypeGuard[StepCost]:
    """There is a cost model, and it is more than a guess."""
    return cost is not None and cost.calibrated


def tokens_left(view: StepView) -> int:
    """That the first one to end may still get; of interactive sequences it is not known."""
    most = view.running.column("max_tokens")
    left = (most - view.running.column("generated"))[most > 1]
    return int(left.min()) if len(left) else 2**31


def times(cost: StepCost, n: int, width: int, kv: float, unified: bool) -> list[float]:
    """Seconds of a step of each of the rounds that one may have to wait for, its own included."""
    if unified:  # cells of those who sit out are looked over, too
        return [cost.predict(width, 0, kv, n)] * -(-n // width)
    k, rest = divmod(n, width)
    steps = [cost.predict(width, 0, kv * width / n, width)] * k
    return [*steps, cost.predict(rest, 0, kv * rest / n, rest)] if rest else steps


def all_once(steps: list[float], n: int, width: int, unified: bool) -> float:
    """Seconds for a token of each of `n` sequences, by the `times` of their rounds."""
    return sum(steps) / len(steps) * n / width if unified else sum(steps)


def widths(n: int, cost: StepCost, unified: bool) -> Iterable[int]:
    """Those worth a try: of many, a kernel's edges and rounds of about the same size; where windows
    may not overlap only these."""
    few = -(-n // ROUNDS)
    even = {-(-n // k) for k in range(2, ROUNDS + 1)}
    if not unified:
        return sorted(even)
    if n <= MANY:
        return range(few, n)
    return sorted({*even, *(edge for edge in cost.edges if few <= edge < n)})


def width(
    *,
    budget: int | None = None,
    itl: float = 0.1,
    stretch: float = 2.0,
    gain: float = GAIN,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`gain`: see `Turns`. Otherwise as `sarathi`; `itl`: where there is no target."""
    plain = sarathi(budget=budget, itl=itl, stretch=stretch, watermark=watermark)
    return replace(plain, width=Turns(itl, gain))
