"""First come, first served, continuously: sequences join and leave the batch at every step (Orca),
whoever decodes gets its row first, and prompts fill the rest of a token budget in chunks
(Sarathi-Serve). When cells run out, the newest sequence gives up its own and is computed again
later."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from ..policy import ComposedPolicy, Decodes, Draft, Verdict
from ..view import SequenceView, StepView


@dataclass(frozen=True, slots=True)
class FirstCome:
    """Prompts already begun, then the waiting line."""

    decodes: Decodes = Decodes.FIRST

    def __call__(self, view: StepView) -> Iterable[SequenceView]:
        return chain(view.prefilling, view.waiting)


@dataclass(frozen=True, slots=True)
class WhenItFits:
    """Admit while there is a slot, and cells for all that the newcomer and the running ones know,
    plus a reserve for what they will generate: the share `watermark` of the cache, at least one
    cell each. The first that does not fit stops the line, so that no long prompt starves."""

    watermark: float = 0.01

    def __call__(self, draft: Draft, seq: SequenceView) -> Verdict:
        if draft.slots < 1:
            return Verdict.STOP
        n_running = draft.n_running
        if n_running == 0:
            return Verdict.ADMIT
        limits = draft.view.limits
        reserve = max(n_running + 1, int(self.watermark * limits.n_cells)) if limits.unified else 0
        spare = draft.cells - draft.promised - seq.remaining
        return Verdict.ADMIT if spare >= reserve else Verdict.STOP


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """Rows of a step: `n_batch` while nobody decodes; else `mixed`, or by default as many whole
    ubatches as leave room for a prompt beside the decoding rows (one, normally)."""

    mixed: int | None = None

    def __call__(self, view: StepView) -> int:
        n_decoding = len(view.decoding)
        if n_decoding == 0:
            return view.limits.n_batch
        if self.mixed is not None:
            return max(self.mixed, n_decoding)
        n_ubatch = view.limits.n_ubatch
        return n_ubatch * (n_decoding // n_ubatch + 1)


@dataclass(frozen=True, slots=True)
class WhatIsLeft:
    """As much of the prompt as the budget has left, at most `most` rows."""

    most: int | None = None

    def __call__(self, draft: Draft, seq: SequenceView) -> int:
        return draft.rows if self.most is None else min(self.most, draft.rows)


@dataclass(frozen=True, slots=True)
class NewestFirst:
    """The newest running sequence gives way to an older one; the newest itself waits, and keeps
    its cells until an older one needs them."""

    def __call__(self, draft: Draft, seq: SequenceView) -> SequenceView | None:
        for candidate in reversed(draft.view.running):
            if candidate.id == seq.id:
                return None
            if candidate.id not in draft.preempt:
                return candidate
        return None


# Who was not admitted is not admitted later either, unless somebody leaves: decoding takes cells.
ALWAYS = 2**31


def fcfs(*, watermark: float = 0.01, budget: int | None = None) -> ComposedPolicy:
    """`budget`: rows of a step while somebody decodes (default: see `TokenBudget`)."""
    return ComposedPolicy(
        order=FirstCome(),
        admit=WhenItFits(watermark),
        budget=TokenBudget(budget),
        chunk=WhatIsLeft(),
        victim=NewestFirst(),
        repeat=ALWAYS,
    )
