"""Chunked prefill, decodes first: whoever decodes gets its row at every step, and prompts fill the
rest of a token budget in chunks, so that no prompt holds anybody up for longer than such a step.
Follows Sarathi-Serve (Agrawal et al., OSDI 2024).

A plan repeats while everybody decodes and nobody can be admitted."""

from __future__ import annotations

from ..policy import ComposedPolicy
from .parts import ALWAYS, FirstCome, NewestFirst, TokenBudget, WhatIsLeft, WhenItFits


def sarathi(*, budget: int | None = None, watermark: float = 0.01) -> ComposedPolicy:
    """`budget`: rows of a step while somebody decodes (default: see `TokenBudget`). `watermark`:
    see `WhenItFits`."""
    return ComposedPolicy(
        order=FirstCome(),
        admit=WhenItFits(watermark),
        budget=TokenBudget(budget),
        chunk=WhatIsLeft(),
        victim=NewestFirst(),
        repeat=ALWAYS,
    )
