"""Policies: what the next step is to be.

Anything with `plan(view) -> Plan` is a policy. `ComposedPolicy` puts one together from five
decisions that can be replaced one by one; most new policies are one new decision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from .view import Plan, SequenceView, StepView


class Policy(Protocol):
    """A policy must not keep or change what it is shown; it answers with a plan, which the
    scheduler checks against the limits before anything happens."""

    def plan(self, view: StepView) -> Plan: ...


class Verdict(Enum):
    ADMIT = "admit"
    SKIP = "skip"  # not this one now, look at the next
    STOP = "stop"  # nobody else in this step


class Decodes(Enum):
    """When the sequences that decode get their row, seen from the other sequences of the order."""

    FIRST = "first"
    LAST = "last"
    IN_ORDER = "in order"  # the order names them among the others


@dataclass(slots=True)
class Draft:
    """A plan in the making, with what is left to give: `rows` of the budget, `cells` of the KV
    cache, `slots` for newcomers. `promised`: cells that sequences of this step still need for
    tokens that they know. Seen by the five decisions, changed by `ComposedPolicy` alone."""

    view: StepView
    rows: int
    cells: int
    slots: int
    promised: int
    tokens: dict[int, int] = field(default_factory=dict)
    preempt: dict[int, SequenceView] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    n_admitted: int = 0

    @property
    def n_running(self) -> int:
        """Sequences that run after this step."""
        return len(self.view.running) + self.n_admitted - len(self.preempt)

    def give(self, seq: SequenceView, n: int) -> None:
        self.tokens[seq.id] = n
        self.rows -= n
        self.cells -= n
        self.promised -= n

    def give_all_decodes(self) -> None:
        decoding = self.view.decoding
        self.tokens.update(decoding)
        self.rows -= len(decoding)
        self.cells -= len(decoding)
        self.promised -= len(decoding)

    def admit(self, seq: SequenceView) -> None:
        self.slots -= 1
        self.n_admitted += 1
        self.promised += seq.remaining

    def take_back(self, seq: SequenceView, reason: str) -> None:
        """Preempt: the rows that it had in this draft and the cells that it holds come back."""
        n = self.tokens.pop(seq.id, 0)
        self.rows += n
        self.cells += n + seq.computed
        self.promised -= seq.remaining - n
        self.slots += 1
        self.preempt[seq.id] = seq
        self.reasons[seq.id] = reason

    def plan(self, repeat: int = 1) -> Plan:
        """`repeat`: of a plan in which everybody who runs and does not rest decodes."""
        steady = len(self.tokens) == len(self.view.decoding) and not self.view.prefilling
        if not steady or not self.tokens or self.n_admitted or self.preempt:
            repeat = 1
        return Plan(self.tokens, tuple(self.preempt), self.reasons, repeat)


class Order(Protocol):
    """Who is next: the running sequences that do not decode and the waiting ones (with
    `Decodes.IN_ORDER` the decoding ones too), most urgent first."""

    @property
    def decodes(self) -> Decodes: ...

    def __call__(self, view: StepView) -> Iterable[SequenceView]: ...


class Admit(Protocol):
    """May this waiting sequence start now?"""

    def __call__(self, draft: Draft, seq: SequenceView) -> Verdict: ...


class Budget(Protocol):
    """How many rows this step may have; more than `n_batch` counts as `n_batch`."""

    def __call__(self, view: StepView) -> int: ...


class Chunk(Protocol):
    """How many rows this sequence gets; what exceeds its remaining tokens or what the draft has
    left is cut off, 0 leaves it out of the step."""

    def __call__(self, draft: Draft, seq: SequenceView) -> int: ...


class Victim(Protocol):
    """Who gives up its cells so that `seq` can go on: a running sequence that is not in
    `draft.preempt` yet, maybe `seq` itself; None: nobody, `seq` waits for the next step."""

    def __call__(self, draft: Draft, seq: SequenceView) -> SequenceView | None: ...


@dataclass(frozen=True, slots=True)
class ComposedPolicy:
    """`repeat`: for how many steps a plan stands in which everybody who runs decodes and nobody is
    admitted. More than 1 only if the decisions would be the same at each of them, as long as nobody
    comes or goes: they may not look at the time, nor admit somebody for having waited longer."""

    order: Order
    admit: Admit
    budget: Budget
    chunk: Chunk
    victim: Victim
    repeat: int = 1

    def plan(self, view: StepView) -> Plan:
        draft = Draft(
            view=view,
            rows=min(self.budget(view), view.limits.n_batch),
            cells=view.kv_free,
            slots=view.limits.n_seq_max - len(view.running),
            promised=view.kv_promised,
        )
        decodes = self.order.decodes
        if decodes is Decodes.FIRST:
            self._decode(draft)
        for seq in self.order(view):
            if draft.rows < 1:
                break
            if seq.id in draft.preempt or seq.id in draft.tokens:
                continue
            if seq.running:
                self._advance(draft, seq)
            elif draft.preempt:
                break  # cells are short: whoever gave his up comes before any newcomer
            else:
                verdict = self.admit(draft, seq)
                if verdict is Verdict.ADMIT:
                    self._start(draft, seq)
                elif verdict is Verdict.STOP:
                    break
        if decodes is Decodes.LAST:
            self._decode(draft)
        return draft.plan(self.repeat)

    def _decode(self, draft: Draft) -> None:
        n = len(draft.view.decoding)
        if n <= draft.rows and n <= draft.cells:
            draft.give_all_decodes()
            return
        for seq in draft.view.running:
            if draft.rows < 1:
                break
            if seq.decoding and seq.id not in draft.preempt:
                self._advance(draft, seq)

    def _advance(self, draft: Draft, seq: SequenceView) -> None:
        while draft.cells < 1:
            victim = self.victim(draft, seq)
            if victim is None:
                return
            draft.take_back(victim, f"preempted: sequence {seq.id} found no free cell")
            if victim.id == seq.id:
                return
        n = 1 if seq.decoding else self._cut(draft, seq)
        if n > 0:
            draft.give(seq, n)
            if n < seq.remaining:
                draft.reasons[seq.id] = f"chunk of {n} rows, {seq.remaining - n} tokens to go"

    def _start(self, draft: Draft, seq: SequenceView) -> None:
        n = self._cut(draft, seq)
        if n > 0:
            draft.admit(seq)
            draft.give(seq, n)
            draft.reasons[seq.id] = f"admitted with {n} of {seq.remaining} tokens"

    def _cut(self, draft: Draft, seq: SequenceView) -> int:
        return min(self.chunk(draft, seq), seq.remaining, draft.rows, draft.cells)
