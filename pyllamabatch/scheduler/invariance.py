"""Batch invariance: rows are computed so that no number of a sequence depends on its neighbours.

A kernel may sum in another order when it has more rows, or when a row lies in another place. So the
rows of a call are those that the sequence would have alone, or as many as kernels do not tell
apart:

- A prompt is cut where positions of its own are multiples of `grid`, or a few smaller ones
  (`pyllamabatch.kv.grid`), and each chunk is a call of its own.
- Rows that decode, and a chunk of a single row, have a number in `widths`; others fill up
  (`Step.n_pad`).
- A token that was computed once is computed in the same way when it has to be computed again: a
  chunk as that chunk, a row that decoded as a row that decodes.
- A step that checks drafted tokens has as many rows of each sequence, of those that fill up, too:
  one of the numbers in `drafted`, which give each row the bits that it has where it decodes.
- What another sequence has left is used up to where a chunk ends, as far as it came from whole
  ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..kv.grid import last_end, next_end

GRID = 128  # positions: no kernel gains much from longer chunks, and a prefix loses less than this
LEAST_ROWS = 2
ROWS_EACH = (2, 4, 8)  # of a sequence in a step with drafts: numbers that are tried
EACH_WIDTH, STEP = 17, 8  # up to so many rows each number is tried, above that multiples of STEP


@dataclass(frozen=True, slots=True)
class Invariance:
    """Of one context. grid: positions, at most its n_ubatch. widths: numbers of rows that give a
    row that decodes the same bits at any place, ascending, the last one enough for all slots that
    may run. drafted: by width, how many rows of each sequence a step with drafts may have."""

    grid: int
    widths: tuple[int, ...]
    drafted: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def assumed(cls, n_ubatch: int, n_seq_max: int) -> Invariance:
        """Where nothing is computed, so that nothing can differ."""
        widths = tuple(tried(max(LEAST_ROWS, n_seq_max)))
        return cls(min(GRID, n_ubatch), widths, dict.fromkeys(widths, ROWS_EACH))

    def allowed(self, seconds: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
        """Of the seconds of steps with 0, 1, ... rows those that there may be at this width, with
        drafts and without; 0 for the others."""
        rows = [width * each for each in (1, *self.drafted.get(width, ()))]
        possible = np.zeros_like(seconds)
        possible[[n for n in rows if n < len(seconds)]] = 1
        return seconds * possible

    def width(self, slots: Iterable[int]) -> int:
        """Rows of a call in which these decode, from slot 0 on; 0 for none."""
        needed = 1 + max(slots, default=-1)
        return next(width for width in self.widths if width >= needed) if needed else 0

    def whole(self, n: int) -> int:
        """Of the first `n` positions those in whole chunks."""
        return last_end(n, self.grid)


def tried(most: int) -> list[int]:
    """Numbers of rows that are tried, up to `most`."""
    return [w for w in range(LEAST_ROWS, most + 1) if w <= EACH_WIDTH or w % STEP == 0 or w == most]


@dataclass(slots=True)
class Computed:
    """How the positions of one sequence were computed first, with chunks on `grid`.

    - high: so many were, at least once.
    - on_grid: so many of them in whole chunks from 0 on.
    - chunks: the other chunks, as (start, end), ascending. Rows in none are rows that decode.
    - shared: so many tokens may come from other sequences, or go to them: those that were known
      when it was added."""

    grid: int
    shared: int
    high: int = 0
    on_grid: int = 0
    chunks: list[tuple[int, int]] = field(default_factory=list)

    def next(self, at: int, stop: int) -> tuple[int, bool]:
        """Rows that are computed from `at` on in one call, not beyond `stop`, and whether these
        decode."""
        if self.on_grid <= at < self.high:
            for start, end in self.chunks:
                if start == at and end <= stop:
                    return end - start, False
            return 1, True
        n = min(next_end(at, self.grid), stop) - at
        return n, n == 1

    def add(self, start: int, n: int) -> None:
        """A chunk was computed."""
        end = start + n
        if start == self.on_grid and end == next_end(start, self.grid):
            self.on_grid = end
        elif end > self.on_grid and (not self.chunks or start >= self.chunks[-1][1]):
            self.chunks.append((start, end))
        self.high = max(self.high, end)

    def trim(self, known: int, computed: int) -> int:
        """Only so many tokens are known now, of which `computed` were computed, be it before they
        were lost. Returns how many stay computed: a chunk of which a part is left is computed again
        as the part."""
        for start, end in self.chunks:
            if start < computed < end:
                computed = start
        if computed < self.on_grid:
            self.on_grid = computed = last_end(computed, self.grid)
        self.shared = min(self.shared, known)
        self.high = min(self.high, computed)
        self.chunks = [chunk for chunk in self.chunks if chunk[1] <= computed]
        return computed
