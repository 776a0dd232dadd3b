"""Shortest remaining first, by predicted length: the sequence that is predicted to be done soonest
is admitted first, and the longest is preempted when cells run out (shortest remaining processing
time; Schrage 1968; for language models with a predictor e.g. Jin et al., S3, NeurIPS 2023).

None waits for ever: one that has waited for `patience` steps goes first. A plan repeats while all
decode, until the next one has waited that long."""

from collections.abc import Callable
from dataclasses import dataclass

from ..view import SequenceView
from .composed import ComposedPolicy
from .parts import Aged, LastRanked, Ranked, TokenBudget, UntilAged, WhenItFits

Predict = Callable[[SequenceView], float]


def budgeted(seq: SequenceView) -> float:
    """The prediction when nothing better is known: all the tokens that it may have."""
    return seq.max_tokens


@dataclass(frozen=True, slots=True)
class Remaining:
    """The rank of a sequence: priority, tokens still to generate as predicted, prompt length."""

    predict: Predict = budgeted

    def __call__(self, seq: SequenceView) -> tuple[int, float, int]:
        return -seq.priority, max(self.predict(seq) - seq.generated, 1.0), seq.n_prompt


def shortest(
    *,
    predict: Predict = budgeted,
    patience: int = 2000,
    budget: int | None = None,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`predict(sequence)`: how many tokens it will have generated at its end; the same answer each
    time for the same sequence and the same number of generated tokens. `patience`: steps. `budget`,
    `watermark`: as in `sarathi`."""
    rank = Remaining(predict)
    return ComposedPolicy(
        order=Aged(Ranked(rank), patience),
        admit=WhenItFits(watermark),
        budget=TokenBudget(budget),
        victim=LastRanked(rank),
        repeat=UntilAged(patience),
    )
