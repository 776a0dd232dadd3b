"""Multi-level feedback queue: every sequence starts at the level that its prompt's length says
(skip-join), sinks a level with every quantum of tokens that it generates, and a newcomer of a
better level takes the slot or the cells of one that has sunk below it. So short answers are quick
without a prediction. Follows FastServe (Wu et al., 2023); who is preempted here gives up its cells
and is computed again, so a turn lasts for at least one quantum of the best level.

A level follows from the tokens that were generated, so the policy keeps no state. Nobody waits for
ever: who has waited for `patience` steps goes first, as from the best level. A plan repeats while
everybody decodes, until somebody sinks, ends his first quantum or has waited that long, or as long
as nobody waits. Priorities are not looked at."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ..policy import Admit, ComposedPolicy, Decodes, PlanBuilder, Verdict
from ..queue import SequenceList
from ..view import SequenceView, StepView
from .parts import ALWAYS, TokenBudget, WhatIsLeft, WhenItFits, aged, first_to_go, until_aged

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
        quanta = [quantum * growth**i for i in range(n - 1)]
        self._prompts = [each * prompt_rows for each in quanta]  # the longest that starts there
        self._starts = [0, *accumulate(quanta)]  # tokens before each level, from the first
        self._arrays = np.array(self._prompts), np.array(self._starts)

    def __call__(self, seq: SequenceView) -> int:
        joined = self._starts[bisect_left(self._prompts, seq.n_prompt)]
        return bisect_right(self._starts, seq.generated + joined) - 1

    def tokens(self, n_prompt: I64, generated: I64) -> I64:
        """Of each, as if it had started at the first level."""
        prompts, starts = self._arrays
        tokens: I64 = starts[prompts.searchsorted(n_prompt)] + generated
        return tokens

    def of(self, running: SequenceList) -> I64:
        """The level of each."""
        tokens = self.tokens(running.column("n_prompt"), running.column("generated"))
        return self._arrays[1].searchsorted(tokens, side="right") - 1

    def end(self, level: int) -> int:
        """The tokens with which a worse level begins."""
        return self._starts[level + 1] if level + 1 < len(self._starts) else ALWAYS


@dataclass(frozen=True, slots=True)
class ByLevel:
    levels: Levels
    patience: int
    decodes: Decodes = Decodes.FIRST

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ArgumentError("patience", self.patience, "at least 1 step")

    def __call__(self, view: StepView) -> Iterable[SequenceView]:
        if not len(view.waiting):
            return view.prefilling
        first = aged(view, self.patience)
        return chain(view.prefilling, first, view.waiting.by(self.levels))


@dataclass(frozen=True, slots=True)
class InItsPlace:
    """Admit who `fits`, and who does not, if somebody gives way."""

    fits: Admit

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        verdict = self.fits(builder, seq)
        return Verdict.PREEMPT if verdict is Verdict.STOP else verdict


@dataclass(frozen=True, slots=True)
class LowestLevel:
    """Of the worst level the newest: for want of cells any that comes after `seq`; for a newcomer
    one of a worse level than his, after a turn of at least a quantum."""

    levels: Levels
    patience: int

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> SequenceView | None:
        view = builder.view
        running = view.running
        if seq.running:
            level = self.levels.of(running)
            places = np.arange(len(level))
        else:
            if running.unordered("turn").max(initial=0) < self.levels.quantum:
                return None
            had_their_turn = running.column("turn") >= self.levels.quantum
            level = self.levels.of(running)
            starved = view.step - seq.queued >= self.patience
            own = 0 if starved else self.levels(seq)
            (places,) = np.nonzero((level > own) & had_their_turn)
        last_first = places[np.argsort(level[places], kind="stable")][::-1].tolist()
        return first_to_go(builder, seq, (running[place] for place in last_first))


@dataclass(frozen=True, slots=True)
class UntilSunk:
    """A plan stands until another of the running has sunk below the first in line and has had his
    turn, or somebody else comes first for having waited."""

    levels: Levels
    patience: int

    def __call__(self, builder: PlanBuilder) -> int:
        view, levels = builder.view, self.levels
        if not len(view.waiting):
            return ALWAYS
        first = next(iter(view.waiting.by(levels)))
        level = 0 if any(aged(view, self.patience)) else levels(first)
        running = view.running
        tokens = levels.tokens(running.unordered("n_prompt"), running.unordered("generated"))
        sinks = levels.end(level) - tokens
        turn = levels.quantum - running.unordered("turn")
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
    made = Levels(quantum, growth, levels, prompt_rows)
    return ComposedPolicy(
        order=ByLevel(made, patience),
        admit=InItsPlace(WhenItFits(watermark)),
        budget=TokenBudget(budget),
        chunk=WhatIsLeft(),
        victim=LowestLevel(made, patience),
        repeat=UntilSunk(made, patience),
    )
