"""Prefill first: while a prompt can be computed no sequence decodes, as in the first default of
vLLM (Kwon et al., SOSP 2023; before it learned to chunk prompts). The time to the first token is
short, and those that decode wait for every prompt that comes.

A plan repeats while all decode and none can be admitted."""

from dataclasses import replace

from ..policy import Mix
from .composed import ComposedPolicy
from .fcfs import fcfs


def prefill_first(*, watermark: float = 0.01) -> ComposedPolicy:
    """`watermark`: see `WhenItFits`."""
    return replace(fcfs(watermark=watermark), mix=Mix.PROMPTS)
