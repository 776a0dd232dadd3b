"""The scheduler: which sequence runs, holds which slot and cells, and advances by how much.

Pure state. Time comes in as an argument; nothing here sleeps, starts a thread or knows libllama.
The live engine and the simulator drive the same object:

    step = scheduler.plan(now)       # ask the policy, check its plan, place newcomers
    ... carry out step.kv_operations, compute the step's rows ...
    scheduler.advance(step)          # every row is in the cache, every full sequence sampled;
                                     # up to `step.repeat` times without another plan
    scheduler.remove(id)             # a sequence that is done, at any time between steps

A step that could not be computed is simply not advanced: the next `plan` starts from the same
counters. Counters live in arrays by slot, so that a step of pure decoding costs no Python per
sequence; views are made when a policy looks at them."""

import copy
from collections.abc import Hashable
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from ..cost.step_cost import StepCost
from ..errors import RequestTooLong
from ..kv import KvAccounting, KvOperation
from .admission import Admission
from .attention import Attention
from .deadlines import Deadlines
from .drafting import Drafted, Drafting
from .gather import CostWindow, Gather
from .idle import PATIENCE_SECONDS, IdleSequences
from .interactive import Interactive
from .invariance import Computed
from .kv_options import KvOptions, Pool
from .policies.composed import ComposedPolicy
from .policies.device_aware import device_aware
from .policies.speculate import ByGain
from .policy import Policy, check_policy
from .progress import Progress
from .queue import SequenceList
from .rules import CheckedRows, check_plan
from .running import Entry, KnownTokens
from .sequences import Sequences
from .step import NO_SLOTS, Counters, Step
from .step_builder import Moved, Placed, StepBuilder
from .view import Drafts, KvView, Limits, SequenceView, StepView
from .way_back import WayBack


class Pause(NamedTuple):
    """Why the policy is not asked again, until something changes: its plan was empty (`stuck`: no
    sequence found room), and it wants to wait until `wake`. `n_changes`: see `Sequences`."""

    n_changes: int = -1
    stuck: bool = False
    wake: float | None = None


NO_PAUSE = Pause()


class Scheduler:
    """`limits`: what the context can take. `policy`: default `device_aware()`; where drafts
    are possible, one of parts has one for them. `kv`: sharing and
    swapping. `cost`: the device's cost model, passed on to `policy` and `gather`.

    For interactive sequences: `gather`, how long a step waits for them, default `CostWindow()`;
    `patience`, seconds that one may be idle while others wait for its slot or its cells."""

    def __init__(
        self,
        limits: Limits,
        policy: Policy | None = None,
        *,
        kv: KvOptions | None = None,
        cost: StepCost | None = None,
        gather: Gather | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        kv = kv or KvOptions()
        n_slots = limits.n_seq_max + kv.sharing.n_cached
        # Streams for what is cached are beside those of the limits.
        self._n_cells_behind = 0 if limits.unified else kv.sharing.n_cached * limits.n_cells_seq
        behind = limits.behind and kv.invariance is None
        fills = behind and not limits.unified and kv.sharing.fills
        self.limits = replace(limits, behind=behind, fills=fills)
        policy = device_aware() if policy is None else check_policy(policy, policy)
        if limits.n_draft_max and isinstance(policy, ComposedPolicy) and policy.speculate is None:
            policy = copy.copy(policy)  # a subclass may be made otherwise, and have more
            object.__setattr__(policy, "speculate", ByGain())
        self.policy = policy
        self._pool = kv.pool  # what streams may become
        self.most_cells = (kv.pool or self).limits.most_cells
        """Cells that a sequence can have, also where there would be a pool first."""
        self._way_back = None if kv.pool is None else WayBack(Pool(self.limits, kv.sharing))
        self.invariance = kv.invariance
        if kv.invariance is not None and limits.unified:
            raise ValueError("a pool of cells is not batch-invariant")
        self._outgrown: set[int] = set()  # ids of those that need a pool now
        self.counters = Counters()
        self.deadlines = Deadlines()
        self.accounting = KvAccounting(
            limits.n_cells + self._n_cells_behind,
            n_slots,
            unified=limits.unified,
            n_cells_seq=limits.n_cells_seq,
        )
        self.admission = Admission(self.accounting, kv.sharing, retain=kv.retain, swap=kv.swap)
        self.idle_sequences = IdleSequences(gather or CostWindow(), patience)
        self.sequences = Sequences(
            self.accounting, self.admission, self.idle_sequences, self.counters, self._left
        )
        self.interactive = Interactive(
            self.sequences, self.admission, self.idle_sequences, self._claim
        )
        self.drafting = Drafting(limits, n_slots, kv.invariance) if limits.n_draft_max else None
        self.set_cost(cost)
        self._last_pause = NO_PAUSE

    def set_cost(self, cost: StepCost | None) -> None:
        """The cost model from now on."""
        self.cost = cost
        self.attention = Attention(self.limits, self.accounting, self.sequences.running, cost)
        self._builder = StepBuilder(
            self.limits, self.sequences, self.admission, cost, self.invariance, self._alone
        )
        self.padding, self.compaction = self._builder.padding, self._builder.compaction
        self._progress = Progress(
            self.sequences,
            self.idle_sequences,
            self.counters,
            self.attention,
            self.drafting,
            self._builder,
        )

    # -- sequences come and go

    def add(
        self,
        id: int,
        n_prompt: int,
        max_tokens: int,
        *,
        arrival: float,
        priority: int = 0,
        tenant: str = "",
        deadline: float | None = None,
        ttft_target: float | None = None,
        itl_target: float | None = None,
        interactive: bool = False,
        space: Hashable = None,
        saved: int = 0,
        restored: Computed | None = None,
        tokens: KnownTokens | None = None,
    ) -> None:
        """A new sequence joins the waiting queue. Ids are never reused. For `arrival` and what
        follows see `SequenceView`.

        - interactive: it gets a token each time that it is asked for one; `max_tokens` is 1 then.
        - space: only sequences of the same one start from each other.
        - saved: positions that it has in a saved state, fewer than it knows tokens.
        - restored: how tokens of an interactive one were computed elsewhere; they are computed
          again in the same way, if on this grid.
        - tokens: where its tokens are read; without it, it shares nothing."""
        if n_prompt < 1 or max_tokens < 1:
            raise ValueError(
                f"n_prompt and max_tokens are at least 1, got {n_prompt}, {max_tokens}"
            )
        if id in self.sequences:
            raise ValueError(f"sequence {id} is here already")
        self.check_fits(n_prompt, max_tokens)
        self._claim(id, n_prompt + min(1, max_tokens - 1))  # an answer is seldom of one token
        goal = None
        if interactive:  # what was computed before is brought back when its owner wants more
            goal = 0 if saved or restored else n_prompt - 1
        view = SequenceView(
            id=id,
            arrival=arrival,
            n_prompt=n_prompt,
            max_tokens=max_tokens,
            priority=priority,
            tenant=tenant,
            deadline=deadline,
            goal=goal,
            ttft_target=ttft_target,
            itl_target=itl_target,
            queued=self.counters.steps,
        )
        if deadline is not None:
            self.deadlines.add(id, deadline)
        self.admission.add(id, space, saved)
        entry = Entry(view, tokens)
        if self.invariance is not None:
            if restored is not None and restored.grid != self.invariance.grid:
                restored = None
            entry.computed = restored or Computed(self.invariance.grid, n_prompt)
            entry.tokens = None if saved else tokens  # others had these bits from elsewhere
        self.sequences.add(entry)

    def loads(self, how: Computed | None) -> bool:
        """Whether a sequence may go on from the saved state of tokens that were computed so. With
        an `Invariance` only where that is known, and not with a sliding window: a state leaves the
        cells out that no window reaches, and the others come back in another order."""
        if self.invariance is None:
            return True
        known = how is not None and how.grid == self.invariance.grid
        return known and not self.admission.cache.sharing.window

    def check_fits(self, n_prompt: int, max_tokens: int) -> None:
        """RequestTooLong when the request could not finish even with the cache to itself. The
        token that is sampled last is never computed, so it needs no cell."""
        limit = self.most_cells  # not what there is now: any thread may ask
        if n_prompt + max_tokens - 1 > limit:
            raise RequestTooLong(
                "prompt",
                f"{n_prompt} tokens",
                f"with max_tokens={max_tokens} it needs {n_prompt + max_tokens - 1} KV cells, "
                f"a sequence of this engine can have {limit}",
            )

    def _claim(self, id: int, n_cells: int) -> None:
        """A sequence has so many cells to fill: if that is more than a stream has, there will be a
        pool. RequestTooLong when a pool has not so many."""
        self.check_fits(n_cells, 1)
        self._outgrown.discard(id)
        if n_cells > self.limits.most_cells:
            self._outgrown.add(id)

    def remove(self, id: int, *, worth: bool = True, wanted: bool = False) -> int | None:
        """A sequence ends, for whatever reason. Returns the slot it ran in, which is free from now
        on, or None when it was waiting. `worth`: what it holds is right, and may be cached.
        `wanted`: others are going to start from it. KeyError when there is no such sequence."""
        self.deadlines.remove(id)
        self._outgrown.discard(id)
        retain = worth and self.admission.cache.retain
        return self.sequences.remove(id, retain=retain, wanted=wanted)

    def preempt(self, id: int, *, worth: bool = True) -> int:
        """A running sequence gives up its cells and its slot, which is returned, and waits to run
        again. `worth`: what it holds is right, and may be cached or saved. KeyError when it does
        not run."""
        return self.sequences.preempt(id, retain=worth)

    def preempt_newest(self) -> tuple[int, int] | None:
        """The cache turned out to be fuller than the accounting says: the newest running sequence
        is preempted, and none is admitted until another one leaves. Returns its (id, slot), or None
        when no more than one runs."""
        return self.sequences.preempt_newest()

    # -- steps

    def view(self, now: float) -> StepView:
        sequences = self.sequences
        running = sequences.running
        kv = KvView(
            self.accounting.free - self._n_cells_behind,
            sequences.promised,
            self.attention.of_all(),
            self._freed_by,
            self._slot_of,
        )
        return StepView(
            now,
            self.limits,
            running,
            SequenceList() if sequences.closed and running.ids else sequences.waiting,
            running.decoding,
            sequences.prefilling,
            kv,
            self.cost,
            self.counters.steps,
            None if self.drafting is None else self._drafts,
            None if self.drafting is None else self.drafting.due,
        )

    def _drafts(self) -> Drafts:
        """Interactive sequences, whose owners ask for each token, have none."""
        assert self.drafting is not None
        running = self.sequences.running
        slots = running.decode_slots
        if running.asked:
            slots = running.decode_slots_but([*running.asked], [])
        most = np.minimum(running.most[slots], self.limits.most_cells)
        n_left = most - running.computed[slots]
        attended = self.attention.of_all()
        return self.drafting.view(
            slots, running.owner[slots], n_left, attended, self.cost, self.padding.graph
        )

    def plan(self, now: float) -> Step | None:
        """Ask the policy for the next step and apply its plan: preempt, admit, name the rows. A
        step without rows has operations to carry out, and nothing else. None when there is nothing
        to do, no room for those that wait, or the policy wants to wait: `hold` says for how long.
        PlanError, and nothing has changed, when the plan breaks a rule."""
        if self.idle:  # an engine may have given its cells up
            return self._without_rows()
        if self._goes_back():
            return self._become_streams()
        if self._outgrown:
            return self._become_pool(self.cost)
        sequences = self.sequences
        sequences.now = now
        if preempted := self._preempt_idle():
            return Step(NO_SLOTS, (), preempted, (), 0, {}, kv_operations=self.take_kv_operations())
        self.idle_sequences.ready_at = None
        self.admission.cache.make_checkpoints()
        sequences.refresh()
        if self.drafting is not None:
            self.drafting.planned(sequences.n_changes)
        view = self.view(now)
        plan, rows = check_plan(self.policy.plan(view), view)
        nothing = not (rows.n_decodes or rows.others or plan.preempt)
        self._last_pause = Pause(sequences.n_changes, nothing, plan.wake)
        if nothing:
            return self._without_rows()
        preempted = tuple((id, sequences.preempt(id, retain=True)) for id in plan.preempt)
        moved, admitted = self._admit(rows) if rows.others else ((), ())
        step = self._builder.build(plan, rows, preempted, admitted, moved)
        if self.drafting is not None:
            self.drafting.cuts = plan.repeat if plan.cut else 0
            if self.drafting.looked:
                self.drafting.stands = 0 if plan.drafts else self.drafting.cuts
            for _, source, slot in step.moved:
                self.drafting.move(source, slot)
        return step

    def _become_pool(self, streams: StepCost | None) -> Step:
        """streams: what their steps take; None: the pool stays."""
        assert self._pool is not None
        assert self._way_back is not None
        self._way_back.to_pool(streams)
        pool, self._pool = self._pool, None
        return self._become("pool", pool)

    def _become_streams(self) -> Step:
        assert self._way_back is not None
        self._way_back.to_streams(self.cost)
        self._pool = Pool(self.limits, self.admission.cache.sharing)
        return self._become("streams", self._way_back.streams)

    def stay_pool(self) -> None:
        """The streams that a step said can't be had: there is a pool, from now on for good."""
        self._become_pool(None)

    def _goes_back(self) -> bool:
        """Whether a pool is streams again from now on."""
        way = self._way_back
        if way is None or self._pool is not None or not way.pays(self.accounting.used):
            return False
        most = way.streams.limits.most_cells
        if not self._outgrown and all(view.known <= most for view in self.sequences.all()):
            return True
        way.needs_pool()
        return False

    def _become(self, kind: Literal["pool", "streams"], layout: Pool) -> Step:
        """What runs is preempted, nothing stays cached, and the cells are divided so."""
        sequences, admission = self.sequences, self.admission
        preempted = tuple(
            (id, sequences.preempt(id, retain=False)) for id in reversed(self.running_ids())
        )
        admission.cache.drop_all()
        operations = self.take_kv_operations()
        self.limits, sharing = limits, _ = layout
        self._outgrown.clear()
        self._n_cells_behind = 0 if limits.unified else sharing.n_cached * limits.n_cells_seq
        n_cells = limits.n_cells + self._n_cells_behind
        self.accounting.reset(n_cells, limits.unified, limits.n_cells_seq)
        for id, prefix in admission.restart(sharing):
            sequences.waiting.put(id, prefix=prefix)
        if self.drafting is not None:
            self.drafting.limits = limits
        self.set_cost(self.cost)
        self.counters.layout_changes += 1
        becomes = KvOperation(kind, -1, n=n_cells)
        return Step(NO_SLOTS, (), preempted, (), 0, {}, kv_operations=(*operations, becomes))

    def renewed(self, cost: StepCost | None, seconds: float) -> None:
        """The memory has become what a step said, in `seconds`. cost: of its steps."""
        self.set_cost(cost)
        if self._way_back is not None:
            self._way_back.seconds = seconds

    def _preempt_idle(self) -> Placed:
        """The interactive sequence that is idle longest, if that is too long and others need its
        room."""
        sequences = self.sequences
        id = self.idle_sequences.overdue(sequences.now)
        if id is None:
            return ()
        no_slot = len(sequences.running.ids) == self.limits.n_seq_max and sequences.waiting.ids
        if not (self._pause.stuck or no_slot):
            return ()
        return ((id, sequences.preempt(id, retain=True)),)

    def _admit(self, rows: CheckedRows) -> tuple[tuple[Moved, ...], Placed]:
        """Others that moved, so that newcomers are neighbours; and these. One that had better wait
        for another of them stays where it is."""
        waiting = self.sequences.waiting.ids
        newcomers = {id: n for id, n in rows.others.items() if id in waiting}
        moved = self._builder.side_by_side(newcomers, rows)
        n_rows = rows.n_decodes + sum(rows.others.values())
        admitted: list[tuple[int, int]] = []
        fresh: set[int] = set()
        for id in newcomers:
            alone = not (rows.n_decodes or len(rows.others) > len(newcomers) or fresh)
            slot = self.sequences.admit(id, self.accounting.free - n_rows, fresh, alone=alone)
            if slot is not None:
                admitted.append((id, slot))
                fresh.add(slot)
        self.admission.cache.next_slots = []
        return moved, tuple(admitted)

    def _without_rows(self) -> Step | None:
        operations = self.take_kv_operations()
        if not operations:
            return None
        return Step(NO_SLOTS, (), (), (), 0, {}, kv_operations=operations)

    def advance(
        self, step: Step, n: int = 1, now: float | None = None, drafted: Drafted | None = None
    ) -> None:
        """`step` has been computed, `n` times of the `step.repeat` that it may be: its rows are in
        the cache, and every sequence of `step.decode` knows one token more, each time; or as many
        as `drafted` says. `now`: when its results were there; without it, when it was planned."""
        self._count_back(step, n)
        self.admission.cache.computed()
        self._progress.advance(step, n, now, drafted)
        if self._pool is not None:
            self._reached_ends(step)

    def _count_back(self, step: Step, n: int) -> None:
        """What `n` times this step lose in a pool, or save in streams."""
        way = self._way_back
        if way is None or not way.counts or not step.n_rows or self.cost is None:
            return
        held, pool = self.accounting.held_by_slot[step.slots], self.limits.unified
        longest = int(held.max()) + max(n, *(chunk.n for chunk in step.chunks), 0)
        if pool and longest > way.streams.limits.most_cells:
            way.needs_pool()
            return
        cells = self.attention.cells(step, n / 2) if pool else self.accounting.used
        way.computed(step, n, int(held.sum()), cells, self.cost)

    def _reached_ends(self, step: Step) -> None:
        """Those whose stream is full need a pool for the token that they have sampled last. An
        interactive one does when its owner asks for another."""
        running = self.sequences.running
        full = step.decode[running.computed[step.decode] == self.limits.most_cells]
        for id in (running.owner[full] - 1).tolist():
            if running.ids[id].view.goal is None:
                self._outgrown.add(id)

    def advance_alone(self, step: Step, n: int, now: float, seconds: float) -> None:
        """The step of an interactive sequence that was alone, once computed and advanced, was
        computed `n` times more, for as many tokens that its owner asked for without a word. `now`:
        when the last of them was there; `seconds`: what each took. Nothing else has changed since
        it was planned."""
        self._count_back(step, n)
        self._progress.advance_alone(step, n, now, seconds)

    def hold(self, now: float) -> float:
        """Seconds that the next `plan` had better wait, unless something is added or asked for
        meanwhile: for interactive sequences that are about to ask, because there is nothing to do
        before one has been idle for too long, or because the policy wants to wait. 0: now."""
        pause = self._pause
        if pause.wake is not None:
            return max(0.0, pause.wake - now)
        if pause.stuck:
            return self.idle_sequences.until_overdue(now)
        sequences = self.sequences
        n_ready = len(sequences.running.decoding) + len(sequences.prefilling.ids)
        return self.idle_sequences.wait(now, n_ready, self.cost, self.accounting.used)

    @property
    def n_awaited(self) -> int:
        """How many interactive sequences have to ask before it is worth to ask `hold` again sooner
        than it has said."""
        pause = self._pause
        paused = pause.stuck or pause.wake is not None
        return 0 if paused else self.idle_sequences.n_awaited

    # -- the KV memory

    @property
    def has_kv_operations(self) -> bool:
        """Whether there are some that no step has brought yet."""
        return bool(self.admission.cache.kv_operations)

    def take_kv_operations(self) -> tuple[KvOperation, ...]:
        """What was decided since the last step, or the last call: to be carried out in this order.
        Every `Step` has taken those before it already."""
        return self.admission.cache.take_kv_operations()

    def kv_failed(self, operation: KvOperation) -> tuple[int, int] | None:
        """The memory refused an operation. Returns the (id, slot) of a sequence that was to run
        from there: it is preempted, and waits to be computed. None when there is none."""
        id, slot = operation.id, operation.slot
        if operation.kind == "remove":
            raise RuntimeError(f"slot {slot} can't be emptied")
        if operation.kind in ("save", "store", "discard"):
            self.admission.drop_saved(id)
            return None
        if self.slot(id) != slot:
            self.admission.cache.drop(slot)
            return None
        if operation.kind != "cut":
            self.admission.isolate(id)  # what was refused once is not tried again
        return id, self.preempt(id, worth=False)

    def copied(self, n_bytes: int, seconds: float, n_tokens: int) -> None:
        """The state of `n_tokens` tokens was copied to the host or back in `seconds`."""
        self.admission.swap.copied(n_bytes, seconds, n_tokens)

    def prefilled(self, n_rows: int, n_prompt: int, seconds: float) -> None:
        """A step of `n_rows` rows took `seconds`. If nearly all, `n_prompt`, are of prompts, that
        is what it takes to compute a sequence again."""
        if n_prompt >= 16 + 8 * (n_rows - n_prompt):
            self.admission.swap.computed(n_rows, seconds)

    def drop_cached(self) -> bool:
        """Nothing stays cached, for the cache is fuller than the accounting says; whether anything
        was."""
        return self.admission.cache.drop_all()

    # -- what there is

    @property
    def n_slots(self) -> int:
        """Slots of the sequences that may run, and of what is cached."""
        return self.accounting.n_seq_max

    @property
    def n_running(self) -> int:
        return len(self.sequences.running.ids)

    @property
    def n_waiting(self) -> int:
        return len(self.sequences.waiting.ids)

    def waits(self, id: int) -> bool:
        """Whether a sequence is in the waiting queue."""
        return id in self.sequences.waiting.ids

    @property
    def idle(self) -> bool:
        """No sequence has anything to compute."""
        sequences = self.sequences
        return not (sequences.running.decoding or sequences.prefilling.ids or sequences.waiting.ids)

    def running_ids(self) -> tuple[int, ...]:
        return tuple(self.sequences.running.ids)

    def slot(self, id: int) -> int | None:
        """Where a sequence runs; None when it does not."""
        entry = self.sequences.running.ids.get(id)
        return None if entry is None else entry.slot

    def computed(self, slot: int) -> int:
        """Tokens of the sequence in `slot` that are in the cache: its next position."""
        return int(self.sequences.running.computed[slot])

    def sequence(self, id: int) -> SequenceView:
        """KeyError when there is no such sequence."""
        return self.sequences.running.seen(self.sequences[id])

    # -- inside

    def _alone(self) -> bool:
        """Of one sequence that runs: no other one waits, or is about to ask."""
        others = self.sequences.waiting.ids or self.idle_sequences.n_expected
        return not (others or self.deadlines.next is not None)

    @property
    def _pause(self) -> Pause:
        pause = self._last_pause
        return pause if pause.n_changes == self.sequences.n_changes else NO_PAUSE

    def _left(self, entry: Entry) -> None:
        """A running sequence ends or is preempted."""
        ended = getattr(self.policy, "ended", None)
        if ended is not None:
            ended(self.sequences.running.seen(entry))

    def _slot_of(self, id: int) -> int:
        return self.sequences.running.ids[id].slot

    def _freed_by(self, *ids: int) -> int:
        return self.accounting.frees(*map(self._slot_of, ids))
