"""Policies: what the next step is to be.

Anything with `plan(view) -> Plan` is a policy. `ComposedPolicy` puts one together from decisions
that can be replaced one by one; most new policies are one new decision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple, Protocol

from ..errors import ArgumentError
from .view import Plan, SequenceView, StepView, Tokens


class Policy(Protocol):
    """A policy must not keep or change what it is shown; it answers with a plan, which the
    scheduler checks against the limits before anything happens."""

    def plan(self, view: StepView) -> Plan: ...


def check_policy(policy: Any, given: object) -> Policy:
    """`policy`, which `given` names; ArgumentError when it is none."""
    if isinstance(policy, type) or not callable(getattr(policy, "plan", None)):
        limit = 'must have plan(view), as make_policy("sarathi") or your own has'
        raise ArgumentError("policy", given, limit)
    made: Policy = policy
    return made


class Verdict(Enum):
    ADMIT = "admit"
    SKIP = "skip"  # not this one now, look at the next
    STOP = "stop"  # nobody else is admitted in this step
    PREEMPT = "preempt"  # yes, if the victim decision names somebody to give way; then asked again


class Decodes(Enum):
    """When the sequences that decode get their row, seen from the other sequences of the order."""

    FIRST = "first"
    LAST = "last"
    APART = "apart"  # only in a step in which nobody else has a row
    IN_ORDER = "in order"  # the order names them among the others


@dataclass(slots=True)
class PlanBuilder:
    """A plan in the making, with what is left to give: `rows` of the budget, `cells` of the KV
    cache, `slots` for newcomers. `promised`: cells that sequences of this step still need for
    tokens that they know. `wake`: when to ask again, should nobody have a row. Seen by the
    decisions, changed by `ComposedPolicy` alone, but for `ask_again`. `sit_out`: of those that
    `decode_all`, who has no row in this step."""

    view: StepView
    rows: int
    cells: int
    slots: int
    promised: int
    decode_all: bool = False
    others: dict[int, int] = field(default_factory=dict)  # tokens; not of those that `decode_all`
    preempt: dict[int, SequenceView] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    n_admitted: int = 0
    short: bool = False  # somebody gave up his cells, for want of them
    wake: float | None = None
    sit_out: Set[int] = frozenset()

    @property
    def tokens(self) -> Mapping[int, int]:
        """As in `Plan.tokens`, so far."""
        if not self.decode_all:
            return self.others
        decoding = self.view.decoding
        without = self.sit_out or {id for id in self.preempt if id in decoding}
        return Tokens(decoding, self.others, without)

    def has(self, seq: SequenceView) -> bool:
        """It has tokens, or is preempted."""
        id = seq.id
        return (
            id in self.others
            or id in self.preempt
            or (self.decode_all and id in self.view.decoding)
        )

    @property
    def n_running(self) -> int:
        """Sequences that run after this step."""
        return len(self.view.running) + self.n_admitted - len(self.preempt)

    def ask_again(self, at: float) -> None:
        """By an admit decision that says no now and may say yes `at` that time."""
        self.wake = at if self.wake is None else min(self.wake, at)

    def copy(self) -> PlanBuilder:
        return replace(
            self,
            others=self.others.copy(),
            preempt=self.preempt.copy(),
            reasons=self.reasons.copy(),
        )

    def give(self, seq: SequenceView, n: int) -> None:
        self.others[seq.id] = n
        self.rows -= n
        self.cells -= n
        self.promised -= n

    def give_all_decodes(self) -> None:
        n = len(self.view.decoding)
        self.decode_all = True
        self.rows -= n
        self.cells -= n
        self.promised -= n

    def admit(self, seq: SequenceView) -> None:
        self.slots -= 1
        self.n_admitted += 1
        self.cells -= seq.prefix_cells
        self.promised += seq.remaining

    def take_back(self, seq: SequenceView, reason: str) -> None:
        """Preempt: the rows that it had in this builder and the cells that it holds come back."""
        decodes = self.decode_all and seq.id in self.view.decoding
        n = 1 if decodes else self.others.pop(seq.id, 0)
        self.rows += n
        self.cells += n + self.view.frees(seq)
        self.promised -= seq.remaining - n
        self.slots += 1
        self.preempt[seq.id] = seq
        self.reasons[seq.id] = reason

    @property
    def steady(self) -> bool:
        """Everybody who runs and does not rest decodes, and that is all."""
        view, n = self.view, len(self.view.decoding)
        return (
            n > 0
            and (self.decode_all or len(self.others) == n)
            and not len(view.prefilling)
            and not self.n_admitted
            and not self.preempt
        )

    def plan(self, repeat: int = 1) -> Plan:
        """`repeat`: of a steady plan."""
        if not self.steady or self.wake is not None:
            repeat = 1
        tokens = self.tokens
        wake = None if len(tokens) or self.preempt else self.wake
        return Plan(tokens, tuple(self.preempt), self.reasons, repeat, wake)


class Order(Protocol):
    """Who is next: the running sequences that do not decode and the waiting ones (with
    `Decodes.IN_ORDER` the decoding ones too), most urgent first."""

    @property
    def decodes(self) -> Decodes: ...

    def __call__(self, view: StepView) -> Iterable[SequenceView]: ...


class Admit(Protocol):
    """May this waiting sequence start now?"""

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict: ...


class Budget(Protocol):
    """How many rows this step may have; more than `n_batch` counts as `n_batch`."""

    def __call__(self, view: StepView) -> int: ...


class ChunkSize(Protocol):
    """How many rows this sequence gets; what exceeds its remaining tokens or what the builder has
    left is cut off, 0 leaves it out of the step."""

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> int: ...


class Victim(Protocol):
    """Who gives up its cells so that `seq` can go on: a running sequence that is not in
    `builder.preempt` yet, maybe `seq` itself; None: nobody, `seq` waits for the next step.

    So that somebody always gets on, it must go by an order of all sequences that changes only with
    the tokens that they generate or with admission, and name only who comes after `seq` in it. With
    `Verdict.PREEMPT` it is asked for a waiting `seq` too, and should spare whoever has not had a
    fair turn (`SequenceView.turn`)."""

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> SequenceView | None: ...


class Repeat(Protocol):
    """For how many steps a steady plan stands: one in which everybody who runs (and does not rest)
    decodes, and nobody is admitted or preempted. More than 1 only as far as the decisions would be
    the same at each of them, as long as nobody comes or goes."""

    def __call__(self, builder: PlanBuilder) -> int: ...


class Round(NamedTuple):
    """Some of those that decode have a row, the others (`sit_out`, not all of them) have theirs in
    a later round; `steps`: for how many steps that stands."""

    sit_out: Set[int]
    steps: int


class Width(Protocol):
    """Who decodes in this step, asked when all would and nobody else has a row: where several
    narrow steps are faster than a wide one, they may take turns. What it says may depend on what
    it has said before, and on the steps since then (`StepView.step`), but not on the time: asked
    at each of the steps that it has answered for, it must say the same."""

    def __call__(self, builder: PlanBuilder) -> Round: ...


@dataclass(frozen=True, slots=True)
class ComposedPolicy:
    """`repeat`: a number, when it is always the same one. The decisions may not look at the time
    then, nor admit somebody for having waited longer. `width`: without it all who decode do so at
    every step."""

    order: Order
    admit: Admit
    budget: Budget
    chunk: ChunkSize
    victim: Victim
    repeat: Repeat | int = 1
    width: Width | None = None

    def plan(self, view: StepView) -> Plan:
        builder = PlanBuilder(
            view=view,
            rows=min(self.budget(view), view.limits.n_batch),
            cells=view.kv_free,
            slots=view.limits.n_seq_max - len(view.running),
            promised=view.kv_promised,
        )
        decodes = self.order.decodes
        if decodes is Decodes.FIRST:
            self._decode(builder)
        builder = self._others(builder)
        if decodes is Decodes.LAST or (decodes is Decodes.APART and not builder.others):
            self._decode(builder)
        if not builder.steady:
            return builder.plan()
        repeat = self.repeat if isinstance(self.repeat, int) else self.repeat(builder)
        if self.width is not None and builder.decode_all:
            builder.sit_out, steps = self.width(builder)
            repeat = min(repeat, steps)
        return builder.plan(repeat)

    def _others(self, builder: PlanBuilder) -> PlanBuilder:
        """Whom the order names, until rows or newcomers are at their end; then the rest of those
        that run."""
        for seq in self.order(builder.view):
            if builder.rows < 1:
                return builder
            if builder.has(seq):
                continue
            if seq.running:
                self._advance(builder, seq)
                continue
            if builder.short:
                break  # whoever gave up his cells comes before any newcomer
            if seq.prefix_pending:
                continue  # what it begins with is being computed
            verdict = self.admit(builder, seq)
            if verdict is Verdict.PREEMPT:
                builder, verdict = self._preempt_idle(builder, seq)
            if verdict is Verdict.ADMIT:
                self._start(builder, seq)
            elif verdict is not Verdict.SKIP:
                break
        for seq in builder.view.prefilling:
            if builder.rows < 1:
                break
            if not builder.has(seq):
                self._advance(builder, seq)
        return builder

    def _preempt_idle(self, builder: PlanBuilder, seq: SequenceView) -> tuple[PlanBuilder, Verdict]:
        """`builder` with victims enough that `seq` is admitted, or as it was."""
        trial, verdict = builder, Verdict.PREEMPT
        while verdict is Verdict.PREEMPT:
            victim = self.victim(trial, seq)
            if victim is None:
                return builder, Verdict.STOP
            trial = builder.copy() if trial is builder else trial
            trial.take_back(victim, f"preempted: sequence {seq.id} takes its place")
            verdict = self.admit(trial, seq)
        return (trial if verdict is Verdict.ADMIT else builder), verdict

    def _decode(self, builder: PlanBuilder) -> None:
        n = len(builder.view.decoding)
        if n <= builder.rows and n <= builder.cells and not builder.preempt:
            builder.give_all_decodes()
            return
        for seq in builder.view.running:
            if builder.rows < 1:
                break
            if seq.decoding and seq.id not in builder.preempt:
                self._advance(builder, seq)

    def _advance(self, builder: PlanBuilder, seq: SequenceView) -> None:
        while builder.cells < 1:
            victim = self.victim(builder, seq)
            if victim is None:
                return
            builder.take_back(victim, f"preempted: sequence {seq.id} found no free cell")
            builder.short = True
            if victim.id == seq.id:
                return
        n = 1 if seq.decoding else self._cut(builder, seq)
        if n > 0:
            builder.give(seq, n)
            if n < seq.remaining:
                builder.reasons[seq.id] = f"chunk of {n} rows, {seq.remaining - n} tokens to go"

    def _start(self, builder: PlanBuilder, seq: SequenceView) -> None:
        if builder.cells <= seq.prefix_cells:
            return
        n = min(self._cut(builder, seq), builder.cells - seq.prefix_cells)
        if n > 0:
            builder.admit(seq)
            builder.give(seq, n)
            builder.reasons[seq.id] = f"admitted with {n} of {seq.remaining} tokens"

    def _cut(self, builder: PlanBuilder, seq: SequenceView) -> int:
        return min(self.chunk(builder, seq), seq.remaining, builder.rows, builder.cells)
