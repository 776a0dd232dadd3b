"""The default: as many tokens a second as the device gives, first tokens soon, no long stall.

Prompts are computed as soon as they come: the sooner they are, the more sequences decode together.
Those with a `ttft_target` go before the others, the soonest due first, and nothing is computed
beside them that would make them late. A step takes no longer than `stall` seconds for that, or than
the ITL target of a request that has one, by the cost model. And sequences decode in turns where
several narrow steps are faster than a wide one (`width`)."""

from __future__ import annotations

from dataclasses import dataclass

from ..view import StepView
from .composed import ComposedPolicy
from .parts import (
    ALWAYS,
    STALL_SECONDS,
    TokenBudget,
    UntilDue,
    WhenItFits,
    WithinTarget,
    soonest_due,
)
from .speculate import ByGain
from .width import Turns


@dataclass(frozen=True, slots=True)
class PromptsSoon:
    """Rows of a step: as `within`; in a pool also no more than its `otherwise`. There rows that
    decode cost next to nothing beside those of a prompt, so the more steps a prompt takes, the more
    of them it carries. In streams the two never share a ubatch."""

    within: WithinTarget

    def __call__(self, view: StepView) -> int:
        rows = self.within(view)
        if not view.limits.unified or not len(view.decoding):
            return rows
        return min(rows, self.within.otherwise(view))


def device_aware(
    *,
    stall: float = STALL_SECONDS,
    itl: float = 0.1,
    gain: float = 0.04,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`stall`: seconds that a step may take for prompts while sequences without an ITL target
    decode. `itl`, `gain`: see `Turns`. `watermark`: see `WhenItFits`."""
    return ComposedPolicy(
        order=soonest_due,
        admit=WhenItFits(watermark),
        budget=UntilDue(PromptsSoon(WithinTarget(TokenBudget(), stall))),
        repeat=ALWAYS,
        width=Turns(itl, gain),
        speculate=ByGain(),
    )
