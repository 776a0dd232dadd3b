"""What a policy sees and what it answers: frozen values, no behaviour.

A sequence has tokens that are *known* (its prompt and what it has generated) and tokens that are
*computed* (in the KV cache). Every step advances some sequences by some of their known tokens; a
sequence whose last known token gets computed samples one more. There is no prefill phase and no
decode phase: a decode is an advance by the one token that was sampled last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from .queue import SequenceList
from .tenants import Tenants


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may not exceed.

    `n_batch`: rows of one step. `n_ubatch`: rows that the device computes at a time.
    `n_seq_max`: sequences that run at once. `n_cells`: KV cells of all sequences together.
    `n_cells_seq`: KV cells of one sequence. `unified`: one pool of cells for all. `gap_max`: where
    it is not, so many slots in a row that hold nothing are filled with rows that nobody sees, so
    that those around them are computed together (`Stepper`'s gap_max).
    """

    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_cells: int
    n_cells_seq: int
    unified: bool = True
    gap_max: int = 0


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence, as it is before the step. Times are in seconds on the scheduler's clock.

    `priority`: larger goes first. `deadline`: when it should be done. `itl_target`: the most
    seconds between two of its tokens that its reader likes. `prefix_hit`: tokens that would not be
    computed, if it were admitted now, because they are in the cache or in its saved state; of a
    running one, that were not. `prefix_cells`: how many of the free cells it would take for these.
    `prefix_pending`: a running sequence is computing so many tokens that it begins with, too:
    worth waiting for, 0 when nobody is. `queued`: `StepView.step` when it joined the
    waiting line, last time. `turn`: tokens generated since it was admitted, last time.

    `goal`: None for a request. A interactive sequence computes its first `goal` known tokens: all
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
    itl_target: float | None = None
    queued: int = 0
    turn: int = 0
    prefix_cells: int = 0
    prefix_pending: int = 0

    @property
    def known(self) -> int:
        return self.n_prompt + self.generated

    @property
    def remaining(self) -> int:
        """Known tokens that are to compute: what a step may advance it by. 0 only while a
        interactive sequence rests."""
        done = self.computed if self.running else max(self.computed, self.prefix_hit)
        if self.goal is None:
            return self.n_prompt + self.generated - done
        return max(0, self.goal - done)

    @property
    def decoding(self) -> bool:
        """Nothing is left to compute but the token that was sampled last; of a interactive
        sequence, the last token that it knows."""
        if not self.running or self.remaining != 1:
            return False
        return self.generated > 0 if self.goal is None else self.goal == self.known


@dataclass(frozen=True, slots=True)
class StepView:
    """The whole system before a step. Valid while `Policy.plan` runs; a `SequenceView` taken from
    it stays true to that moment.

    `step`: how many steps have been computed. `running`: in the order of admission. `waiting`: in
    the order of arrival, preempted ones first. `decoding`: id -> 1 for the running sequences that
    decode, ready to be taken into a plan whole. `prefilling`: the other running ones that have
    something to compute. `kv_promised`: cells that running sequences need for tokens that they
    know already; `kv_free - kv_promised` is what a newcomer may count on. `cost`: the device's cost
    model, when there is one: `cost.predict(rows, prefill, kv, n_seqs)` is the seconds of a step of
    `rows` rows, `prefill` of them of prompts, of `n_seqs` sequences that hold `kv` cells; of a step
    of all that run `kv` is `kv_attended`. `kv_pool`: that, where all share a pool of cells.
    """

    now: float
    limits: Limits
    running: SequenceList
    waiting: SequenceList
    decoding: Mapping[int, int]
    prefilling: SequenceList
    kv_free: int
    kv_promised: int = 0
    cost: Any = None
    step: int = 0
    tenants: Tenants = field(default_factory=Tenants)
    kv_alone: Callable[[int], int] | None = None
    slot_of: Callable[[int], int] | None = None
    kv_pool: int | None = None

    def frees(self, seq: SequenceView) -> int:
        """Cells that are free when a running sequence is preempted: those that no other running one
        shares with it."""
        return seq.computed if self.kv_alone is None else self.kv_alone(seq.id)

    def slot(self, id: int) -> int:
        """Where a running sequence runs. Where every one has a stream of cells of its own, those in
        consecutive slots share a ubatch. In a view made by hand: where it stands among them."""
        if self.slot_of is not None:
            return self.slot_of(id)
        return [seq.id for seq in self.running].index(id)

    @property
    def kv_total(self) -> int:
        return self.limits.n_cells

    @property
    def kv_attended(self) -> int:
        """Cells that attention looks over when all decode, for `cost`: in a pool that all share
        kept ones, too, and free ones that its kernels compute."""
        return self.kv_total - self.kv_free if self.kv_pool is None else self.kv_pool

    @property
    def can_admit(self) -> bool:
        """Somebody waits, and there is a slot."""
        return len(self.waiting) > 0 and len(self.running) < self.limits.n_seq_max

    @classmethod
    def of(
        cls,
        limits: Limits,
        running: Iterable[SequenceView] = (),
        waiting: Iterable[SequenceView] = (),
        *,
        now: float = 0.0,
        cost: Any = None,
        step: int = 0,
    ) -> StepView:
        """A view made by hand, to try a policy with no engine: the rest follows from the
        sequences."""
        running, waiting = SequenceList(running), SequenceList(waiting)
        return cls(
            now=now,
            limits=limits,
            running=running,
            waiting=waiting,
            decoding={s.id: 1 for s in running if s.decoding},
            prefilling=SequenceList(s for s in running if s.remaining and not s.decoding),
            kv_free=limits.n_cells - sum(s.computed for s in running),
            kv_promised=sum(s.remaining for s in running),
            cost=cost,
            step=step,
            tenants=Tenants.of(running, waiting),
        )


class Tokens(Mapping[int, int]):
    """`Plan.tokens` that need no loop over those who decode: one for each of `decoding`, but not
    for those in `without`, and what `others` (no decoding ones) get."""

    __slots__ = ("_n", "decoding", "others", "without")

    def __init__(
        self, decoding: Mapping[int, int], others: Mapping[int, int], without: Collection[int] = ()
    ) -> None:
        self.decoding = decoding
        self.others = others
        self.without = without
        self._n = len(decoding) - len(without) + len(others)

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[int]:
        decoding = (id for id in self.decoding if id not in self.without)
        return chain(decoding if self.without else self.decoding, self.others)

    def __getitem__(self, id: int) -> int:
        if id in self.decoding and id not in self.without:
            return 1
        return self.others[id]

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(frozen=True, slots=True)
class Plan:
    """What the next step is to be.

    `tokens`: how many tokens each sequence advances; a waiting sequence named here is admitted.
    `preempt`: running sequences that give up their cells before the step and wait again.
    `reasons`: why, by sequence id, for the trace; decoding needs none.
    `repeat`: for how many steps the policy would plan the same, as long as no sequence comes or
    goes: a bound, the steps end earlier where a budget or the KV cells do. More than 1 is for
    plans of decoding alone.
    `wake`: of an empty plan, until when there is nothing to do, on the scheduler's clock; the
    policy is asked again then, or as soon as a sequence comes or goes.
    """

    tokens: Mapping[int, int] = field(default_factory=dict)
    preempt: tuple[int, ...] = ()
    reasons: Mapping[int, str] = field(default_factory=dict)
    repeat: int = 1
    wake: float | None = None

    @property
    def n_rows(self) -> int:
        return sum(self.tokens.values())
