"""Where every sequence is: in a slot, in the waiting line, or aside."""

from __future__ import annotations

from dataclasses import replace

from ..kv import KvAccounting, KvOperation, Sharing, SwapChoice
from ..kv.radix_tree import Tokens
from .admission import Admission, StartPoint
from .deadlines import Deadlines
from .gather import CostWindow, Gather
from .idle_sequences import IdleSequences
from .queue import SequenceQueue
from .running import Entry, Running, moved
from .step import Counters
from .tenants import Tenants
from .view import Limits, SequenceView


class Placement:
    """The state that the scheduler is made of, and the moves of a sequence from one place to
    another.

    A running sequence is in `_running`, and unless it rests in `_prefilling` or in
    `_running.decoding`. One that does not run is in `_waiting`, or in `_aside` if it rests.

    There are `n_slots` slots: one for each sequence that may run, and those for what is kept."""

    def __init__(
        self,
        limits: Limits,
        gather: Gather | None,
        sharing: Sharing,
        retain: bool,
        swap: SwapChoice | None,
    ) -> None:
        self.limits = limits
        self.n_slots = limits.n_seq_max + sharing.n_cached
        self.counters = Counters()
        self.accounting = KvAccounting(
            limits.n_cells,
            self.n_slots,
            unified=limits.unified,
            n_cells_seq=limits.n_cells_seq,
        )
        self.admission = Admission(self.accounting, sharing, retain=retain, swap=swap)
        self.deadlines = Deadlines()
        self._running = Running(self.n_slots)
        self._prefilling = SequenceQueue(self._running.seen)
        self._waiting = SequenceQueue(self._running.seen)
        self._aside: dict[int, Entry] = {}
        self._tenants = Tenants(self._running.turns)
        self._promised = 0  # what the running ones know and have not computed yet
        self._asked: dict[int, int] = {}  # slot -> id of the interactive ones that decode
        self._idle = IdleSequences(gather or CostWindow())
        self._ready_at: float | None = None  # when there was something to compute for this step
        self._short = False  # see `Scheduler.shed`
        self._stuck = False  # nobody who has something to compute found room for it
        self._wake: float | None = None  # before that the policy does not want to be asked again
        self._now = 0.0

    def preempt(self, id: int, *, worth: bool = True) -> int:
        """A running sequence gives up its cells and its slot, which is returned, and waits to run
        again. `worth`: what it holds is right, and may be kept or saved. KeyError when it does not
        run."""
        self._running.seen(self._running.ids[id])  # what it is at its end
        entry = self._leave(id)
        if worth:
            self.admission.preempt(id, entry.slot, self._tokens(entry))
        else:
            self.admission.cache.leaves(entry.slot, None)
        view = entry.view
        entry.high = max(entry.high, view.computed)
        slot, entry.slot = entry.slot, -1
        goal = view.goal if view.remaining else 0  # who rested is computed when its owner wants
        step = self.counters.steps
        waits = moved(view, 0, view.generated, False, view.preemptions + 1, step, 0)
        entry.view = waits if goal == view.goal else replace(waits, goal=goal)
        entry.true = True
        self._line_up(entry, first=True)
        self.counters.preemptions += 1
        return slot

    @property
    def has_kv_operations(self) -> bool:
        """Whether there are some that no step has brought yet."""
        return bool(self.admission.cache.kv_operations)

    def take_kv_operations(self) -> tuple[KvOperation, ...]:
        """What was decided since the last step, or the last call: to be carried out in this
        order. Every `Step` has taken those before it already."""
        operations, self.admission.cache.kv_operations = self.admission.cache.kv_operations, []
        return tuple(operations)

    def kv_failed(self, operation: KvOperation) -> tuple[int, int] | None:
        """The memory refused an operation. Returns the (id, slot) of a sequence that was to run
        from there: it is preempted, and waits to be computed. None when there is none."""
        id, slot, cache = operation.id, operation.slot, self.admission.cache
        if operation.kind == "remove":
            raise RuntimeError(f"slot {slot} can't be emptied")
        if operation.kind in ("save", "store", "discard"):
            self.admission.drop_saved(id)
            return None
        entry = self._running.get(id)
        if entry is None or entry.slot != slot:
            cache.drop(slot)
            return None
        if operation.kind != "cut":
            self.admission.isolate(id)  # what was refused once is not tried again
        return id, self.preempt(id, worth=False)

    def copied(self, n_bytes: int, seconds: float, n_tokens: int) -> None:
        """The state of `n_tokens` tokens was copied to the host or back in `seconds`."""
        self.admission.swap.copied(n_bytes, seconds, n_tokens)

    def prefilled(self, n_rows: int, seconds: float) -> None:
        """A step of `n_rows` rows, nearly all of prompts, took `seconds`."""
        self.admission.swap.computed(n_rows, seconds)

    def drop_cached(self) -> bool:
        """Nothing is kept any more, for the cache is fuller than the accounting says; whether
        anything
        was."""
        any_kept = self.admission.cache.n_cached > 0
        self.admission.cache.drop_all()
        return any_kept

    # -- inside

    def _tokens(self, entry: Entry) -> Tokens | None:
        """What it is to compute."""
        if entry.tokens is None:
            return None
        return entry.tokens.known()[: entry.view.goal]

    def _entry(self, id: int) -> Entry:
        return self._running.get(id) or self._waiting.get(id) or self._aside[id]

    def _changed(self) -> None:
        """There is something to ask the policy about."""
        self._stuck = False
        self._wake = None

    def _line_up(self, entry: Entry, *, first: bool = False) -> None:
        """Into the waiting line, or aside while there is nothing to compute."""
        id = entry.view.id
        self._changed()
        if not entry.view.remaining:
            self._aside[id] = entry
            return
        entry.view = _from(entry.view, self.admission.start_waiting(id, self._tokens(entry)))
        self._tenants.waits(entry.tenant)
        self._waiting.join(id, entry, first=first)

    def _get_out(self, id: int) -> Entry:
        """Out of the waiting line, or from aside. KeyError when it is in neither."""
        self.admission.stop_waiting(id)
        entry = self._waiting.leave(id)
        if entry is None:
            return self._aside.pop(id)
        self._tenants.waits(entry.tenant, -1)
        return entry

    def _admit(self, id: int, spare: int, fresh: set[int]) -> Entry | None:
        """See `Admission.admit`."""
        admitted = self.admission.admit(id, spare, fresh)
        if admitted is None:
            return None
        entry = self._waiting.ids[id]
        self._waiting.leave(id)
        self._tenants.waits(entry.tenant, -1)
        entry.slot, start = admitted
        view = entry.view
        if (view.prefix_hit, view.prefix_cells, view.prefix_pending) != (start.n, 0, 0):
            view = replace(view, prefix_hit=start.n, prefix_cells=0, prefix_pending=0)
            entry.view = view
        self._promised += view.remaining
        if not view.preemptions:
            self._tenants.admitted(entry.tenant, view.n_prompt)
        self._running.join(id, entry)
        self._running.computed[entry.slot] = start.n
        self._prefilling.join(id, entry)
        counters = self.counters
        counters.admissions += 1
        counters.known_tokens += view.known
        counters.loaded_tokens += start.saved
        counters.prefix_tokens += start.hit.n
        return entry

    def _leave(self, id: int) -> Entry:
        """It does not run any more; its view stays as it was, and `starts` has to hear what
        becomes of its slot. KeyError when it does not run."""
        running = self._running
        entry = running.ids[id]
        self._promised -= running.remaining(entry)
        self._tenants.left(entry.tenant, running.turn(entry.slot))
        if self._prefilling.leave(id) is None:
            self._decodes_no_more(id, entry.slot)
        if entry.view.goal is not None:
            self._idle.end(id)
        running.leave(id)
        self._changed()
        self._short = False
        return entry

    def _steer(self, entry: Entry, view: SequenceView) -> None:
        """A interactive sequence is `view` from now on: it goes where that belongs."""
        id, slot = view.id, entry.slot
        self._changed()
        if slot < 0:
            self._get_out(id)
            # What it began with, or could have, is in doubt: `_line_up` looks again.
            entry.view = replace(view, prefix_hit=0, prefix_cells=0, prefix_pending=0)
            self._line_up(entry)
            return
        old = self._running.seen(entry)
        self._promised += view.remaining - old.remaining
        self._running.set(entry, view)
        self._prefilling.leave(id)
        self._decodes_no_more(id, slot)
        self._idle.end(id)
        if view.decoding:
            self._running.decodes(id, slot)
            self._asked[slot] = id
        elif view.remaining:
            self._prefilling.join(id, entry)
        else:
            self._idle.begin(id, self._now)

    def _decodes_no_more(self, id: int, slot: int) -> None:
        """Fine when it did not."""
        if self._running.decodes_no_more(id, slot):
            self._asked.pop(slot, None)


def _from(view: SequenceView, start: StartPoint) -> SequenceView:
    """`view` of a waiting sequence, with what it could start from."""
    if (view.prefix_hit, view.prefix_cells, view.prefix_pending) == seen_of(start):
        return view
    hit, cells, pending = seen_of(start)
    return replace(view, prefix_hit=hit, prefix_cells=cells, prefix_pending=pending)


def seen_of(start: StartPoint) -> tuple[int, int, int]:
    """`prefix_hit`, `prefix_cells`, `prefix_pending`."""
    return start.n, start.cells, start.pending.n
