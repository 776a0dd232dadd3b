"""The scheduler: which sequence runs, holds which slot and cells, and advances by how much.

Pure state. Time comes in as an argument; nothing here sleeps, starts a thread or knows libllama.
The live engine and the simulator drive the same object:

    step = scheduler.plan(now)       # ask the policy, check its plan, place newcomers
    ... remove the cells of step.preempted, compute the step's rows ...
    scheduler.advance(step)          # every row is in the cache, every full sequence sampled;
                                     # up to `step.repeat` times without another plan
    scheduler.remove(id)             # whoever is done, at any time between steps

Sequences that their owners drive by hand (`add(by_hand=True)`, `extend`, `ask`, `relax`, `trim`)
run among the others and rest while there is nothing to compute; `hold` says whether a step should
wait for them (see `gather`).

A step that could not be computed is simply not advanced: the next `plan` starts from the same
counters. Counters live in arrays by slot, so that a step of pure decoding costs no Python per
sequence; views are made when a policy looks at them.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from ..errors import RequestTooLong
from ..kv import KvLedger, Slots
from .deadlines import Deadlines
from .gather import Gather, Resting, Window
from .policies import fcfs
from .policy import Policy
from .rules import check_plan
from .step import Chunk, Counters, Step
from .view import Limits, Plan, SequenceView, StepView

PATIENCE_SECONDS = 0.5


@dataclass(slots=True)
class _Entry:
    """One sequence. While it runs its counters are the scheduler's arrays at `slot`."""

    view: SequenceView
    slot: int = -1
    high: int = 0  # tokens that were computed at least once


class Scheduler:
    """`limits`: what the context can take. `policy`: default `fcfs()`. `gather`: how long a step
    waits for hand-driven sequences, default `Window()`. `patience`: seconds that a sequence may
    rest while others wait for its slot or its cells; after that it may be preempted. `cost`: the
    device's cost model, passed on to `policy` and `gather`."""

    def __init__(
        self,
        limits: Limits,
        policy: Policy | None = None,
        *,
        gather: Gather | None = None,
        patience: float = PATIENCE_SECONDS,
        cost: Any = None,
    ) -> None:
        self.limits = limits
        self.policy = policy or fcfs()
        self.cost = cost
        self.counters = Counters()
        self.ledger = KvLedger(
            limits.n_cells,
            limits.n_seq_max,
            unified=limits.unified,
            n_cells_seq=limits.n_cells_seq,
        )
        # Counters of the running sequences, by slot; 0 where nobody runs.
        self._counts = np.zeros((2, limits.n_seq_max), dtype=np.int64)
        self._computed, self._known = self._counts
        self._most = np.zeros(limits.n_seq_max, dtype=np.int64)  # what `known` is at the very end
        self._promised = 0  # their known tokens that are not computed yet
        self._free_slots = list(range(limits.n_seq_max))  # a heap
        # A running sequence is in `_running`, and unless it rests in one of `_prefilling` and
        # `_decoding` (id -> slot). One that does not run is in `_waiting`, or `_aside` if it rests.
        self._running: dict[int, _Entry] = {}
        self._prefilling: dict[int, _Entry] = {}
        self._decoding: dict[int, int] = {}
        self._waiting: OrderedDict[int, _Entry] = OrderedDict()
        self._aside: dict[int, _Entry] = {}
        self._asked: dict[int, int] = {}  # slot -> id of the hand-driven ones in `_decoding`
        self.deadlines = Deadlines()
        self._resting = Resting(gather or Window())
        self._patience = patience
        self._ready_at: float | None = None  # when there was something to compute for this step
        self._stuck = False  # nobody who has something to compute found room for it
        self._now = 0.0
        # `_decoding` as the policy and the executor see it; made again when it has changed.
        self._shown: dict[int, int] | None = None
        self._slots: Slots | None = None
        self._short = False  # see `shed`

    # -- sequences come and go

    def check_fits(self, n_prompt: int, max_tokens: int) -> None:
        """RequestTooLong when the request could not finish even with the cache to itself. The
        token that is sampled last is never computed, so it needs no cell."""
        limit = min(self.limits.n_cells_seq, self.limits.n_cells)
        if n_prompt + max_tokens - 1 > limit:
            raise RequestTooLong(
                "prompt",
                f"{n_prompt} tokens",
                f"with max_tokens={max_tokens} it needs {n_prompt + max_tokens - 1} KV cells, "
                f"a sequence of this engine can have {limit}",
            )

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
        by_hand: bool = False,
    ) -> None:
        """A new sequence joins the waiting line. Ids are never reused. `by_hand`: it gets a token
        each time that it is asked for one; `max_tokens` is 1 then."""
        if n_prompt < 1 or max_tokens < 1:
            raise ValueError(
                f"n_prompt and max_tokens are at least 1, got {n_prompt}, {max_tokens}"
            )
        if id in self._running or id in self._waiting or id in self._aside:
            raise ValueError(f"sequence {id} is here already")
        self.check_fits(n_prompt, max_tokens)
        view = SequenceView(
            id=id,
            arrival=arrival,
            n_prompt=n_prompt,
            max_tokens=max_tokens,
            priority=priority,
            tenant=tenant,
            deadline=deadline,
            goal=n_prompt - 1 if by_hand else None,
        )
        if deadline is not None:
            self.deadlines.add(id, deadline)
        self._line_up(_Entry(view))

    def remove(self, id: int) -> int | None:
        """A sequence ends, for whatever reason. Returns the slot it ran in, whose cells are free
        from now on, or None when it was waiting. KeyError when there is no such sequence."""
        self.deadlines.remove(id)
        if id not in self._running:
            if self._waiting.pop(id, None) is None:
                del self._aside[id]
            return None
        self._short = False
        return self._leave(id).slot

    def shed(self) -> tuple[int, int] | None:
        """The cache turned out to be fuller than the ledger says: the newest running sequence
        gives up its cells, and nobody is admitted until another one ends. Returns its (id, slot),
        or None when no more than one runs."""
        if len(self._running) < 2:
            return None
        id = next(reversed(self._running))
        slot = self._preempt(id)
        self._short = True
        return id, slot

    def preempt(self, id: int) -> int:
        """A running sequence gives up its cells and its slot, which is returned, and waits to be
        computed again. KeyError when it does not run."""
        return self._preempt(id)

    # -- hand-driven sequences

    def extend(self, id: int, n: int) -> None:
        """`n` more tokens are known, all but the last of them to be computed. RequestTooLong when
        they can never fit."""
        entry = self._by_hand(id)
        view = self._seen(entry)
        known = view.known + n
        self.check_fits(known, 1)
        self._steer(entry, replace(view, n_prompt=view.n_prompt + n, goal=known - 1))

    def ask(self, id: int) -> None:
        """Compute all that is known and sample the next token."""
        entry = self._by_hand(id)
        view = self._seen(entry)
        self.check_fits(view.known, 1)
        self._steer(entry, replace(view, goal=view.known))

    def relax(self, id: int) -> None:
        """Compute nothing more until `extend` or `ask`."""
        entry = self._by_hand(id)
        view = self._seen(entry)
        self._steer(entry, replace(view, goal=view.computed))

    def trim(self, id: int, known: int) -> int:
        """Only the first `known` tokens are left, at least 1. Returns how many of them stay in the
        cache: all but the last at most, for only a token that is computed can be sampled from."""
        entry = self._by_hand(id)
        view = self._seen(entry)
        if not 1 <= known <= view.known:
            raise ValueError(f"{known} tokens are to stay of {view.known}")
        n_prompt = min(view.n_prompt, known)
        computed = min(view.computed, known - 1)
        if entry.slot >= 0 and computed < view.computed:
            self.ledger.release(entry.slot)
            self.ledger.take(entry.slot, computed)
        left = replace(view, n_prompt=n_prompt, generated=known - n_prompt, computed=computed)
        self._steer(entry, replace(left, goal=computed))
        return computed

    def hold(self, now: float) -> float:
        """Seconds that the next `plan` had better wait, unless something is added or asked for
        meanwhile: for hand-driven sequences that are about to ask, or because there is nothing to
        do before somebody has rested for too long. 0: now."""
        n_ready = len(self._decoding) + len(self._prefilling)
        if self._stuck:
            longest = self._resting.longest
            return 0.0 if longest is None else max(0.0, longest[1] + self._patience - now)
        if self._ready_at is None:
            self._ready_at = now
        return self._resting.wait(now, self._ready_at, n_ready, self.cost)

    # -- steps

    def view(self, now: float) -> StepView:
        if self._shown is None:
            self._shown = dict.fromkeys(self._decoding, 1)
        waiting = {} if self._short and self._running else self._waiting
        return StepView(
            now=now,
            limits=self.limits,
            running=_Views(self._running, self._seen),
            waiting=_Views(waiting, self._seen),
            decoding=self._shown,
            prefilling=_Views(self._prefilling, self._seen),
            kv_free=self.ledger.free,
            kv_promised=self._promised,
            cost=self.cost,
        )

    def plan(self, now: float) -> Step | None:
        """Ask the policy for the next step and apply its plan: preempt, admit, name the rows.
        None when there is nothing to compute, or no room for those who wait. PlanError, and
        nothing has changed, when the plan breaks a rule."""
        if self.idle:
            return None
        self._now, self._ready_at = now, None
        made_way = self._make_way()
        plan = self.policy.plan(self.view(now))
        self._check(plan)
        self._stuck = not plan.tokens and not plan.preempt
        if self._stuck and not made_way:
            return None
        preempted = made_way + tuple((id, self._preempt(id)) for id in plan.preempt)
        tokens = plan.tokens
        admitted = []
        chunks = []
        rest = tokens.keys() - self._decoding.keys()
        n_decodes = len(tokens) - len(rest)
        for id in [id for id in tokens if id in rest] if rest else ():
            entry = self._running.get(id)
            if entry is None:
                entry = self._admit(id)
                admitted.append((id, entry.slot))
            start = int(self._computed[entry.slot])
            n = tokens[id]
            last = start + n == int(self._known[entry.slot])
            chunks.append(Chunk(id, entry.slot, start, n, last))
        if n_decodes == len(self._decoding):
            decode = self._decode_slots()
        else:
            decoding = self._decoding
            decode = np.array([decoding[id] for id in tokens if id in decoding], dtype=np.int32)
        n_rows = n_decodes + sum(chunk.n for chunk in chunks)
        repeat = plan.repeat
        if repeat > 1 and self._asked:
            repeat = 1
        elif repeat > 1:
            left = int((self._most[decode] - self._known[decode]).min())
            repeat = max(1, min(repeat, left, self.ledger.free // n_rows))
        return Step(decode, tuple(chunks), preempted, tuple(admitted), n_rows, plan.reasons, repeat)

    def advance(self, step: Step, n: int = 1) -> None:
        """`step` has been computed, `n` times of the `step.repeat` that it may be: its rows are in
        the cache, and every sequence whose last known token was among them knows one token more,
        each time."""
        if not 1 <= n <= step.repeat:
            raise ValueError(f"a step for 1 to {step.repeat} times was computed {n} times")
        counters = self.counters
        decode = step.decode
        n_decodes = len(decode)
        if n_decodes:
            self.ledger.take_each(decode, n)
            self._counts[:, decode] += n
            if self._asked:
                for slot in [slot for slot in decode.tolist() if slot in self._asked]:
                    entry = self._running[self._asked[slot]]
                    self._promised -= 1
                    self._steer(entry, self._seen(entry))
        n_sampled = n * n_decodes
        for chunk in step.chunks:
            slot, end = chunk.slot, chunk.start + chunk.n
            entry = self._prefilling[chunk.id]
            self.ledger.take(slot, chunk.n)
            self._computed[slot] = end
            self._promised -= chunk.n
            counters.prefill_rows += chunk.n
            counters.recomputed_rows += max(0, min(end, entry.high) - chunk.start)
            entry.high = max(end, entry.high)
            if chunk.last:
                self._known[slot] += 1
                self._promised += entry.view.goal is None
                n_sampled += 1
            known = int(self._known[slot])
            if entry.view.goal is not None:
                self._steer(entry, self._seen(entry))
            elif known - end == 1 and known > entry.view.n_prompt:
                del self._prefilling[chunk.id]
                self._decoding[chunk.id] = slot
                self._decoding_changed()
        counters.steps += n
        counters.rows += n * step.n_rows
        counters.decode_rows += n * n_decodes
        counters.tokens += n_sampled

    # -- what there is

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nobody has anything to compute."""
        return not self._decoding and not self._prefilling and not self._waiting

    @property
    def n_resting(self) -> int:
        """Hand-driven sequences that run and have nothing to compute."""
        return len(self._running) - len(self._decoding) - len(self._prefilling)

    def running_ids(self) -> tuple[int, ...]:
        return tuple(self._running)

    def slot(self, id: int) -> int | None:
        """Where a sequence runs; None when it does not."""
        entry = self._running.get(id)
        return None if entry is None else entry.slot

    def computed(self, slot: int) -> int:
        """Tokens of the sequence in `slot` that are in the cache: its next position."""
        return int(self._computed[slot])

    @property
    def positions(self) -> Any:
        """Next position by slot: int64, shape (n_seq_max,), the scheduler's own array."""
        return self._computed

    def sequence(self, id: int) -> SequenceView:
        return self._seen(self._entry(id))

    # -- inside

    def _entry(self, id: int) -> _Entry:
        return self._running.get(id) or self._waiting.get(id) or self._aside[id]

    def _by_hand(self, id: int) -> _Entry:
        entry = self._entry(id)
        if entry.view.goal is None:
            raise ValueError(f"sequence {id} is not driven by hand")
        return entry

    def _steer(self, entry: _Entry, view: SequenceView) -> None:
        """A hand-driven sequence is `view` from now on: it goes where that belongs."""
        id, slot = view.id, entry.slot
        self._stuck = False
        if slot < 0:
            entry.view = view
            if (id in self._waiting) != (view.remaining > 0):
                if self._waiting.pop(id, None) is None:
                    del self._aside[id]
                self._line_up(entry)
            return
        old = self._seen(entry)
        self._promised += view.remaining - old.remaining
        entry.view = view
        self._computed[slot], self._known[slot] = view.computed, view.known
        if self._decoding.pop(id, None) is not None:
            del self._asked[slot]
            self._decoding_changed()
        self._resting.end(id)
        if view.remaining and not view.decoding:
            self._prefilling[id] = entry
            return
        self._prefilling.pop(id, None)
        if view.decoding:
            self._decoding[id] = slot
            self._asked[slot] = id
            self._decoding_changed()
        else:
            self._resting.begin(id, self._now)

    def _line_up(self, entry: _Entry, *, first: bool = False) -> None:
        """Into the waiting line, or aside while there is nothing to compute."""
        id = entry.view.id
        self._stuck = False
        if not entry.view.remaining:
            self._aside[id] = entry
            return
        self._waiting[id] = entry
        if first:
            self._waiting.move_to_end(id, last=False)

    def _make_way(self) -> tuple[tuple[int, int], ...]:
        """Preempt the sequence that rests longest, if that is too long and others need its room."""
        if not self._stuck and (self._free_slots or not self._waiting):
            return ()
        longest = self._resting.longest
        if longest is None or self._now - longest[1] < self._patience:
            return ()
        return ((longest[0], self._preempt(longest[0])),)

    def _seen(self, entry: _Entry) -> SequenceView:
        view = entry.view
        slot = entry.slot
        if slot < 0:
            return view
        computed = int(self._computed[slot])
        generated = int(self._known[slot]) - view.n_prompt
        if view.computed != computed or view.generated != generated or not view.running:
            view = entry.view = _moved(view, computed, generated, True, view.preemptions)
        return view

    def _check(self, plan: Plan) -> None:
        def remaining(id: int) -> int:
            return self.sequence(id).remaining

        def held(id: int) -> int:
            return self.ledger.held(self._running[id].slot)

        check_plan(
            plan,
            limits=self.limits,
            decoding=self._decoding,
            running=self._running,
            waiting=self._waiting,
            remaining=remaining,
            held=held,
            n_free=self.ledger.free,
            resting=self.n_resting,
        )

    def _admit(self, id: int) -> _Entry:
        entry = self._waiting.pop(id)
        entry.slot = slot = heapq.heappop(self._free_slots)
        self._computed[slot] = 0
        self._known[slot] = entry.view.known
        self._most[slot] = entry.view.n_prompt + entry.view.max_tokens
        self._promised += entry.view.remaining
        self._running[id] = self._prefilling[id] = entry
        self.counters.admissions += 1
        return entry

    def _leave(self, id: int) -> _Entry:
        entry = self._running.pop(id)
        slot = entry.slot
        self._promised -= self._seen(entry).remaining
        if self._prefilling.pop(id, None) is None and self._decoding.pop(id, None) is not None:
            self._asked.pop(slot, None)
            self._decoding_changed()
        self._resting.end(id)
        self._stuck = False
        self.ledger.release(slot)
        self._computed[slot] = self._known[slot] = 0
        heapq.heappush(self._free_slots, slot)
        return entry

    def _preempt(self, id: int) -> int:
        entry = self._running[id]
        view = self._seen(entry)
        entry.high = max(entry.high, view.computed)
        self._leave(id)
        slot, entry.slot = entry.slot, -1
        entry.view = _moved(view, 0, view.generated, False, view.preemptions + 1)
        if not view.remaining:  # it rested, and is computed again when its owner wants more
            entry.view = replace(entry.view, goal=0)
        self._line_up(entry, first=True)
        self.counters.preemptions += 1
        return slot

    def _decoding_changed(self) -> None:
        self._shown = None
        self._slots = None

    def _decode_slots(self) -> Slots:
        if self._slots is None:
            slots = np.fromiter(self._decoding.values(), dtype=np.int32, count=len(self._decoding))
            slots.flags.writeable = False
            self._slots = slots
        return self._slots


def _moved(
    view: SequenceView, computed: int, generated: int, running: bool, preemptions: int
) -> SequenceView:
    return SequenceView(
        view.id,
        view.arrival,
        view.n_prompt,
        computed,
        generated,
        view.max_tokens,
        running,
        view.priority,
        view.tenant,
        view.deadline,
        view.prefix_hit,
        preemptions,
        view.goal,
    )


class _Views(Sequence[SequenceView]):
    """The scheduler's entries as a policy sees them, each view made when it is looked at."""

    __slots__ = ("_entries", "_seen")

    def __init__(self, entries: dict[int, _Entry], seen: Callable[[_Entry], SequenceView]) -> None:
        self._entries = entries
        self._seen = seen

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SequenceView]:
        return map(self._seen, self._entries.values())

    def __reversed__(self) -> Iterator[SequenceView]:
        return map(self._seen, reversed(self._entries.values()))

    @overload
    def __getitem__(self, index: int) -> SequenceView: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SequenceView, ...]: ...
    def __getitem__(self, index: int | slice) -> SequenceView | tuple[SequenceView, ...]:
        entries = list(self._entries.values())
        if isinstance(index, slice):
            return tuple(map(self._seen, entries[index]))
        return self._seen(entries[index])
