"""What a policy sees and what it answers: frozen values, no behaviour.

A sequence has tokens that are *known* (its prompt and what it has generated) and tokens that are
*computed* (in the KV cache). Every step advances some sequences by some of their known tokens; a
sequence whose last known token gets computed samples one more. There is no prefill phase and no
decode phase: a decode is an advance by the one token that was sampled last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may not exceed.

    `n_batch`: rows of one step. `n_ubatch`: rows that the device computes at a time.
    `n_seq_max`: sequences that run at once. `n_cells`: KV cells of all sequences together.
    `n_cells_seq`: KV cells of one sequence. `unified`: one pool of cells for all.
    """

    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_cells: int
    n_cells_seq: int
    unified: bool = True


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence, as it is before the step. Times are in seconds on the scheduler's clock.

    `goal`: None for a request. A hand-driven sequence computes its first `goal` known tokens: all
    of them when its owner wants the next token, all but the last one of a prompt. At its goal it
    *rests*, keeping its slot and its cells.
    """

    id: int
    arrival: float
    n_prompt: int
    computed: int = 0
    generated: int = 0
    max_tokens: int = 1
    running: bool = False
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    prefix_hit: int = 0
    preemptions: int = 0
    goal: int | None = None

    @property
    def known(self) -> int:
        return self.n_prompt + self.generated

    @property
    def remaining(self) -> int:
        """Known tokens that are to compute: what a step may advance it by. 0 only while a
        hand-driven sequence rests."""
        if self.goal is None:
            return self.n_prompt + self.generated - self.computed
        return max(0, self.goal - self.computed)

    @property
    def decoding(self) -> bool:
        """Nothing is left to compute but the token that was sampled last; of a hand-driven
        sequence, the last token that it knows."""
        if not self.running or self.remaining != 1:
            return False
        return self.generated > 0 if self.goal is None else self.goal == self.known


@dataclass(frozen=True, slots=True)
class StepView:
    """The whole system before a step. Valid while `Policy.plan` runs; a `SequenceView` taken from
    it stays true to that moment.

    `running`: in the order of admission. `waiting`: in the order of arrival, preempted ones first.
    `decoding`: id -> 1 for the running sequences that decode, ready to be taken into a plan whole.
    `prefilling`: the other running ones that have something to compute. `kv_promised`: cells that
    running sequences need for tokens that they know already; `kv_free - kv_promised` is what a
    newcomer may count on. `cost`: the device's cost model, when there is one.
    """

    now: float
    limits: Limits
    running: Sequence[SequenceView]
    waiting: Collection[SequenceView]
    decoding: Mapping[int, int]
    prefilling: Sequence[SequenceView]
    kv_free: int
    kv_promised: int = 0
    cost: Any = None

    @property
    def kv_total(self) -> int:
        return self.limits.n_cells

    @classmethod
    def of(
        cls,
        limits: Limits,
        running: Iterable[SequenceView] = (),
        waiting: Iterable[SequenceView] = (),
        *,
        now: float = 0.0,
        cost: Any = None,
    ) -> StepView:
        """A view made by hand, to try a policy with no engine: the rest follows from the
        sequences."""
        running = tuple(running)
        return cls(
            now=now,
            limits=limits,
            running=running,
            waiting=tuple(waiting),
            decoding={s.id: 1 for s in running if s.decoding},
            prefilling=tuple(s for s in running if s.remaining and not s.decoding),
            kv_free=limits.n_cells - sum(s.computed for s in running),
            kv_promised=sum(s.remaining for s in running),
            cost=cost,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What the next step is to be.

    `tokens`: how many tokens each sequence advances; a waiting sequence named here is admitted.
    `preempt`: running sequences that give up their cells before the step and wait again.
    `reasons`: why, by sequence id, for the trace; decoding needs none.
    `repeat`: for how many steps the policy would plan the same, as long as no sequence comes or
    goes: a bound, the steps end earlier where a budget or the KV cells do. More than 1 is for
    plans of decoding alone.
    """

    tokens: Mapping[int, int] = field(default_factory=dict)
    preempt: tuple[int, ...] = ()
    reasons: Mapping[int, str] = field(default_factory=dict)
    repeat: int = 1

    @property
    def n_rows(self) -> int:
        return sum(self.tokens.values())
