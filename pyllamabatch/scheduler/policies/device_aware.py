"""The default: as many tokens a second as the device gives, first tokens soon, no long stall.

Prompts are computed as soon as they come: the sooner they are, the more sequences decode together;
but a moment later and several at once where that costs less (`newcomers`).
The one whose first token is due soonest goes first, as if each without a `ttft_target` were due ten
seconds after its arrival, and nothing is computed beside one with a target that would make it late.
A step takes no longer than `stall` seconds for that, or than the ITL target of a request that has
one, by the cost model. And sequences decode in turns where several narrow steps are faster than a
wide one (`width`)."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from math import isinf

from pyllamabatch.cost.step_cost import StepCost

from ..padding import comes_behind
from ..policy import Mix, PlanBuilder
from ..view import StepView
from .composed import ComposedPolicy
from .newcomers import GROUP_WAIT_SECONDS, InGroups
from .parts import (
    ALWAYS,
    STALL_SECONDS,
    TokenBudget,
    UntilDue,
    WhenItFits,
    WithinTarget,
    beside_decodes,
    half_for_targets,
    next_due,
    soonest_due,
)
from .speculate import ByGain
from .width import GAIN, Turns, least_gain, measured


@dataclass(frozen=True, slots=True)
class PromptsSoon:
    """Rows of a step: as `within`; in a pool also no more than its `otherwise`. There rows that
    decode cost next to nothing beside those of a prompt, so the more steps a prompt takes, the more
    of them it carries. In streams the two never share a ubatch.

    A CPU's kernels for many rows make those that decode beside a prompt dear: each looks at the
    cells of all. Where that was measured, a prompt advances by fewer rows in a step, if each then
    costs less by `gain` at least, and twice the model's own median error (`cheapest`)."""

    within: WithinTarget
    gain: float = GAIN

    def __call__(self, view: StepView) -> int:
        rows, n = self.within(view), len(view.decoding)
        if not view.limits.unified or n == 0:
            return rows
        rows = min(rows, self.within.otherwise(view))
        cost, least = view.cost, self.within.least
        if rows - n <= least or not measured(cost) or not cost.layout_measured:
            return rows
        first, due = next_due(view)
        if first is None or not isinf(due):  # that one is not to be late
            return rows
        return n + cheapest(view, cost, rows - n, least, least_gain(cost, self.gain))


def cheapest(view: StepView, cost: StepCost, most: int, least: int, gain: float) -> int:
    """Rows of prompts beside all that decode, from `least` to `most`: the most that cost no more
    than `gain` times the cheapest, for each.

    What a step's prompts cost is the time that it takes longer for them, and what it would take
    less if all that have their prompts yet to compute decoded already: the more rows, the fewer
    steps without them."""
    n, kv, predict = len(view.decoding), view.kv.attended, cost.predict
    alone = predict(n, 0, kv, n)
    free = view.limits.n_seq_max - len(view.running)
    wide = n + len(view.prefilling) + min(free, len(view.waiting))
    missed = max(0.0, wide / n * alone - predict(wide, 0, wide / n * kv, wide))
    together = beside_decodes(view, cost)
    price = {
        rows: (together(rows) - alone + missed) / rows
        for rows in halves(most, least, n, cost.edges)
    }
    low = min(price.values())
    return max(rows for rows in price if price[rows] <= max(low, gain * low))


def halves(most: int, least: int, n: int, edges: tuple[int, ...]) -> Iterator[int]:
    """`most`, and again and again about half of it, so that with `n` others a kernel is full."""
    while most >= least:
        yield most
        edge = bisect_left(edges, n + most / 2)
        most = edges[edge - 1] - n if edge else 0


class Alternately:
    """In streams prompts have a step of their own, and those that decode have the next one. The two
    would share no ubatch: what is computed beside a prompt only makes its first token late. Where
    prompts are computed behind those that decode (`comes_behind`), and in a pool, they have steps
    together. One object serves one engine."""

    __slots__ = ("_prompts",)

    def __init__(self) -> None:
        self._prompts = False  # the step before was theirs

    def __call__(self, builder: PlanBuilder) -> Mix:
        view, cost = builder.view, builder.view.cost
        before, self._prompts = self._prompts, False
        prompts = builder.prompts()
        if view.limits.unified or cost is None or not prompts:
            return Mix.BOTH
        if before:
            return Mix.DECODES
        n_others = builder.n_rows - sum(n for _, n in prompts)
        if not n_others or comes_behind(view.limits, cost, builder.n_ending, n_others):
            return Mix.BOTH
        self._prompts = True
        return Mix.PROMPTS


def device_aware(
    *,
    stall: float = STALL_SECONDS,
    itl: float = 0.1,
    gain: float = 0.04,
    watermark: float = 0.01,
    group_wait: float = GROUP_WAIT_SECONDS,
) -> ComposedPolicy:
    """`stall`: seconds that a step may take for prompts while sequences without an ITL target
    decode. `itl`: see `Turns`. `gain`: see `Turns` and `PromptsSoon`. `watermark`: see
    `WhenItFits`. `group_wait`: see `InGroups`."""
    return ComposedPolicy(
        order=soonest_due,
        admit=InGroups(WhenItFits(watermark), group_wait),
        budget=UntilDue(PromptsSoon(WithinTarget(TokenBudget(), stall), gain)),
        chunk=half_for_targets,
        mix=Alternately(),
        repeat=ALWAYS,
        width=Turns(itl, gain),
        speculate=ByGain(),
    )
