"""StepBuilder: a checked plan in terms of slots and rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..cost.step_cost import StepCost
from ..kv import Slots
from .admission import Admission
from .compaction import Compaction
from .invariance import Invariance
from .padding import Padding
from .rules import Rows
from .running import Entry
from .sequences import Sequences
from .step import NO_SLOTS, PromptChunk, Step
from .view import Limits, Plan

AT_ONCE = 32  # steps of decoding that cells are emptied for, if they are there

Placed = tuple[tuple[int, int], ...]
"""(id, slot) of each."""


class StepBuilder:
    """Of a context with these `limits`, with the cost model that there is now. `alone()`: of one
    sequence that runs, whether no other one waits or is about to ask."""

    def __init__(
        self,
        limits: Limits,
        sequences: Sequences,
        admission: Admission,
        cost: StepCost | None,
        invariance: Invariance | None,
        alone: Callable[[], bool],
    ) -> None:
        sharing = admission.cache.sharing
        self.padding = Padding(limits, possible=sharing.trim and not limits.unified)
        self.compaction = Compaction(
            limits,
            admission.swap.stream_seconds,
            possible=sharing.copy_whole and not limits.unified,
        )
        self._limits = limits
        self._sequences = sequences
        self._admission = admission
        self._accounting = admission.accounting
        self._cost = cost
        self._invariance = invariance
        self._alone = alone

    def build(self, plan: Plan, rows: Rows, preempted: Placed, admitted: Placed) -> Step:
        """Of a plan that is checked, and whose sequences are placed."""
        repeat, reasons, drafts = plan.repeat, plan.reasons, plan.drafts
        running = self._sequences.running
        entries = running.ids
        moved = self._close_gaps(rows) if self.compaction.possible else ()
        for id, source, slot in moved:
            reasons = {**reasons, id: f"moved from slot {source} to {slot}: closes a gap"}
        chunks: list[PromptChunk] = []
        last: list[int] = []  # slots whose last known token is computed behind their chunk
        for id, n in rows.others.items():
            if id in entries:
                self._cut(entries[id], n, chunks, last)
        sits_out = running.decoding if rows.n_decodes == 0 else rows.out
        out = [slot for id in sits_out if id in entries and (slot := entries[id].slot) not in last]
        decode = running.decode_slots_but(out, last) if last or rows.n_decodes else NO_SLOTS
        n_rows = len(decode)
        if chunks:
            n_rows += sum([chunk.n for chunk in chunks])
        at_most = n_rows + sum(drafts.values()) if drafts else n_rows  # of a step
        stands = 1
        if running.asked:
            if len(decode) == n_rows == len(running.ids) == 1 and self._alone():
                (slot,) = decode.tolist()
                left = self._limits.most_cells - int(running.computed[slot])
                stands = max(1, min(repeat, left, self._accounting.free))
            repeat = 1
        elif repeat > 1:
            left = int((running.most - running.known)[decode].min())
            repeat = max(1, min(repeat, left, self._accounting.free // at_most))
        self._admission.cache.make_cells(at_most * min(max(repeat, stands), AT_ONCE))
        if repeat > 1:
            repeat = max(1, min(repeat, self._accounting.empty // at_most))
        if stands > 1:
            stands = max(1, min(stands, self._accounting.empty))
        n_pad = self._n_pad(decode, out)
        step = Step(
            decode,
            tuple(chunks),
            preempted,
            admitted,
            n_rows,
            reasons,
            repeat,
            len(out) if self._limits.unified else 0,
            self._admission.cache.take_kv_operations(),
            n_pad,
            moved,
            1 if n_pad else stands,
            {entries[id].slot: n for id, n in drafts.items()} if drafts else drafts,
            self._invariance,
        )
        if self.compaction.possible and repeat > 1 and self._cost is not None:
            n = self.compaction.steps(step, self._accounting.held_by_slot, self._cost)
            step = step if n == repeat else replace(step, repeat=n)
        return step

    def _close_gaps(self, rows: Rows) -> tuple[tuple[int, int, int], ...]:
        """Where nothing comes that could take the empty slots between those that run, and it pays:
        (id, slot before, slot) of each sequence that goes on in one of them."""
        running, waiting = self._sequences.running, self._sequences.waiting.ids
        n, slots = len(running.ids), running.decode_slots
        if waiting or rows.others or rows.out or not len(slots) or int(slots[-1]) < n:
            return ()
        entries = sorted(running.ids.values(), key=lambda entry: entry.slot)
        high = [entry for entry in entries if entry.slot >= n]
        graphs = 0.0 if self._cost is None else self.padding.price(self._cost)
        if not self.compaction.due(len(high), graphs):
            return ()
        moved = []
        for entry in reversed(high):
            source, id = entry.slot, entry.view.id
            slot = self._admission.cache.move(id, source)
            if slot is not None:
                running.move(entry, slot)
                moved.append((id, source, slot))
        return tuple(moved)

    def _n_pad(self, decode: Slots, out: list[int]) -> int:
        if self._invariance is not None:
            return self._invariance.width(decode[-1:].tolist())
        return 0 if out else self.padding.width(decode, self._accounting.held_by_slot, self._cost)

    def _cut(self, entry: Entry, n: int, chunks: list[PromptChunk], last: list[int]) -> None:
        """`n` rows of a sequence, or fewer where its prefix was longer than the policy knew, or a
        checkpoint is due: a chunk, and if they come to the last token that is to be sampled from,
        one of `last` for that."""
        slot, goal = entry.slot, entry.view.goal
        start, known = self._sequences.running.counts[:, slot].tolist()
        n = min(n, (known if goal is None else goal) - start)
        if entry.computed is not None:
            self._cut_on_grid(entry, start, n, chunks, last)
            return
        n = self._admission.cache.cut(slot, start, n)
        if start + n == known:
            last.append(slot)
            n -= 1
        if n:
            chunks.append(PromptChunk(entry.view.id, slot, start, n))

    def _cut_on_grid(
        self, entry: Entry, start: int, n: int, chunks: list[PromptChunk], last: list[int]
    ) -> None:
        """As `_cut`, with chunks that are whole, be it by more rows than `n`."""
        assert entry.computed is not None
        assert self._invariance is not None
        slot, goal = entry.slot, entry.view.goal
        known = int(self._sequences.running.known[slot])
        stop = known - 1 if goal is None else min(goal, known - 1)
        at, decoding = start, False
        while at < min(start + n, stop):
            size, decodes = entry.computed.next(at, stop, self._invariance.grid)
            if decoding and not decodes:  # calls of chunks come first in a step
                return
            chunks.append(PromptChunk(entry.view.id, slot, at, size, decodes))
            at, decoding = at + size, decodes
        if start + n == known:
            last.append(slot)
