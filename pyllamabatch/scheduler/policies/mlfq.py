"""Multi-level feedback queue: every sequence starts at the level that its prompt's length says
(skip-join), sinks a level with every quantum of tokens that it generates, and a newcomer of a
better level takes the slot or the cells of one that has sunk below it. So short answers are quick
without a prediction. Follows FastServe (Wu et al., 2023). A preempted sequence gives up its cells
here and is computed again, so a turn lasts for at least one quantum of the best level.

A level follows from the tokens that were generated, so the policy keeps no state. None waits for
ever: one that has waited for `patience` steps goes first, as from the best level. A plan repeats
while all decode, until one sinks, ends its first quantum or has waited that long, or as long as
none waits. Priorities are not looked at."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ..policy import PlanBuilder
from ..queue import SequenceList
from ..view import SequenceView, StepView
from .composed import ComposedPolicy
from .parts import ALWAYS, TokenBudget, WhenItFits, aged, until_aged

I64 = npt.NDArray[np.int64]


class Levels:
    """Level i lasts for `quantum` * `growth`**i generated tokens, the last of `n` for ever. A
    prompt starts at the first level whose quantum is as long as its prefill, which takes as long as
    generating one token for each `prompt_rows` of it."""

    def __init__(
        self, quantum: int = 32, growth: int = 2, n: int = 6, prompt_rows: int = 32
    ) -> None:
        given = {"quantum": quantum, "growth": growth, "n": n, "prompt_rows": prompt_rows}
        for name, value in given.items():
            if value < 1:
                raise ArgumentError(name, value, "at least 1")
        self.quantum = quantum
        quanta = np.array([min(quantum * growth**i, ALWAYS) for i in range(n - 1)], np.int64)
        self._prompts = quanta * prompt_rows  # the longest that starts at each level
        self._starts: I64 = np.zeros(n, np.int64)  # tokens before each level
        self._starts[1:] = quanta.cumsum()
        self._ends = np.append(self._starts[1:], ALWAYS)

    def __call__(self, seq: SequenceView) -> int:
        return int(self.at(self.tokens(seq.n_prompt, seq.generated)))

    def tokens(self, n_prompt: int | I64, generated: int | I64) -> I64:
        """Generated tokens, as if the sequence had started at the first level."""
        tokens: I64 = self._starts[self._prompts.searchsorted(n_prompt)] + generated
        return tokens

    def at(self, tokens: int | I64) -> I64:
        """The level of a sequence that has generated so many."""
        return np.asarray(self._starts.searchsorted(tokens, side="right") - 1)

    def of(self, running: SequenceList) -> I64:
        """`tokens` of each, in the order of its columns."""
        return self.tokens(running.column("n_prompt"), running.column("generated"))

    def end(self, level: int) -> int:
        """The tokens with which a worse level begins."""
        return int(self._ends[level])


@dataclass(frozen=True, slots=True)
class Feedback:
    """The policy's order, victims and repeat."""

    levels: Levels
    patience: int

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ArgumentError("patience", self.patience, "at least 1 step")

    def order(self, view: StepView) -> Iterable[SequenceView]:
        if not len(view.waiting):
            return view.prefilling
        first = aged(view, self.patience)
        return chain(view.prefilling, first, view.waiting.by(self.levels))

    def victim(self, builder: PlanBuilder, seq: SequenceView) -> SequenceView | None:
        """Of the worst level the one admitted last: for want of cells any that comes after `seq`;
        for a
        newcomer one of a worse level than its own, after a turn of at least a quantum."""
        view, levels = builder.view, self.levels
        running = view.running
        turns = running.column("turn")
        if not seq.running and turns.max(initial=0) < levels.quantum:
            return None
        ids, level = running.column("id"), levels.at(levels.of(running))
        may_go = np.isin(ids, [*builder.preempt], invert=True)
        if not seq.running:
            starved = view.step - seq.queued >= self.patience
            own = 0 if starved else levels(seq)
            may_go &= (level > own) & (turns >= levels.quantum)
        if not may_go.any():
            return None
        worst = {*ids[may_go & (level == level[may_go].max())].tolist()}
        last = next(one for one in reversed(running) if one.id in worst)
        return None if last.id == seq.id else last

    def repeat(self, builder: PlanBuilder) -> int:
        """A plan stands until another of the running has sunk below the first that waits and has
        had its turn, or another one comes first for having waited."""
        view, levels = builder.view, self.levels
        if not len(view.waiting):
            return ALWAYS
        starved = any(aged(view, self.patience))
        level = 0 if starved else levels(next(iter(view.waiting.by(levels))))
        sinks = levels.end(level) - levels.of(view.running)
        turn = levels.quantum - view.running.column("turn")
        steps = np.maximum(sinks, turn)
        steps = steps[steps > 0]
        return min(int(steps.min(initial=ALWAYS)), until_aged(view, self.patience))


def mlfq(
    *,
    quantum: int = 32,
    growth: int = 2,
    levels: int = 6,
    prompt_rows: int = 32,
    patience: int = 2000,
    budget: int | None = None,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`quantum`, `growth`, `levels`, `prompt_rows`: see `Levels`. `patience`: steps. `budget`,
    `watermark`: as in `sarathi`."""
    feedback = Feedback(Levels(quantum, growth, levels, prompt_rows), patience)
    return ComposedPolicy(
        order=feedback.order,
        admit=WhenItFits(watermark),
        budget=TokenBudget(budget),
        victim=feedback.victim,
        repeat=feedback.repeat,
    )
