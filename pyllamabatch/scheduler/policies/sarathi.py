"""Chunked prefill, decodes first: a sequence that decodes gets its row at every step, and prompts
fill the rest of a budget in chunks, so that no prompt holds the others up for longer than such a
step. Follows Sarathi-Serve (Agrawal et al., OSDI 2024), whose budget is a number of tokens that is
profiled for each device; here it is found anew at each step, by the cost model.

A plan repeats while all decode and none can be admitted."""

from .composed import ComposedPolicy
from .parts import ALWAYS, TokenBudget, WhenItFits, WithinTarget


def sarathi(
    *,
    budget: int | None = None,
    itl: float = 0.1,
    stretch: float = 2.0,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`budget`: rows of a step while sequences decode, whatever they take. Without it a step may
    take `itl` seconds, or `stretch` times what the decoding rows take alone if that is longer (and
    without a cost model have the rows that `TokenBudget` says). `watermark`: see `WhenItFits`."""
    within = WithinTarget(TokenBudget(), itl, stretch)
    return ComposedPolicy(
        admit=WhenItFits(watermark),
        budget=within if budget is None else TokenBudget(budget),
        repeat=ALWAYS,
    )
