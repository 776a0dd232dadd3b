"""First come, first served, continuously: sequences join and leave the batch at every step, and a
step computes whole prompts beside the rows of those that decode. Follows Orca (Yu et al., OSDI
2022), whose iteration-level scheduling and selective batching this is; a prompt of more rows than a
step can have is cut.

A plan repeats while all decode and none can be admitted."""

from .composed import ComposedPolicy
from .parts import ALWAYS, WhenItFits, whole_batch


def fcfs(*, watermark: float = 0.01) -> ComposedPolicy:
    """`watermark`: see `WhenItFits`."""
    return ComposedPolicy(admit=WhenItFits(watermark), budget=whole_batch, repeat=ALWAYS)
