"""StepBuilder: a checked plan in terms of slots and rows."""

from collections.abc import Callable, Iterable

import numpy as np

from ..cost.step_cost import StepCost
from ..kv import KvOperation, Slots
from .admission import Admission
from .compaction import Compaction
from .invariance import Invariance
from .neighbours import Neighbours
from .padding import Padding, comes_behind
from .rules import CheckedRows
from .running import Entry
from .sequences import Sequences
from .step import PromptChunk, Step
from .view import Limits, Plan

AT_ONCE = 32  # steps of decoding that cells are emptied for, if they are there
AT_WORST = 16  # of those with drafts, each of which may have far more rows than will stay

Placed = tuple[tuple[int, int], ...]
"""(id, slot) of each."""
Moved = tuple[int, int, int]
"""(id, slot before, slot)."""


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
        self.neighbours = Neighbours(
            limits,
            admission.swap.stream_seconds,
            moves=sharing.copy_whole,
        )
        self._limits = limits
        self._sequences = sequences
        self._admission = admission
        self.accounting = admission.accounting
        self.cost = cost
        self.invariance = invariance
        self._alone = alone

    def build(
        self,
        plan: Plan,
        rows: CheckedRows,
        preempted: Placed,
        admitted: Placed,
        moved: tuple[Moved, ...] = (),
    ) -> Step:
        """Of a plan that is checked, and whose sequences are placed."""
        if self.compaction.possible:
            moved += self._close_gaps(rows)
        chunks, last = self._cut_prompts(rows.others) if rows.others else ((), [])
        out = self._sits_out(rows, last)
        decode = self._sequences.running.decode_slots_but(out, last)
        n_rows = n_slots = len(decode)
        behind = False
        if chunks:
            cut = {chunk.slot for chunk in chunks}
            n_wait = len(cut.intersection(last))
            if behind := self._comes_behind(n_wait, n_rows - n_wait):
                at_once = [slot for slot in last if slot not in cut]
                decode = self._sequences.running.decode_slots_but(out, at_once)
                if len(chunks) > 1 and self._limits.fills and self.cost is not None:
                    chunks = self.neighbours.evened(chunks, self.cost)
            n_rows = len(decode) + sum([chunk.n for chunk in chunks])
            n_slots = len(decode) + len(cut) - (0 if behind else n_wait)
        step = Step(decode, chunks, preempted, admitted, n_rows, plan.reasons, behind=behind)
        step.n_slots = n_slots
        if moved:
            step.moved, step.reasons = moved, {**plan.reasons, **dict(map(_why_moved, moved))}
        if out and self._limits.unified:
            step.n_out = len(out)
        if plan.drafts:
            entries = self._sequences.running.ids
            step.drafts = {entries[id].slot: n for id, n in plan.drafts.items()}
            step.prices = plan.prices
        step.invariance = self.invariance
        step.n_pad = self._n_pad(decode, out)
        self._set_repeat(step, plan.repeat)
        cache = self._admission.cache
        step.kv_operations = cache.take_kv_operations()
        for chunk in chunks:
            if chunk.fill:  # when it is computed, and before any other row is
                end = chunk.start + chunk.n
                cache.kv_operations.append(KvOperation("trim", chunk.slot, n=end, id=chunk.id))
        return step

    def side_by_side(self, newcomers: dict[int, int], rows: CheckedRows) -> tuple[Moved, ...]:
        """Slots in a row for those that come, where that pays: which sequences move away.
        newcomers: rows of their prompts by id, which are among those of the plan."""
        if len(newcomers) < 2 or not self.neighbours.moves or self.cost is None:
            return ()
        ends = [n for id, n in rows.others.items() if self._ends(id, n)]
        n_wait = sum(n > 1 for n in ends)
        if not self._comes_behind(n_wait, rows.n_decodes + len(ends) - n_wait):
            return ()  # they are not computed together
        running, cache = self._sequences.running, self._admission.cache
        occupied = running.owner[: self._limits.n_seq_max] > 0
        window = self.neighbours.window([*newcomers.values()], occupied, self.cost)
        if window is None:
            return ()
        cache.next_slots = window
        return self._moved([entry for entry in running.ids.values() if entry.slot in window])

    def _ends(self, id: int, n: int) -> bool:
        """Whether a sequence samples after the `n` rows that are planned for it."""
        view = self._sequences[id].view
        return n == view.remaining and view.goal in (None, view.known)

    def _moved(self, entries: Iterable[Entry]) -> tuple[Moved, ...]:
        """They go on in the lowest empty slots, as far as there are some."""
        found: list[Moved] = []
        for entry in entries:
            source, id = entry.slot, entry.view.id
            slot = self._admission.cache.move(id, source)
            if slot is not None:
                self._sequences.running.move(entry, slot)
                found.append((id, source, slot))
        return tuple(found)

    def computed(self, step: Step, n: int) -> None:
        """What padding and compaction learn from a step that decodes and was computed `n` times."""
        if self.cost is None:
            return
        if step.n_pad and self.invariance is None:
            self.padding.computed(n)
        if self.compaction.possible and not step.chunks:
            self.compaction.computed(step, n, self.accounting.held_by_slot, self.cost)

    def charge(self, price: float) -> None:
        """See `PrefixCache.charge`."""
        self._admission.cache.charge(price)

    def _cut_prompts(self, others: dict[int, int]) -> tuple[tuple[PromptChunk, ...], list[int]]:
        """Chunks, and the slots whose last known token is computed behind their chunk. `others`:
        by how many tokens each sequence advances; one that was not admitted after all does not."""
        entries = self._sequences.running.ids
        chunks: list[PromptChunk] = []
        last: list[int] = []
        for id, n in others.items():
            if id in entries:
                self._cut(entries[id], n, chunks, last)
        return tuple(chunks), last

    def _comes_behind(self, n_wait: int, n_others: int) -> bool:
        cost = self.cost
        return cost is not None and comes_behind(self._limits, cost, n_wait, n_others)

    def _sits_out(self, rows: CheckedRows, last: list[int]) -> list[int]:
        """Slots of sequences that decode, and not in this step."""
        running = self._sequences.running
        entries = running.ids
        if rows.n_decodes:
            slots = [entries[id].slot for id in rows.out if id in entries]
        else:
            slots = running.decode_slots.tolist()
        return [slot for slot in slots if slot not in last] if last else slots

    def _set_repeat(self, step: Step, repeat: int) -> None:
        """How often it may be computed of the `repeat` times that it is planned for: as far as
        budgets, cells and gaps allow. Cells for that are emptied."""
        running, accounting = self._sequences.running, self.accounting
        n_rows, most_cells = step.n_rows, self._limits.most_cells
        if step.drafts:
            drafted = step.drafts.values()
            widest = 1 + max(drafted)
            n_rows = n_rows * widest if self._limits.even_rows else n_rows + sum(drafted)
        asked, most = bool(running.asked), n_rows * repeat

        def fitting(n: int, cells: int) -> int:
            return n if min(n * n_rows, most) <= cells else max(1, cells // n_rows)

        if repeat > 1:
            if not asked:
                ends = np.minimum(running.most, most_cells)  # a stream is full there
                each = (ends - running.computed).take(step.decode)
                left = int(each.min())
                if step.drafts:  # of the rows of all steps no more stay than tokens are left
                    most = int(each.sum()) + n_rows - step.n_rows
                    if (ends < running.most).any():  # where a step fills several cells of a stream
                        left //= widest
            elif len(step.decode) == n_rows == len(running.ids) == 1 and self._alone():
                left = most_cells - int(running.computed[step.decode[0]])
            else:
                left = 1
            repeat = fitting(max(1, min(repeat, left)), accounting.free)
        at_once = n_rows * min(repeat, AT_WORST if step.drafts else AT_ONCE)
        self._admission.cache.make_cells(max(n_rows, min(at_once, most)))
        if repeat == 1:
            return
        repeat = fitting(repeat, accounting.empty)
        if asked:
            step.stands = 1 if step.n_pad > n_rows else repeat  # for each tells what padding costs
            return
        step.repeat = repeat
        if self.compaction.possible and repeat > 1 and self.cost is not None:
            step.repeat = self.compaction.steps(step, accounting.held_by_slot, self.cost)

    def _close_gaps(self, rows: CheckedRows) -> tuple[tuple[int, int, int], ...]:
        """Where nothing comes that could take the empty slots between those that run, and it pays:
        (id, slot before, slot) of each sequence that goes on in one of them."""
        running, waiting = self._sequences.running, self._sequences.waiting.ids
        n, slots = len(running.ids), running.decode_slots
        if waiting or rows.others or rows.out or not len(slots) or int(slots[-1]) < n:
            return ()
        graphs = 0.0 if self.cost is None else self.padding.price(self.cost)
        if not self.compaction.due(int(np.count_nonzero(running.owner[n:])), graphs):
            return ()
        high = [entry for entry in running.ids.values() if entry.slot >= n]
        return self._moved(sorted(high, key=lambda entry: -entry.slot))

    def _n_pad(self, decode: Slots, out: list[int]) -> int:
        if self.invariance is not None:
            return self.invariance.width(decode[-1:].tolist())
        return 0 if out else self.padding.width(decode, self.accounting.held_by_slot, self.cost)

    def _cut(self, entry: Entry, n: int, chunks: list[PromptChunk], last: list[int]) -> None:
        """`n` rows of a sequence, or fewer where its prefix was longer than the policy knew, or a
        checkpoint is due: a chunk, and if they come to the last token that is to be sampled from,
        one of `last` for that."""
        slot, goal = entry.slot, entry.view.goal
        running = self._sequences.running
        start = int(running.computed[slot])
        known = start + int(running.ahead[slot])
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
        slot, goal = entry.slot, entry.view.goal
        known = start + int(self._sequences.running.ahead[slot])
        stop = known - 1 if goal is None else min(goal, known - 1)
        at, decoding = start, False
        while at < min(start + n, stop):
            size, decodes = entry.computed.next(at, stop)
            if decoding and not decodes:  # calls of chunks come first in a step
                return
            chunks.append(PromptChunk(entry.view.id, slot, at, size, decodes))
            at, decoding = at + size, decodes
        if start + n == known:
            last.append(slot)


def _why_moved(moved: tuple[int, int, int]) -> tuple[int, str]:
    id, source, slot = moved
    return id, f"moved from slot {source} to {slot}: neighbours are computed together"
