"""The scheduler: which sequence runs, holds which slot and cells, and advances by how much.

Pure state. Time comes in as an argument; nothing here sleeps, starts a thread or knows libllama.
The live engine and the simulator drive the same object:

    step = scheduler.plan(now)       # ask the policy, check its plan, place newcomers
    ... remove the cells of step.preempted, compute the step's rows ...
    scheduler.advance(step)          # every row is in the cache, every full sequence sampled;
                                     # up to `step.repeat` times without another plan
    scheduler.remove(id)             # whoever is done, at any time between steps

A step that could not be computed is simply not advanced: the next `plan` starts from the same
counters. Counters live in arrays by slot, so that a step of pure decoding costs no Python per
sequence; views are made when a policy looks at them.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from ..errors import RequestTooLong
from ..kv import KvLedger, Slots
from .policies import fcfs
from .policy import Policy
from .rules import check_plan
from .step import Chunk, Counters, Step
from .view import Limits, Plan, SequenceView, StepView


@dataclass(slots=True)
class _Entry:
    """One sequence. While it runs its counters are the scheduler's arrays at `slot`."""

    view: SequenceView
    slot: int = -1
    high: int = 0  # tokens that were computed at least once


class Scheduler:
    """`limits`: what the context can take. `policy`: default `fcfs()`. `cost`: the device's cost
    model, passed on to the policy."""

    def __init__(self, limits: Limits, policy: Policy | None = None, *, cost: Any = None) -> None:
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
        # A running sequence is in `_running` and in one of `_prefilling`, `_decoding` (id -> slot).
        self._running: dict[int, _Entry] = {}
        self._prefilling: dict[int, _Entry] = {}
        self._decoding: dict[int, int] = {}
        self._waiting: OrderedDict[int, _Entry] = OrderedDict()
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
    ) -> None:
        """A new sequence joins the waiting line. Ids are never reused."""
        if n_prompt < 1 or max_tokens < 1:
            raise ValueError(
                f"n_prompt and max_tokens are at least 1, got {n_prompt}, {max_tokens}"
            )
        if id in self._running or id in self._waiting:
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
        )
        self._waiting[id] = _Entry(view)

    def remove(self, id: int) -> int | None:
        """A sequence ends, for whatever reason. Returns the slot it ran in, whose cells are free
        from now on, or None when it was waiting. KeyError when there is no such sequence."""
        if id not in self._running:
            del self._waiting[id]
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
        None when there is no sequence. PlanError, and nothing has changed, when the plan breaks a
        rule."""
        if not self._running and not self._waiting:
            return None
        plan = self.policy.plan(self.view(now))
        self._check(plan)
        preempted = tuple((id, self._preempt(id)) for id in plan.preempt)
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
        if repeat > 1:
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
                self._promised += 1
                n_sampled += 1
            known = int(self._known[slot])
            if known - end == 1 and known > entry.view.n_prompt:
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
        return not self._running and not self._waiting

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
        entry = self._running.get(id) or self._waiting[id]
        return self._seen(entry)

    # -- inside

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
        )

    def _admit(self, id: int) -> _Entry:
        entry = self._waiting.pop(id)
        entry.slot = slot = heapq.heappop(self._free_slots)
        self._computed[slot] = 0
        self._known[slot] = entry.view.known
        self._most[slot] = entry.view.n_prompt + entry.view.max_tokens
        self._promised += entry.view.known
        self._running[id] = self._prefilling[id] = entry
        self.counters.admissions += 1
        return entry

    def _leave(self, id: int) -> _Entry:
        entry = self._running.pop(id)
        if self._prefilling.pop(id, None) is None:
            del self._decoding[id]
            self._decoding_changed()
        slot = entry.slot
        self.ledger.release(slot)
        self._promised -= int(self._known[slot] - self._computed[slot])
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
        self._waiting[id] = entry
        self._waiting.move_to_end(id, last=False)
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
