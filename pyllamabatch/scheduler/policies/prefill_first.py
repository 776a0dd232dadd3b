"""Prefill first: while a prompt can be computed nobody decodes, as in the first default of vLLM
(Kwon et al., SOSP 2023; before it learned to chunk prompts). The time to the first token is
short, and whoever decodes waits for every prompt that comes.

A plan repeats while everybody decodes and nobody can be admitted."""

from __future__ import annotations

from ..policy import ComposedPolicy, Decodes
from .parts import ALWAYS, FirstCome, NewestFirst, WhatIsLeft, WhenItFits, WholeBatch


def prefill_first(*, watermark: float = 0.01) -> ComposedPolicy:
    """`watermark`: see `WhenItFits`."""
    return ComposedPolicy(
        order=FirstCome(Decodes.APART),
        admit=WhenItFits(watermark),
        budget=WholeBatch(),
        chunk=WhatIsLeft(),
        victim=NewestFirst(),
        repeat=ALWAYS,
    )
