"""What a policy sees and what it answers: frozen values, no behaviour.

A sequence has tokens that are *known* (its prompt and what it has generated) and tokens that are
*computed* (in the KV cache). Every step advances some sequences by some of their known tokens. A
sequence whose last known token gets computed samples one more. There is no prefill phase and no
decode phase: a decode is an advance by the last known token, and samples the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyllamabatch.cost.step_cost import StepCost

from .queue import SequenceList

EMPTY: Mapping[int, Any] = {}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may not exceed.

    - n_batch: rows of one step.
    - n_ubatch: rows that the device computes at a time.
    - n_seq_max: sequences that run at once.
    - n_cells: KV cells of all sequences together. n_cells_seq: of one sequence.
    - unified: all sequences share one pool of cells; else each has a stream of its own.
    - gap_max: with streams, so many empty slots in a row are filled with rows that no sequence
      sees, so that those around them are computed together (`Stepper`'s gap_max).
    - behind: with streams, a call's prompts may be computed behind its rows that decode. fills: and
      filled up to the same number of rows, so that several are computed together.
    - n_draft_max: drafted tokens of a sequence in a step; 0: none ever. n_outputs: rows of a step
      that may have an output, drafted ones included; 0: all. drafts_take_time: they are asked for
      before each step that may have them. even: also in a pool all sequences of a step with drafts
      have the same number of rows (`even_rows`)."""

    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_cells: int
    n_cells_seq: int
    unified: bool = True
    gap_max: int = 0
    behind: bool = True
    fills: bool = False
    n_draft_max: int = 0
    n_outputs: int = 0
    drafts_take_time: bool = False
    even: bool = False

    @property
    def most_cells(self) -> int:
        """That a sequence can have."""
        return min(self.n_cells_seq, self.n_cells)

    @property
    def rows_together(self) -> int:
        """Of prompts that are filled up and computed together at most, those that fill included."""
        return min(self.n_ubatch, self.n_batch - self.n_seq_max)

    @property
    def even_rows(self) -> bool:
        """All sequences of a step with drafts have as many rows as the one with most."""
        return self.even or not self.unified


class Prefix(NamedTuple):
    """What a waiting sequence need not compute, if it were admitted now.

    - hit: so many of its tokens are in the cache, or in its own saved state. Of a running sequence:
      so many were, when it was admitted.
    - cells: free cells that it would take for these.
    - pending: a running sequence is computing so many tokens that this one begins with, too: more
      than the hit, and worth waiting for. 0 when there is none."""

    hit: int = 0
    cells: int = 0
    pending: int = 0


NO_PREFIX = Prefix()


class SequenceView(NamedTuple):
    """One sequence, as it is before the step. Times are in seconds on the scheduler's clock.

    - known = n_prompt + generated tokens, of which `computed` are in the cache. `remaining`: what a
      step may advance it by.
    - priority: larger goes first. deadline: when it should be done. ttft_target, itl_target: the
      most seconds that its reader likes from its arrival to its first token, and between two.
    - prefix: what it need not compute.
    - queued: `StepView.step` when it joined the waiting queue, last time. turn: tokens generated
      since it was admitted, last time.
    - goal: None for a request. An interactive sequence computes its first `goal` known tokens: all
      of them when its owner wants the next token, all but the last one of a prompt. At its goal it
      is idle, and keeps its slot and its cells."""

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
    prefix: Prefix = NO_PREFIX
    preemptions: int = 0
    goal: int | None = None
    ttft_target: float | None = None
    itl_target: float | None = None
    queued: int = 0
    turn: int = 0

    @property
    def known(self) -> int:
        return self.n_prompt + self.generated

    @property
    def remaining(self) -> int:
        """Known tokens that are to compute. 0 only while an interactive sequence is idle."""
        done = self.computed if self.running else max(self.computed, self.prefix.hit)
        if self.goal is None:
            return self.n_prompt + self.generated - done
        return max(0, self.goal - done)

    @property
    def decoding(self) -> bool:
        """Nothing is left to compute but the last token that it knows, to sample the next one."""
        return self.running and self.remaining == 1 and self.goal in (None, self.known)


class KvView(NamedTuple):
    """The KV cells before a step.

    - free: cells that no running sequence holds; cached prefixes are dropped when they are needed.
    - promised: cells that running sequences need for tokens that they know already.
      `free - promised` is what a newcomer may count on.
    - attended: cells that attention looks over when all decode, for `cost`. In a pool that all
      share, cached ones count, and free ones that its kernels compute.
    - freed_by(*ids): cells that are free when these running sequences are preempted: those that no
      other running one shares with them.
    - slot_of(id): where a sequence runs. Of streams, those in consecutive slots share a ubatch."""

    free: int
    promised: int
    attended: int
    freed_by: Callable[..., int]
    slot_of: Callable[[int], int]


class Prices(NamedTuple):
    """With these a step has as many drafted rows as give most tokens a second, if that is `gain`
    more than without.

    - seconds, worst: of steps of 0, 1, ... rows, as they are expected, and if they take longer.
      seconds 0: there is to be no such step.
    - credit: seconds that drafts may lose at worst. What they lose and gain changes it; below 0
      there are none.
    - new_graph: seconds that a step takes longer where it has not as many rows as the last one with
      drafts.
    - begin: seconds that it takes to begin with drafts, for a draft model to compute what it lacks.
      There has to be so much credit."""

    seconds: npt.NDArray[np.float64]
    worst: npt.NDArray[np.float64]
    credit: float
    gain: float = 0.0
    new_graph: float = 0.0
    begin: float = 0.0


class Drafts(NamedTuple):
    """What is known of drafts, for `Speculate`.

    - n_max: drafted tokens of a sequence in a step at most.
    - ids: the sequences that decode and may have drafts. The arrays are in their order.
    - found, right: shape (len(ids), n_max): how often, lately, there was a draft with more than i
      tokens, and how often so many of them were right. 0 of a sequence that is new, and of one of
      which there was none.
    - n_seen: for so many steps that is known of each, 0 of one that is new.
    - n_left: tokens that each may still generate.
    - width: rows of a step without drafts. room: rows that a step with drafts may have.
    - even: all sequences of a step have the same number of rows.
    - n_calm: for so many steps these have decoded, and none of them had a draft.
    - untimed: so many steps without drafts are to be timed before prices tell anything.
    - prices(): of steps of up to `room` rows, by the cost model and by the time of such steps. None
      without a cost model."""

    n_max: int
    ids: list[int]
    found: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    n_seen: npt.NDArray[np.int64]
    n_left: npt.NDArray[np.int64]
    width: int
    room: int
    even: bool
    prices: Callable[[], Prices] | None
    n_calm: int = 0
    untimed: int = 0


class StepView(NamedTuple):
    """The whole system before a step. Valid while `Policy.plan` runs; a `SequenceView` taken from
    it stays true to that moment.

    - running: in the order of admission. waiting: in the order of arrival, preempted ones first.
    - decoding: ids of the running sequences that decode. prefilling: the other running ones that
      have something to compute.
    - cost: the device's cost model, or None. `cost.predict(rows, prefill, kv, n_seqs)` is the
      seconds of a step of `rows` rows, `prefill` of them of prompts, of `n_seqs` sequences that
      attend `kv` cells.
    - step: how many steps have been computed; one in parts counts for each (`Step.parts`).
    - drafts(): see `Drafts`; None where there are never any. What it takes to look at it, and to
      plan again the sooner for it, is lost as drafts can lose time. drafts_in: after how many steps
      it is to be looked at, 0: now; None: that is not paid for.
    """

    now: float
    limits: Limits
    running: SequenceList
    waiting: SequenceList
    decoding: Set[int]
    prefilling: SequenceList
    kv: KvView
    cost: StepCost | None = None
    step: int = 0
    drafts: Callable[[], Drafts] | None = None
    drafts_in: int | None = 0

    @property
    def can_admit(self) -> bool:
        """A sequence waits, and there is a slot."""
        return len(self.waiting) > 0 and len(self.running) < self.limits.n_seq_max

    @classmethod
    def of(
        cls,
        limits: Limits,
        running: Iterable[SequenceView] = (),
        waiting: Iterable[SequenceView] = (),
        *,
        now: float = 0.0,
        cost: StepCost | None = None,
        step: int = 0,
    ) -> StepView:
        """A view made up, to try a policy with no engine: the rest follows from the sequences,
        which run in slots 0, 1, ... and share nothing."""
        running = SequenceList(running)
        computed = {seq.id: seq.computed for seq in running}
        held = sum(computed.values())
        promised = sum(seq.remaining for seq in running)
        free = limits.n_cells - held

        def freed_by(*ids: int) -> int:
            return sum(computed[id] for id in ids)

        return cls(
            now=now,
            limits=limits,
            running=running,
            waiting=SequenceList(waiting),
            decoding=dict.fromkeys(seq.id for seq in running if seq.decoding).keys(),
            prefilling=SequenceList(s for s in running if s.remaining and not s.decoding),
            kv=KvView(free, promised, held, freed_by, [*computed].index),
            cost=cost,
            step=step,
        )


class Plan(NamedTuple):
    """What the next step is to be.

    - tokens: how many tokens each sequence advances, by id. A waiting one named here is admitted.
    - decode_all: every sequence of `StepView.decoding` advances by one, too, but those in `sit_out`
      and those that are preempted. `tokens` names none of them then.
    - preempt: running sequences that give up their cells before the step and wait again.
    - reasons: why, by sequence id, for the trace; decoding needs none.
    - repeat: for how many steps the policy would plan the same, as long as no sequence comes or
      goes. A bound: the steps end earlier where a budget or the KV cells do. More than 1 is for
      plans of decoding alone.
    - wake: of an empty plan, until when there is nothing to do, on the scheduler's clock. The
      policy is asked again then, or as soon as a sequence comes or goes.
    - drafts: how many drafted tokens each sequence may add to each step, by id, in a plan of
      decoding alone; see `Drafts`. Those that turn out to be right are sampled in the same step.
    - prices: how many of these each step has; None: all that are drafted.
    - cut: `repeat` is smaller than it would be without a look at drafts."""

    tokens: Mapping[int, int] = EMPTY
    preempt: tuple[int, ...] = ()
    decode_all: bool = False
    sit_out: Set[int] = frozenset()
    reasons: Mapping[int, str] = EMPTY
    repeat: int = 1
    wake: float | None = None
    drafts: Mapping[int, int] = EMPTY
    prices: Prices | None = None
    cut: bool = False

    def advances(self, view: StepView) -> dict[int, int]:
        """All sequences that have rows in this plan, by how many tokens they advance."""
        if not self.decode_all:
            return dict(self.tokens)
        out = self.sit_out | set(self.preempt)
        return {id: 1 for id in view.decoding if id not in out} | dict(self.tokens)
