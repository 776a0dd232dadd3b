"""Who holds which KV cells: plain arithmetic, no libllama.

A cell holds one position of one sequence, or of several that share a prefix: it is counted
once, and is free when the last of them has left it. With a unified cache all sequences draw from
one pool of `n_cells`; with separate streams each slot has `n_cells_seq` of its own and nothing is
shared.

A slot (sequence id of the context) is running while a sequence runs in it, or cached: what it holds
waits for a sequence with the same prefix, and can be dropped at any time.

What is counted is positions, which is what the layers with full attention hold. Layers with a
sliding window hold fewer (`swa_full=False`), in a pool that libllama makes large enough for every
sequence; a recurrent state has one size whatever it has read.

Where the cells of a pool are is libllama's affair (src/llama-kv-cache.cpp: `find_slot`): a row
takes the next free one behind the last row's, or from the first one on that was emptied.
`reach` follows that about, as if the free ones were spread evenly."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]


@dataclass(slots=True, eq=False)
class _Run:
    """Cells of positions one after the other, up to `end`, that the same slots hold. cell: where
    `end` is, see `reach`."""

    start: int
    end: int
    n_running: int
    n_cached: int
    cell: float = 0.0


class KvAccounting:
    """Counts the cells that each slot holds.

    `n_cells`: all sequences together. `n_seq_max`: slots. `n_cells_seq`: one sequence at most;
    `None` means `n_cells` for a unified cache and `n_cells // n_seq_max` for separate streams.

    A slot's positions are `0 .. held - 1`: first those that others hold too (or have held), in
    `_runs`; then, from `_own_from` on, those that have been its own ever since."""

    __slots__ = (
        "_cached", "_first", "_head", "_held", "_last", "_n_cached", "_newest_first", "_own_from",
        "_reach", "_runs", "_used", "n_cells", "n_cells_seq", "n_seq_max", "unified",
    )  # fmt: skip

    def __init__(
        self, n_cells: int, n_seq_max: int, *, unified: bool = True, n_cells_seq: int | None = None
    ) -> None:
        if n_cells < 1 or n_seq_max < 1:
            raise ValueError(f"n_cells and n_seq_max must be positive, got {n_cells}, {n_seq_max}")
        self.n_seq_max = n_seq_max
        self._held = np.zeros(n_seq_max, dtype=np.int64)
        self.reset(n_cells, unified, n_cells_seq)

    def reset(self, n_cells: int, unified: bool, n_cells_seq: int | None) -> None:
        """No slot holds anything, and this is what there is from now on."""
        n_seq_max = self.n_seq_max
        self.n_cells = n_cells
        self.unified = unified
        self.n_cells_seq = n_cells_seq or (n_cells if unified else n_cells // n_seq_max)
        self._held[:] = 0
        self._own_from = [0] * n_seq_max
        self._runs: list[list[_Run]] = [[] for _ in range(n_seq_max)]
        self._cached = [False] * n_seq_max
        self._used = 0  # cells that any slot holds
        self._head = self._reach = 0.0  # where the next row looks; behind the last cell
        self._first = np.full(n_seq_max, np.inf)  # about, of each slot's cells
        self._last = np.zeros(n_seq_max)
        self._newest_first = 0.0
        self._n_cached = 0  # of these, cells that no running slot holds

    # -- what there is

    @property
    def used(self) -> int:
        """Cells that any slot holds, cached ones included."""
        return self._used

    @property
    def cached(self) -> int:
        """Cells that only cached slots hold: they can be had by dropping these."""
        return self._n_cached

    @property
    def empty(self) -> int:
        """Cells that no slot holds."""
        return self.n_cells - self._used

    @property
    def free(self) -> int:
        """Cells that no running slot holds. With separate streams not every slot can use all of
        them: see `room`."""
        return self.n_cells - self._used + self._n_cached

    @property
    def reach(self) -> int:
        """Cells of a unified cache up to the last one that is held, about: `used` and the free ones
        between them."""
        return max(self._used, min(round(self._reach), self.n_cells))

    def held(self, slot: int) -> int:
        """Positions of `slot`, shared ones included."""
        return int(self._held[slot])

    @property
    def held_by_slot(self) -> npt.NDArray[np.int64]:
        """`held` of all slots: always the same array, the accounting's own, to read."""
        return self._held

    def longest(self, slots: list[int]) -> int:
        """Positions of the one of `slots` that has most."""
        return int(self._held[slots].max())

    def is_cached(self, slot: int) -> bool:
        return self._cached[slot]

    def alone(self, slot: int) -> int:
        """Cells that no other slot holds: what `release` would empty."""
        shared = sum(
            run.end - run.start for run in self._runs[slot] if run.n_running + run.n_cached > 1
        )
        return int(self._held[slot]) - shared

    def frees(self, *slots: int) -> int:
        """Cells that are free when these running slots run no more: no other running one holds
        them."""
        own = sum(int(self._held[slot]) - self._own_from[slot] for slot in slots)
        runs = Counter(run for slot in slots for run in self._runs[slot])
        return own + sum(run.end - run.start for run, n in runs.items() if n == run.n_running)

    def unused(self, slot: int, n: int) -> int:
        """Of the first `n` positions of `slot` the cells that no running slot holds."""
        if not self._cached[slot]:
            return 0
        own = max(0, n - self._own_from[slot])
        runs = (run for run in self._runs[slot] if run.n_running == 0 and run.start < n)
        return own + sum(min(run.end, n) - run.start for run in runs)

    def room(self, slot: int) -> int:
        """How many more tokens `slot` could take now, without dropping anything."""
        room = self.n_cells_seq - int(self._held[slot])
        return min(room, self.empty) if self.unified else room

    # -- changes

    def take(self, slot: int, n: int) -> None:
        """Give `n` more cells to a running `slot`; ValueError when they are not there."""
        if n < 0 or n > self.room(slot) or self._cached[slot]:
            raise ValueError(f"slot {slot} asks for {n} cells, there is room for {self.room(slot)}")
        self._place(slot, n)
        self._held[slot] += n
        self._used += n

    def take_each(
        self, slots: npt.NDArray[np.integer], n: int | npt.NDArray[np.integer] = 1
    ) -> None:
        """`n` more cells for each of the running `slots`, all different: as many steps of pure
        decoding; or so many for each."""
        n_all = n * len(slots) if isinstance(n, int) else int(n.sum())
        if n_all > self.empty:
            raise ValueError(f"{n_all} cells are asked for, {self.empty} are free")
        slots = slots.astype(np.intp)  # NumPy takes twice as long for any other type
        self._place(slots, n_all)
        self._held[slots] += n
        self._used += n_all

    def share(self, source: int, target: int, n: int) -> None:
        """The empty `target` runs from now on, and holds the first `n` positions of `source`, too.
        In a unified cache these are the same cells, in separate streams a copy."""
        if self._held[target] or self._cached[target]:
            raise ValueError(f"slot {target} is not empty")
        if not 0 < n <= self._held[source]:
            raise ValueError(f"{n} of {self._held[source]} positions of slot {source}")
        if not self.unified:
            self.take(target, n)
            return
        self._cut(source, n)
        runs = self._runs[target] = [run for run in self._runs[source] if run.start < n]
        for run in runs:
            if run.n_running == 0:
                self._n_cached -= run.end - run.start
            run.n_running += 1
        self._held[target] = self._own_from[target] = n
        self._first[target], self._last[target] = self._first[source], runs[-1].cell

    def cache(self, slot: int) -> None:
        """A running slot runs no more, what it holds is cached."""
        if self._cached[slot]:
            raise ValueError(f"slot {slot} is cached already")
        self._cached[slot] = True
        self._n_cached += int(self._held[slot]) - self._own_from[slot]
        for run in self._runs[slot]:
            run.n_running -= 1
            run.n_cached += 1
            if run.n_running == 0:
                self._n_cached += run.end - run.start

    def resume(self, slot: int) -> None:
        """A cached slot is running again, with all that it holds."""
        if not self._cached[slot]:
            raise ValueError(f"slot {slot} is running")
        self._cached[slot] = False
        self._n_cached -= int(self._held[slot]) - self._own_from[slot]
        for run in self._runs[slot]:
            if run.n_running == 0:
                self._n_cached -= run.end - run.start
            run.n_running += 1
            run.n_cached -= 1

    def trim(self, slot: int, n: int) -> int:
        """Only the first `n` positions of `slot` are held from now on; returns how many cells that
        empties. A cached slot that holds nothing is running again."""
        held = int(self._held[slot])
        if not 0 <= n <= held:
            raise ValueError(f"{n} of {held} positions of slot {slot}")
        cached, runs = self._cached[slot], self._runs[slot]
        own = held - max(n, self._own_from[slot])
        emptied = max(own, 0)
        at = self._cell(slot, held - emptied) if self.unified else 0.0  # from where on it empties
        if n < self._own_from[slot]:
            self._cut(slot, n)
            while runs and runs[-1].start >= n:
                left = self._leave(runs.pop(), cached)
                if left:
                    at = self._before(slot)
                emptied += left
            self._own_from[slot] = n
        if self.unified and n < held:
            if emptied:
                self._head = min(self._head, at)
            self._last[slot] = self._before(slot) if own < held - n else at
            if n == 0:
                self._first[slot], self._last[slot] = np.inf, 0.0
        self._held[slot] = n
        if cached:
            self._n_cached -= max(own, 0)
            self._cached[slot] = n > 0
        self._used -= emptied
        if self.unified:
            self._reach = max(self._used, float(self._last.max()))
        return emptied

    def release(self, slot: int) -> int:
        """`slot` holds nothing any more; returns how many cells that empties."""
        return self.trim(slot, 0)

    # -- inside

    def _place(self, slots: int | npt.NDArray[np.integer], n: int) -> None:
        """The next `n` free cells are for these slots. All in front of the head are held, so it is
        no further than `used`."""
        if not self.unified or not n:
            return
        reach, used = self._reach, self._used
        head, free = min(self._head, used), reach - used
        end = head + n * (reach - head) / free if n < free else float(used + n)
        # No first is behind `_newest_first`, no last behind `reach`: then there is less to compare.
        if head < self._newest_first or not self._held[slots].all():
            self._first[slots] = np.minimum(self._first[slots], head)
            self._newest_first = max(self._newest_first, head)
        self._last[slots] = end if end >= reach else np.maximum(self._last[slots], end)
        self._head, self._reach = end, max(reach, end)

    def _before(self, slot: int, i: int | None = None) -> float:
        """Where the cells of a slot's run `i`, or those of its own, begin."""
        runs = self._runs[slot][:i]
        return runs[-1].cell if runs else float(self._first[slot])

    def _cell(self, slot: int, n: int) -> float:
        """Where position `n` is, one of its own, as if these were spread evenly."""
        first, own_from = self._before(slot), self._own_from[slot]
        if n == own_from:
            return first
        part = (n - own_from) / (int(self._held[slot]) - own_from)
        return first + (float(self._last[slot]) - first) * part

    def _cut(self, slot: int, n: int) -> None:
        """Make position `n` of `slot` the end of a run."""
        runs, own_from = self._runs[slot], self._own_from[slot]
        if n > own_from:  # what was its own is a run of one holder
            cached = self._cached[slot]
            runs.append(_Run(own_from, n, not cached, cached, self._cell(slot, n)))
            self._own_from[slot] = n
            return
        for i, run in enumerate(runs):
            if run.start < n < run.end:
                rest = _Run(n, run.end, run.n_running, run.n_cached, run.cell)
                first = self._before(slot, i)
                run.cell = first + (run.cell - first) * (n - run.start) / (run.end - run.start)
                run.end = n
                for others in self._runs:
                    if run in others:
                        others.insert(others.index(run) + 1, rest)
                return

    def _leave(self, run: _Run, cached: bool) -> int:
        """One holder of `run` less; how many cells that empties."""
        n = run.end - run.start
        if cached:
            run.n_cached -= 1
            if run.n_running + run.n_cached == 0:
                self._n_cached -= n
                return n
        else:
            run.n_running -= 1
            if run.n_running == 0:
                if run.n_cached == 0:
                    return n
                self._n_cached += n
        return 0

    def __repr__(self) -> str:
        kind = "unified" if self.unified else "streams"
        held = f"{self._used} of {self.n_cells} cells held"
        return f"KvAccounting({kind}, {held}, {self._n_cached} cached)"
