"""Compaction: sequences in high slots go on in empty low ones.

Where every sequence has a stream of cells, those that decode are computed together as neighbours
only (`spans`). What has ended leaves gaps between them: rows fill these that no sequence reads, or
they cut a step into parts. Every step pays for that while nothing comes to take the slots. Once
the steps have paid as much as closing the gaps costs, they are closed."""

from math import ceil

import numpy as np
import numpy.typing as npt

from ..cost.step_cost import StepCost
from ..kv import Slots
from .padding import decode_seconds, unpadded_seconds
from .step import Step
from .view import Limits


class Compaction:
    """Of one context. stream_seconds: for a copy of a stream of cells. possible: its sequences
    have streams, and these can be copied."""

    def __init__(self, limits: Limits, stream_seconds: float, *, possible: bool) -> None:
        self.possible = possible
        self._gap_max = limits.gap_max
        self._stream_seconds = stream_seconds
        self._price = 0.0  # seconds to close the gaps that there are
        self._paid = 0.0  # seconds that they have cost, but for
        self._n = 0  # the last steps, all of
        self._decode: Slots | None = None  # these rows
        self._n_pad = 0
        self._waste = 0.0  # seconds of each

    def due(self, n_moves: int, graphs: float) -> bool:
        """Whether `n_moves` sequences had better move now, which closes the gaps. graphs: seconds
        that new graphs cost then."""
        self._price = n_moves * self._stream_seconds + graphs
        return self._waste > 0 and self._n >= self._n_due()

    def steps(self, step: Step, held: npt.NDArray[np.int64], cost: StepCost) -> int:
        """How often `step` may be computed before there is something to close. held: positions by
        slot."""
        self._meet(step, held, cost)
        return max(1, min(step.repeat, self._n_due() - self._n)) if self._waste else step.repeat

    def computed(self, step: Step, n: int, held: npt.NDArray[np.int64], cost: StepCost) -> None:
        """`step` was computed `n` times."""
        self._meet(step, held, cost)
        self._n += n

    def _n_due(self) -> int:
        return ceil((self._price - self._paid) / self._waste)

    def _meet(self, step: Step, held: npt.NDArray[np.int64], cost: StepCost) -> None:
        """Now it is about the rows of `step`."""
        if step.decode is self._decode and step.n_pad == self._n_pad:
            return
        self._paid += self._n * self._waste
        self._decode, self._n_pad, self._n, n = step.decode, step.n_pad, 0, len(step.decode)
        if step.n_pad:
            seconds = decode_seconds(cost, step.n_pad)
        else:
            seconds = unpadded_seconds(cost, step.decode, held, self._gap_max)
        self._waste = max(0.0, seconds - decode_seconds(cost, n))
        if not self._waste:
            self._paid = 0.0
