"""First come, first served, continuously: sequences join and leave the batch at every step, and a
step computes whole prompts beside the rows of those that decode. Follows Orca (Yu et al., OSDI
2022), whose iteration-level scheduling and selective batching this is; a prompt of more rows than a
step can have is cut.

A plan repeats while everybody decodes and nobody can be admitted."""

from __future__ import annotations

from ..policy import ComposedPolicy
from .parts import ALWAYS, FirstCome, NewestFirst, WhatIsLeft, WhenItFits, WholeBatch


def fcfs(*, watermark: float = 0.01) -> ComposedPolicy:
    """`watermark`: see `WhenItFits`."""
    return ComposedPolicy(
        order=FirstCome(),
        admit=WhenItFits(watermark),
        budget=WholeBatch(),
        chunk=WhatIsLeft(),
        victim=NewestFirst(),
        repeat=ALWAYS,
    )
