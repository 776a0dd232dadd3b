"""The default: as many tokens a second as the device gives, first tokens soon, no long stall.

Prompts are computed as soon as they come, whole: the sooner they are, the more sequences decode
together. A step takes no longer than `stall` seconds for that, or than the ITL target of a request
that has one, by the cost model. And sequences decode in turns where several narrow steps are faster
than a wide one (`width`)."""

from __future__ import annotations

from .composed import ComposedPolicy
from .parts import ALWAYS, STALL_SECONDS, TokenBudget, WhenItFits, WithinTarget
from .width import Turns


def device_aware(
    *, stall: float = STALL_SECONDS, gain: float = 0.04, watermark: float = 0.01
) -> ComposedPolicy:
    """`stall`: seconds that a step may take for prompts while sequences without an ITL target
    decode. `gain`: see `Turns`. `watermark`: see `WhenItFits`."""
    return ComposedPolicy(
        admit=WhenItFits(watermark),
        budget=WithinTarget(TokenBudget(), stall),
        repeat=ALWAYS,
        width=Turns(gain=gain),
    )
