"""All sequences: where each is, and how it gets from one place to another."""

from collections.abc import Callable, Iterator

from ..kv import KvAccounting
from .admission import Admission
from .idle import IdleSequences
from .queue import SequenceQueue
from .running import Entry, RunningSequences
from .step import Counters
from .view import NO_PREFIX, SequenceView


class Sequences:
    """A running sequence is in `running`. Of these, one that decodes is in `running.decoding`, one
    that is idle in `idle`, any other one in `prefilling`. A sequence that does not run is in
    `waiting`, or in `aside` while it has nothing to compute.

    - left: is told of each running sequence that ends or is preempted, before it leaves.
    - promised: cells that the running ones need for tokens that they know already.
    - n_changes: grows whenever there may be something new to ask the policy about.
    - closed: no sequence is admitted until another one leaves, see `preempt_newest`."""

    def __init__(
        self,
        accounting: KvAccounting,
        admission: Admission,
        idle: IdleSequences,
        counters: Counters,
        left: Callable[[Entry], None],
    ) -> None:
        self.running = RunningSequences(accounting.held_by_slot)
        self.prefilling = SequenceQueue(self.running.seen)
        self.waiting = SequenceQueue(self.running.seen)
        self.aside: dict[int, Entry] = {}
        self.promised = 0
        self.n_changes = 0
        self.closed = False
        self.now = 0.0  # of the last step
        self._admission = admission
        self._idle = idle
        self._counters = counters
        self._left = left

    def __getitem__(self, id: int) -> Entry:
        """KeyError when there is no such sequence."""
        return self.running.ids.get(id) or self.waiting.ids.get(id) or self.aside[id]

    def __contains__(self, id: int) -> bool:
        return id in self.running.ids or id in self.waiting.ids or id in self.aside

    def all(self) -> Iterator[SequenceView]:
        for entries in (self.running.ids, self.waiting.ids, self.aside):
            for entry in entries.values():
                yield self.running.seen(entry)

    def add(self, entry: Entry, *, first: bool = False) -> None:
        """To the waiting queue, or aside while there is nothing to compute."""
        id = entry.view.id
        self.n_changes += 1
        if not entry.view.remaining:
            self.aside[id] = entry
            return
        prefix = self._admission.start_waiting(id, entry.known_tokens(), entry.n_wanted)
        if prefix != entry.view.prefix:
            entry.view = entry.view._replace(prefix=prefix)
        self.waiting.join(id, entry, first=first)

    def remove(self, id: int, *, retain: bool, wanted: bool) -> int | None:
        """A sequence ends. Returns the slot it ran in, None when it did not run. `retain`: what it
        holds is right, and may be cached. `wanted`: others are going to start from it."""
        slot = None
        if id in self.running.ids:
            entry = self._leave(id)
            slot = entry.slot
            known = entry.known_tokens() if retain else None
            self._admission.cache.leaves(slot, known, comes_back=wanted)
        else:
            self._take_out(id)
            self.n_changes += 1
        self._admission.forget(id)
        self._idle.forget(id)
        return slot

    def preempt(self, id: int, *, retain: bool) -> int:
        """A running sequence gives up its cells and its slot, which is returned, and waits to run
        again. `retain`: what it holds is right, and may be cached or saved."""
        self.running.seen(self.running.ids[id])  # what it is at its end
        entry = self._leave(id)
        if retain:
            self._admission.preempt(id, entry.slot, entry.known_tokens())
        else:
            self._admission.cache.leaves(entry.slot, None)
        view = entry.view
        entry.high = max(entry.high, view.computed)
        if entry.computed is not None:
            entry.computed.high = max(entry.computed.high, view.computed)
        slot, entry.slot = entry.slot, -1
        goal = view.goal if view.remaining else 0  # an idle one is computed when its owner wants
        entry.view = view._replace(
            computed=0,
            running=False,
            prefix=NO_PREFIX,  # that of its last start may be longer than what was left by a trim
            preemptions=view.preemptions + 1,
            goal=goal,
            queued=self._counters.steps,
            turn=0,
        )
        entry.true = True
        self.add(entry, first=True)
        self._counters.preemptions += 1
        return slot

    def preempt_newest(self) -> tuple[int, int] | None:
        """The newest running sequence gives up its cells, and none is admitted until another one
        leaves. Returns its (id, slot), or None when no more than one runs."""
        if len(self.running.ids) < 2:
            return None
        id = next(reversed(self.running.ids))
        slot = self.preempt(id, retain=True)
        self.closed = True
        return id, slot

    def admit(self, id: int, spare: int, fresh: set[int], *, alone: bool) -> int | None:
        """A waiting sequence runs from now on; its slot. None when it had better wait, see
        `Admission.admit`."""
        admitted = self._admission.admit(id, spare, fresh, alone=alone)
        if admitted is None:
            return None
        entry = self.waiting.ids[id]
        self.waiting.leave(id)
        entry.slot, start = admitted
        prefix = start.taken
        if entry.view.prefix != prefix:
            entry.view = entry.view._replace(prefix=prefix)
        self.promised += entry.view.remaining
        self.running.join(id, entry)
        if entry.computed is not None:
            entry.computed.on_grid = max(entry.computed.on_grid, start.hit.n)
        self._sort(entry)
        counters = self._counters
        counters.admissions += 1
        counters.known_tokens += entry.view.known
        counters.loaded_tokens += start.saved
        counters.prefix_tokens += start.hit.n
        return entry.slot

    def update(self, entry: Entry, view: SequenceView) -> None:
        """An interactive sequence, which was looked at, is `view` from now on: it goes where that
        belongs."""
        id = view.id
        self.n_changes += 1
        if entry.slot < 0:
            self._take_out(id)
            entry.view = view._replace(prefix=NO_PREFIX)  # what it could start from is in doubt
            self.add(entry)
            return
        running = self.running
        self.promised += view.remaining - entry.view.remaining
        running.set(entry, view)
        self.prefilling.leave(id)
        running.stop_decoding(entry)
        self._idle.end(id)
        self._sort(entry)

    def _sort(self, entry: Entry) -> None:
        """A running sequence goes where it belongs."""
        running = self.running
        n = running.remaining(entry)
        if n == 0:
            self._idle.begin(entry.view.id, self.now)
        elif n == 1 and running.ahead[entry.slot] == 1:
            running.start_decoding(entry)
        else:
            self.prefilling.join(entry.view.id, entry)

    def refresh(self) -> None:
        """What those that wait could start from now."""
        for id, prefix in self._admission.refresh():
            self.waiting.put(id, prefix=prefix)

    def _take_out(self, id: int) -> None:
        """Out of the waiting queue, or from aside. KeyError when it is in neither."""
        self._admission.stop_waiting(id)
        if self.waiting.leave(id) is None:
            del self.aside[id]

    def _leave(self, id: int) -> Entry:
        """It does not run any more; its view stays as it was. KeyError when it does not run."""
        running = self.running
        entry = running.ids[id]
        self._left(entry)
        self.promised -= running.remaining(entry)
        self.prefilling.leave(id)
        running.stop_decoding(entry)
        if entry.view.goal is not None:
            self._idle.end(id)
        running.leave(id)
        self.n_changes += 1
        self.closed = False
        return entry
