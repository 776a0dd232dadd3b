"""What the device is good at, by its cost model: `sarathi` with as many rows of prompts at a step
as are cheap there (`tile_fill`), and narrower rounds where they are faster (`width`). Without a
cost model this is `sarathi`. The default."""

from __future__ import annotations

from dataclasses import replace

from .composed import ComposedPolicy
from .tile_fill import tile_fill
from .width import Turns


def device_aware(
    *,
    itl: float = 0.1,
    stretch: float = 2.0,
    gain: float = 0.04,
    reserve: int = 0,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """Options: see `sarathi`, `tile_fill` and `width`."""
    filled = tile_fill(itl=itl, stretch=stretch, reserve=reserve, watermark=watermark)
    return replace(filled, width=Turns(itl, gain))
