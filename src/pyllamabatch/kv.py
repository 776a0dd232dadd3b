"""Who holds which KV cells: plain arithmetic, no libllama.

A cell holds one token of one sequence. With a unified cache all sequences draw from one pool of
`n_cells`; with separate streams each sequence has `n_cells_seq` of its own. The ledger says before
a step whether its rows fit, so that `llama_decode` is never asked for a slot that is not there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int32]


class KvLedger:
    """Counts the cells that each slot (sequence id of the context) holds.

    `n_cells`: all sequences together. `n_cells_seq`: one sequence at most; `None` means `n_cells`
    for a unified cache and `n_cells // n_seq_max` for separate streams.
    """

    __slots__ = ("_held", "_used", "n_cells", "n_cells_seq", "n_seq_max", "unified")

    def __init__(
        self,
        n_cells: int,
        n_seq_max: int,
        *,
        unified: bool = True,
        n_cells_seq: int | None = None,
    ) -> None:
        if n_cells < 1 or n_seq_max < 1:
            raise ValueError(f"n_cells and n_seq_max must be positive, got {n_cells}, {n_seq_max}")
        self.n_cells = n_cells
        self.n_seq_max = n_seq_max
        self.unified = unified
        self.n_cells_seq = n_cells_seq or (n_cells if unified else n_cells // n_seq_max)
        self._held = np.zeros(n_seq_max, dtype=np.int64)
        self._used = 0

    @property
    def used(self) -> int:
        return self._used

    @property
    def free(self) -> int:
        """Cells that no sequence holds. With separate streams not every slot can use all of them:
        see `room`."""
        return self.n_cells - self._used

    def held(self, slot: int) -> int:
        return int(self._held[slot])

    def room(self, slot: int) -> int:
        """How many more tokens `slot` could take now."""
        room = self.n_cells_seq - int(self._held[slot])
        return min(room, self.free) if self.unified else room

    def take(self, slot: int, n: int) -> None:
        """Give `n` more cells to `slot`; ValueError when they are not there."""
        if n < 0 or n > self.room(slot):
            raise ValueError(f"slot {slot} asks for {n} cells, there is room for {self.room(slot)}")
        self._held[slot] += n
        self._used += n

    def take_each(self, slots: Slots, n: int = 1) -> None:
        """`n` more cells for each of `slots`, all different: as many steps of pure decoding."""
        n_all = n * len(slots)
        if n_all > self.free:
            raise ValueError(f"{n_all} cells are asked for, {self.free} are free")
        self._held[slots] += n
        self._used += n_all

    def release(self, slot: int) -> int:
        """`slot` holds nothing any more; returns how many cells that frees."""
        n = int(self._held[slot])
        self._held[slot] = 0
        self._used -= n
        return n

    def __repr__(self) -> str:
        kind = "unified" if self.unified else "streams"
        return f"KvLedger({kind}, {self._used} of {self.n_cells} cells held)"
