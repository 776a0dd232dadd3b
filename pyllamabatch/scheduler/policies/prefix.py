"""Longest shared prefix first: of those who wait, whoever has most of its prompt in the cache
already (`SequenceView.prefix_hit`), so that cached prefixes are used before they are evicted.
Follows the cache-aware scheduling of SGLang (Zheng et al., NeurIPS 2024), with a bound on waiting.

Nobody waits for ever: who has waited for `patience` steps goes first. A plan repeats while
everybody decodes, until the next one has waited that long."""

from __future__ import annotations

from ..policy import ComposedPolicy
from ..view import SequenceView
from .parts import (
    Aged,
    NewestFirst,
    Ranked,
    TokenBudget,
    UntilAged,
    WhatIsLeft,
    WhenItFits,
    by_priority,
)


def longest_hit(seq: SequenceView) -> tuple[int, int]:
    return by_priority(seq), -seq.prefix_hit


def prefix(
    *, patience: int = 2000, budget: int | None = None, watermark: float = 0.01
) -> ComposedPolicy:
    """`patience`: steps. `budget`, `watermark`: as in `sarathi`."""
    return ComposedPolicy(
        order=Aged(Ranked(longest_hit), patience),
        admit=WhenItFits(watermark),
        budget=TokenBudget(budget),
        chunk=WhatIsLeft(),
        victim=NewestFirst(),
        repeat=UntilAged(patience),
    )
