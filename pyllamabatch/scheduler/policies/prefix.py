"""Longest shared prefix first: of those that wait, the one that has most of its prompt in the cache
already (`Prefix.hit`), so that cached prefixes are used before they are evicted. Follows the
cache-aware scheduling of SGLang (Zheng et al., NeurIPS 2024), with a bound on waiting.

None waits for ever: one that has waited for `patience` steps goes first. A plan repeats while all
decode, until the next one has waited that long."""

from ..view import SequenceView
from .composed import ComposedPolicy
from .parts import Aged, Ranked, TokenBudget, UntilAged, WhenItFits, by_priority


def longest_hit(seq: SequenceView) -> tuple[int, int]:
    return by_priority(seq), -seq.prefix.hit


def prefix(
    *, patience: int = 2000, budget: int | None = None, watermark: float = 0.01
) -> ComposedPolicy:
    """`patience`: steps. `budget`, `watermark`: as in `sarathi`."""
    return ComposedPolicy(
        order=Aged(Ranked(longest_hit), patience),
        admit=WhenItFits(watermark),
        budget=TokenBudget(budget),
        repeat=UntilAged(patience),
    )
