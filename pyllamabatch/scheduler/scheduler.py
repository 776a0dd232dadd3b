"""The scheduler: which sequence runs, holds which slot and cells, and advances by how much.

Pure state. Time comes in as an argument; nothing here sleeps, starts a thread or knows libllama.
The live engine and the simulator drive the same object:

    step = scheduler.plan(now)       # ask the policy, check its plan, place newcomers
    ... carry out step.kv_operations, compute the step's rows ...
    scheduler.advance(step)          # every row is in the cache, every full sequence sampled;
                                     # up to `step.repeat` times without another plan
    scheduler.remove(id)             # whoever is done, at any time between steps

Sequences that their owners drive by hand (`add(interactive=True)`, `extend`, `ask`, `relax`,
`trim`)
run among the others and rest while there is nothing to compute; `hold` says whether a step should
wait for them (see `gather`).

A step that could not be computed is simply not advanced: the next `plan` starts from the same
counters. Counters live in arrays by slot, so that a step of pure decoding costs no Python per
sequence; views are made when a policy looks at them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from ..kv import Sharing, Slots, SwapChoice
from .gather import Gather
from .interactive import PATIENCE_SECONDS, InteractiveSequences
from .placement import seen_of
from .policies import device_aware
from .policy import Policy, check_policy
from .queue import SequenceList
from .rules import check_plan
from .running import Entry, KnownTokens
from .step import PromptChunk, Shape, Step, spans
from .view import Limits, Plan, SequenceView, StepView, Tokens

AT_ONCE = 32  # steps of decoding that cells are emptied for, if they are there

NOBODY: Slots = np.zeros(0, dtype=np.int32)
NOBODY.flags.writeable = False


class Scheduler(InteractiveSequences):
    """`limits`: what the context can take. `policy`: default `device_aware()`. `gather`: how long a
    step waits for interactive sequences, default `CostWindow()`. `patience`: seconds that a
    sequence may rest while others wait for its slot or its cells; after that it may be preempted.
    `cost`: the device's cost model, passed on to `policy` and `gather`.

    `sharing`: what sequences can take over from each other, default nothing. `retain`: what
    sequences leave behind stays cached, for others that begin in the same way. `swap`: what becomes
    of the preempted, default recompute."""

    def __init__(
        self,
        limits: Limits,
        policy: Policy | None = None,
        *,
        gather: Gather | None = None,
        patience: float = PATIENCE_SECONDS,
        cost: Any = None,
        sharing: Sharing | None = None,
        retain: bool = True,
        swap: SwapChoice | None = None,
    ) -> None:
        super().__init__(limits, gather, sharing or Sharing(), retain, swap)
        self.cost = cost
        self._patience = patience
        self.policy = device_aware() if policy is None else check_policy(policy, policy)

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
        itl_target: float | None = None,
        interactive: bool = False,
        space: Hashable = None,
        saved: int = 0,
        tokens: KnownTokens | None = None,
    ) -> None:
        """A new sequence joins the waiting line. Ids are never reused. For `arrival` and what
        follows see `SequenceView`. `interactive`: it gets a token each time that it is asked for
        one;
        `max_tokens` is 1 then. `space`: only sequences of the same one start from each other.
        `saved`: positions that it has in a saved state, fewer than it knows tokens. `tokens`: where
        its tokens are read; without it, it shares nothing."""
        if n_prompt < 1 or max_tokens < 1:
            raise ValueError(
                f"n_prompt and max_tokens are at least 1, got {n_prompt}, {max_tokens}"
            )
        if id in self._running.ids or id in self._waiting.ids or id in self._aside:
            raise ValueError(f"sequence {id} is here already")
        self.check_fits(n_prompt, max_tokens)
        goal = None
        if interactive:  # what is saved is loaded when its owner wants more
            goal = 0 if saved else n_prompt - 1
        view = SequenceView(
            id=id,
            arrival=arrival,
            n_prompt=n_prompt,
            max_tokens=max_tokens,
            priority=priority,
            tenant=tenant,
            deadline=deadline,
            goal=goal,
            itl_target=itl_target,
            queued=self.counters.steps,
        )
        if deadline is not None:
            self.deadlines.add(id, deadline)
        self.admission.add(id, space, saved)
        self._line_up(Entry(view, self._tenants.number(tenant), tokens))

    def remove(self, id: int, *, worth: bool = True) -> int | None:
        """A sequence ends, for whatever reason. Returns the slot it ran in, which is nobody's from
        now on, or None when it was waiting. `worth`: what it holds is right, and may be kept.
        KeyError when there is no such sequence."""
        self.deadlines.remove(id)
        slot = None
        if id in self._running.ids:
            entry = self._leave(id)
            slot = entry.slot
            self.admission.cache.leaves(
                slot, self._tokens(entry) if worth and self.admission.cache.retain else None
            )
        else:
            self._get_out(id)
            self._changed()
        self.admission.forget(id)
        self._idle.forget(id)
        return slot

    def preempt_newest(self) -> tuple[int, int] | None:
        """The cache turned out to be fuller than the accounting says: the newest running sequence
        gives up its cells, and nobody is admitted until another one leaves. Returns its (id, slot),
        or None when no more than one runs."""
        if len(self._running.ids) < 2:
            return None
        id = next(reversed(self._running.ids))
        slot = self.preempt(id)
        self._short = True
        return id, slot

    # -- steps

    def view(self, now: float) -> StepView:
        return StepView(
            now,
            self.limits,
            self._running,
            SequenceList() if self._short and self._running.ids else self._waiting,
            self._running.decoding,
            self._prefilling,
            self.accounting.free,
            self._promised,
            self.cost,
            self.counters.steps,
            self._tenants,
            self._alone,
            self._slot_of,
            int(self._attended()) if self.limits.unified else None,
        )

    def plan(self, now: float) -> Step | None:
        """Ask the policy for the next step and apply its plan: preempt, admit, name the rows. A
        step without rows has operations to carry out, and nothing else. None when there is nothing
        to do, no room for those who wait, or the policy wants to wait: `hold` says for how long.
        PlanError, and nothing has changed, when the plan breaks a rule."""
        if self.idle:
            return self._without_rows()
        self._now, self._ready_at = now, None
        made_way = self._preempt_idle()
        self.admission.cache.make_checkpoints()
        for id, start in self.admission.refresh():
            hit, cells, pending = seen_of(start)
            self._waiting.put(id, prefix_hit=hit, prefix_cells=cells, prefix_pending=pending)
        view = self.view(now)
        plan = self.policy.plan(view)
        others = self._check(plan, view)
        self._wake = plan.wake
        self._stuck = not len(plan.tokens) and not plan.preempt
        if self._stuck and not made_way:
            return self._without_rows()
        preempted = made_way
        if plan.preempt:
            preempted += tuple((id, self.preempt(id)) for id in plan.preempt)
        tokens, running = plan.tokens, self._running
        n_rows = n_decodes = len(tokens) - len(others)
        new = [id for id in others if id not in running.ids]
        admitted = self._admit_all(new, n_decodes + sum(others.values())) if new else ()
        chunks = []
        for id, n in others.items():
            entry = running.get(id)
            if entry is None:
                continue
            slot, goal = entry.slot, entry.view.goal
            first, known = running.counts[:, slot].tolist()
            n = min(n, (known if goal is None else goal) - first)
            n = self.admission.cache.cut(slot, first, n)
            last = first + n == known
            chunks.append(PromptChunk(id, slot, first, n, last))
            n_rows += n
        asked = self._asked
        for slot, id in asked.items():
            if id in tokens:
                chunks.append(PromptChunk(id, slot, int(running.computed[slot]), 1, True))
        if n_decodes == len(running.decoding) and not asked:
            decode = running.decode_slots
        elif n_decodes == 0:
            decode = NOBODY
        else:
            if isinstance(tokens, Tokens) and tokens.decoding is view.decoding:
                out = tokens.without
            else:
                out = [id for id in running.decoding if id not in tokens]
            decode = running.decode_slots_but([*(running.ids[id].slot for id in out), *asked])
        n_out = len(running.decoding) - n_decodes if self.limits.unified else 0
        repeat = plan.repeat
        if repeat > 1 and asked:
            repeat = 1
        elif repeat > 1:
            left = int((running.most[decode] - running.known[decode]).min())
            repeat = max(1, min(repeat, left, self.accounting.free // n_rows))
        self.admission.cache.make_cells(n_rows * min(repeat, AT_ONCE))
        if repeat > 1:
            repeat = max(1, min(repeat, self.accounting.empty // n_rows))
        return Step(
            decode,
            tuple(chunks),
            preempted,
            admitted,
            n_rows,
            plan.reasons,
            repeat,
            n_out,
            self.take_kv_operations(),
        )

    def _without_rows(self) -> Step | None:
        operations = self.take_kv_operations()
        return Step(NOBODY, (), (), (), 0, {}, kv_operations=operations) if operations else None

    def _admit_all(self, ids: list[int], n_rows: int) -> tuple[tuple[int, int], ...]:
        """Of those that the plan admits, but who had better wait for another of them stays where
        it is. `n_rows`: of the plan."""
        admitted: dict[int, int] = {}
        fresh: set[int] = set()
        for id in ids:
            entry = self._admit(id, self.accounting.free - n_rows, fresh)
            if entry is not None:
                admitted[id] = entry.slot
                fresh.add(entry.slot)
        return tuple(admitted.items())

    def advance(self, step: Step, n: int = 1, now: float | None = None) -> None:
        """`step` has been computed, `n` times of the `step.repeat` that it may be: its rows are in
        the cache, and every sequence whose last known token was among them knows one token more,
        each time. `now`: when its results were there; without it, when it was planned."""
        if not 1 <= n <= step.repeat:
            raise ValueError(f"a step for 1 to {step.repeat} times was computed {n} times")
        if now is not None:
            self._idle.within = (now - self._now) / n
            self._now = now
        counters, running = self.counters, self._running
        decode = step.decode
        n_decodes = len(decode)
        if n_decodes:
            slots = decode.astype(np.intp)  # an index of any other type takes NumPy twice as long
            self.accounting.take_each(slots, n)
            running.computed[slots] += n
            running.known[slots] += n
        n_last = n_interactive = 0
        for chunk in step.chunks:
            slot, end = chunk.slot, chunk.start + chunk.n
            entry = running.ids[chunk.id]
            entry.true = False
            self.accounting.take(slot, chunk.n)
            running.computed[slot] = end
            self._promised -= chunk.n
            n_interactive += chunk.id in running.decoding
            counters.recomputed_rows += max(0, min(end, entry.high) - chunk.start)
            entry.high = max(end, entry.high)
            if chunk.last:
                running.known[slot] += 1
                self._promised += entry.view.goal is None
                n_last += 1
            known = int(running.known[slot])
            if entry.view.goal is not None:
                self._steer(entry, running.seen(entry))
            elif known - end == 1 and known > entry.view.n_prompt:
                self._prefilling.leave(chunk.id)
                running.decodes(chunk.id, slot)
        n_decoded = n * n_decodes + n_interactive
        counters.steps += n
        counters.rows += n * step.n_rows
        counters.decode_rows += n_decoded
        counters.prefill_rows += n * step.n_rows - n_decoded
        counters.tokens += n * n_decodes + n_last
        n_sampled = n_decodes + n_last
        counters.fill[n_sampled] = counters.fill.get(n_sampled, 0) + n

    # -- what there is

    @property
    def n_running(self) -> int:
        return len(self._running.ids)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting.ids)

    def waits(self, id: int) -> bool:
        """Whether a sequence is in the waiting line."""
        return id in self._waiting.ids

    @property
    def idle(self) -> bool:
        """Nobody has anything to compute."""
        return not (self._running.decoding or self._prefilling.ids or self._waiting.ids)

    @property
    def n_idle(self) -> int:
        """Interactive sequences that run and have nothing to compute."""
        return len(self._running.ids) - len(self._running.decoding) - len(self._prefilling.ids)

    def running_ids(self) -> tuple[int, ...]:
        return tuple(self._running.ids)

    def slot(self, id: int) -> int | None:
        """Where a sequence runs; None when it does not."""
        entry = self._running.get(id)
        return None if entry is None else entry.slot

    def computed(self, slot: int) -> int:
        """Tokens of the sequence in `slot` that are in the cache: its next position."""
        return int(self._running.computed[slot])

    def attended_cells(self, step: Step, ahead: float = 0) -> float:
        """Cells that attention looks over in `step`, before it, or when it has been computed
        `ahead` times: all that are held (and the free ones between them, for kernels that compute
        those, too), or where every sequence has a stream of its own those of its sequences."""
        more = step.n_rows * ahead
        if self.limits.unified:
            return self._attended(more)
        return float(self._running.computed[step.slots].sum() + more)

    def _attended(self, more: float = 0) -> float:
        """Of a pool, when so many more are held: they go where cells are free, first."""
        held = self.accounting.used + more
        return (
            max(held, self.accounting.reach) if getattr(self.cost, "computes_masked", 0) else held
        )

    def shapes(self, step: Step, kv: float) -> list[Shape]:
        """What `CostModel.predict` is told of each part of `step`, one of its `parts`, that is
        computed at once. One, but where every sequence has a stream of cells of its own and those
        who decode are not neighbours. kv: cells in sight before it."""
        shape, n = step.shape(kv), len(step.decode)
        if self.limits.unified or n < 2 or step.chunks:
            return [shape]
        found = spans(step.decode, self.accounting.held_by_slot, self.limits.gap_max)
        if found == [(n, n)]:
            return [shape]
        return [(rows, 0, kv * decode / n, rows) for rows, decode in found]

    @property
    def positions(self) -> Any:
        """Next position by slot: int64, shape (n_seq_max,), the scheduler's own array."""
        return self._running.computed

    def sequence(self, id: int) -> SequenceView:
        """KeyError when there is no such sequence."""
        return self._running.seen(self._entry(id))

    # -- inside

    def _check(self, plan: Plan, view: StepView) -> Mapping[int, int]:
        return check_plan(
            plan,
            now=view.now,
            limits=self.limits,
            decoding=view.decoding,
            running=self._running.ids,
            waiting=self._waiting.ids,
            remaining=self._remaining,
            taken=self._taken,
            freed=self._alone,
            n_free=self.accounting.free,
            n_idle=self.n_idle,
        )

    def _remaining(self, id: int) -> int:
        entry = self._running.get(id)
        if entry is None:
            return self._waiting.ids[id].view.remaining
        return self._running.remaining(entry)

    def _taken(self, id: int) -> int:
        return self._waiting.ids[id].view.prefix_cells

    def _slot_of(self, id: int) -> int:
        return self._running.ids[id].slot

    def _alone(self, id: int) -> int:
        """Cells that no other running sequence shares."""
        return self.accounting.live_alone(self._running.ids[id].slot)
