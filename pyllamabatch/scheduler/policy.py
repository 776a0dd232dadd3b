"""Policies: what the next step is to be.

Anything with `plan(view) -> Plan` is a policy. `ComposedPolicy` (`policies/composed.py`) puts one
together from parts that can be replaced one by one; the protocols here say what each part is asked.
Most new policies are one new part. Every part is a plain function or a callable object:

    def short_prompts(builder: PlanBuilder, seq: SequenceView) -> Verdict:
        alone = builder.n_running == 0
        return Verdict.ADMIT if alone or seq.n_prompt <= 100 else Verdict.SKIP

    policy = ComposedPolicy(admit=short_prompts)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain
from typing import Any, NamedTuple, Protocol

from ..errors import ArgumentError
from .view import Plan, Prices, SequenceView, StepView


class Policy(Protocol):
    """A policy must not keep or change what it is shown. It answers with a plan, which the
    scheduler checks against the limits before anything happens.

    A policy may also have `ended(seq)`: it is told of each running sequence that ends or is
    preempted, as it was at its end. `seq.turn` tokens were generated since its admission."""

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
    STOP = "stop"  # no other is admitted in this step, unless a victim makes room for this one


class Mix(Enum):
    """What a step computes, where some sequences decode and others have prompts to compute."""

    BOTH = "both"  # decodes, first of all, and prompts beside them
    PROMPTS = "prompts"  # prompts; decodes only if no prompt has a row
    DECODES = "decodes"  # decodes, if there are any, in one step


@dataclass(slots=True)
class PlanBuilder:
    """A plan in the making. Parts read it; `ComposedPolicy` alone changes it, but for `ask_again`.

    - rows: left of the budget. cells: KV cells that are free. promised: cells that sequences of
      this step still need for tokens that they know.
    - tokens: rows that were given, by sequence id, but not to those of `decode_all`.
    - preempt: the victims until now, by id.
    - admitted: newcomers until now.
    - short: a sequence was preempted for want of cells: no newcomer is admitted."""

    view: StepView
    rows: int
    cells: int
    promised: int
    tokens: dict[int, int] = field(default_factory=dict)
    decode_all: bool = False
    preempt: dict[int, SequenceView] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    admitted: list[SequenceView] = field(default_factory=list)
    short: bool = False
    wake: float | None = None

    @property
    def n_running(self) -> int:
        """Sequences that run after this step."""
        return len(self.view.running) + len(self.admitted) - len(self.preempt)

    @property
    def slots(self) -> int:
        """Slots for newcomers."""
        return self.view.limits.n_seq_max - self.n_running

    @property
    def n_rows(self) -> int:
        """That were given until now."""
        n = len(self.view.decoding - self.preempt.keys()) if self.decode_all else 0
        return n + sum(self.tokens.values())

    def prompts(self) -> list[tuple[SequenceView, int]]:
        """Those that compute their prompt in this step, and how many rows each has; not one with
        its last token alone: that is a decode."""
        found = [
            (seq, self.tokens.get(seq.id, 0)) for seq in chain(self.view.prefilling, self.admitted)
        ]
        return [(seq, n) for seq, n in found if n > 1 or 0 < n < seq.remaining]

    @property
    def n_ending(self) -> int:
        """Sequences whose prompt ends in this step: they decode in the next one."""
        return sum(
            n == seq.remaining and seq.goal in (None, seq.known) for seq, n in self.prompts()
        )

    def ask_again(self, at: float) -> None:
        """By an admit part that says no now and may say yes `at` that time."""
        self.wake = at if self.wake is None else min(self.wake, at)

    # -- for ComposedPolicy

    def has(self, seq: SequenceView) -> bool:
        """It has rows, or is preempted."""
        id = seq.id
        decodes = self.decode_all and id in self.view.decoding
        return decodes or id in self.tokens or id in self.preempt

    def copy(self) -> PlanBuilder:
        return replace(
            self,
            tokens=self.tokens.copy(),
            preempt=self.preempt.copy(),
            reasons=self.reasons.copy(),
            admitted=self.admitted.copy(),
        )

    def give(self, seq: SequenceView, n: int) -> None:
        self.tokens[seq.id] = n
        self._take(n)

    def give_all_decodes(self) -> None:
        self.decode_all = True
        self._take(len(self.view.decoding))

    def drop_decodes(self) -> None:
        """But those of the last token of a prompt."""
        running, decoding = self.view.running, self.view.decoding
        new = running.column("id")[running.column("generated") == 0].tolist()
        ends = [id for id in new if id in decoding and (self.decode_all or id in self.tokens)]
        self.tokens = {id: n for id, n in self.tokens.items() if id not in decoding}
        self.tokens |= {id: 1 for id in ends if id not in self.preempt}
        self.decode_all = False

    def _take(self, n: int) -> None:
        self.rows -= n
        self.cells -= n
        self.promised -= n

    def admit(self, seq: SequenceView) -> None:
        self.admitted.append(seq)
        self.cells -= seq.prefix.cells
        self.promised += seq.remaining

    def take_back(self, seq: SequenceView, reason: str) -> None:
        """Preempt: the rows that it had in this plan and the cells that it holds come back."""
        decodes = self.decode_all and seq.id in self.view.decoding
        n = 1 if decodes else self.tokens.pop(seq.id, 0)
        self._take(-n)
        freed_by = self.view.kv.freed_by
        self.cells += freed_by(*self.preempt, seq.id) - freed_by(*self.preempt)
        self.promised -= seq.remaining
        self.preempt[seq.id] = seq
        self.reasons[seq.id] = reason

    @property
    def steady(self) -> bool:
        """All that run decode, unless they are idle, and that is all."""
        view, n = self.view, len(self.view.decoding)
        return (
            n > 0
            and (self.decode_all or len(self.tokens) == n)
            and not len(view.prefilling)
            and not self.admitted
            and not self.preempt
        )

    def plan(
        self,
        repeat: int = 1,
        sit_out: Set[int] = frozenset(),
        speculation: Speculation | None = None,
    ) -> Plan:
        empty = not (self.decode_all or self.tokens or self.preempt)
        repeat = 1 if self.wake is not None else repeat
        steps = None if speculation is None else speculation.steps
        most = repeat if steps is None else min(repeat, steps)
        return Plan(
            self.tokens,
            tuple(self.preempt),
            self.decode_all,
            sit_out,
            self.reasons,
            most,
            self.wake if empty else None,
            {} if speculation is None else speculation.drafts,
            None if speculation is None else speculation.prices,
            most < repeat,
        )


class Order(Protocol):
    """Which sequence is next: the running ones that do not decode and the waiting ones, most urgent
    first."""

    def __call__(self, view: StepView) -> Iterable[SequenceView]: ...


class Admit(Protocol):
    """May this waiting sequence start now? Asked while there is a slot: without one it is STOP.
    Where none runs, one of those that wait is to be admitted, or `ask_again` says when."""

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict: ...


class Budget(Protocol):
    """How many rows this step may have; more than `n_batch` counts as `n_batch`."""

    def __call__(self, view: StepView) -> int: ...


class Mixing(Protocol):
    """What of a plan of decodes and prompts is computed in this step: both, its prompts, with the
    rows that they have in it, or its decodes. It may depend on earlier answers; where it has no
    prompts the answer is BOTH, at each of the steps of the plan."""

    def __call__(self, builder: PlanBuilder) -> Mix: ...


class ChunkSize(Protocol):
    """How many rows this sequence gets. What exceeds its remaining tokens, or what the builder has
    left, is cut off; 0 leaves it out of the step."""

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> int: ...


class Victim(Protocol):
    """Which sequence is preempted so that `seq` can go on: a running one that is not in
    `builder.preempt` yet, maybe `seq` itself. None: `seq` waits for the next step.

    It is asked for a waiting `seq` (`seq.running` is False), too, when admit has said STOP: most
    policies answer None then. One that answers otherwise should spare those that have not had a
    fair turn (`SequenceView.turn`).

    So that some sequence always gets on, it must go by an order of all sequences that changes only
    with the tokens that they generate or with admission, and name only one behind `seq` in it."""

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> SequenceView | None: ...


class Repeat(Protocol):
    """For how many steps a steady plan stands: one in which all that run decode, and none is
    admitted or preempted. More than 1 only as far as the parts would answer the same at each of
    them, as long as no sequence comes or goes."""

    def __call__(self, builder: PlanBuilder) -> int: ...


class Round(NamedTuple):
    """Some of those that decode have a row, the others (`sit_out`, not all of them) have theirs in
    a later round; `steps`: for how many steps that stands."""

    sit_out: Set[int]
    steps: int


class Speculation(NamedTuple):
    """drafts, prices: see `Plan`. steps: for how many steps that stands; None: for all of the
    plan's."""

    drafts: Mapping[int, int]
    steps: int | None = None
    prices: Prices | None = None


NO_SPECULATION = Speculation({})


class Speculate(Protocol):
    """How many drafted tokens each sequence may add to a step, asked when all that run decode. It
    may look at what was measured (`StepView.drafts`)."""

    def __call__(self, builder: PlanBuilder) -> Speculation: ...


class Width(Protocol):
    """Which sequences decode in this step, asked when all would and no other has a row: where
    several narrow steps are faster than a wide one, they may take turns. The answer may depend on
    earlier answers, and on the steps since then (`StepView.step`), but not on the time: asked at
    each of the steps that it has answered for, it must say the same."""

    def __call__(self, builder: PlanBuilder) -> Round: ...
