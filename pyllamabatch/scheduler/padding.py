"""Padding: rows that no sequence reads, so that the graph of decoding stays the same.

Where every sequence has a stream of cells, libllama's graph is made for certain slots: whenever a
sequence comes or goes it has to make another one, and a device to prepare for it. With a row for
every slot below some width, used or not, it need not. A row costs little or much, and a graph too:
a width is given up when its rows have cost as much more than a step without them as two other
graphs would, that for the new rows and that for when the width is needed again."""

import numpy as np
import numpy.typing as npt

from ..cost.step_cost import StepCost
from ..kv import Slots
from .step import spans
from .view import Limits

_LEARNED = 0.25  # the share of a new observation


class Padding:
    """Of one context. possible: its sequences have streams, and rows at their ends can be taken out
    again. graph: seconds that a new graph costs, as observed; None: not yet."""

    def __init__(self, limits: Limits, *, possible: bool) -> None:
        self.graph: float | None = None
        self._limits = limits
        self._possible = possible
        self._width = 0
        self._n_off = 0  # with no width: so many decoded when it was given up
        self._decode: Slots | None = None  # of the last step, and
        self._plain = 0.0  # its seconds without padding
        self._waste = 0.0  # seconds of a step with this width beyond those of the best one
        self._wasted = 0.0  # of all since it has this width

    def observe_graph(self, seconds: float) -> None:
        """A step that made a new graph took `seconds` longer than the next ones."""
        seconds = max(0.0, seconds)
        before = seconds if self.graph is None else self.graph
        self.graph = before + _LEARNED * (seconds - before)

    def width(self, decode: Slots, held: npt.NDArray[np.int64], cost: StepCost | None) -> int:
        """Slots, from 0 on, that have a row in a step in which these decode (ascending); 0: only
        these. held: positions by slot."""
        if not self._possible or cost is None or not len(decode):
            return 0
        price = self.price(cost)
        if not price:
            return 0
        limits, needed = self._limits, int(decode[-1]) + 1
        if needed > min(limits.n_batch, limits.n_ubatch):
            return 0
        if decode is not self._decode:
            self._decode = decode
            self._plain = unpadded_seconds(cost, decode, held, limits.gap_max)
        if len(decode) <= self._n_off:
            self._n_off = len(decode)
            return 0
        self._n_off = 0
        narrow = decode_seconds(cost, needed)
        best = min(narrow, self._plain)
        if needed > self._width:
            keep, off = False, narrow - self._plain > price
        else:
            self._waste = max(0.0, decode_seconds(cost, self._width) - best)
            keep = self._wasted + self._waste <= price
            off = not keep and self._plain < narrow
        if off:  # until a newcomer decodes
            self._width, self._n_off = 0, len(decode)
        elif not keep:
            self._width, self._waste = needed, narrow - best
        self._wasted = self._wasted if keep else 0.0
        return self._width

    def computed(self, n: int) -> None:
        """`n` steps were computed with so many rows as `width` has said last."""
        self._wasted += n * self._waste

    def price(self, cost: StepCost) -> float:
        """Seconds that two new graphs cost."""
        return 2 * max(sum(cost.new_graph), self.graph or 0.0)


def decode_seconds(cost: StepCost, n: int) -> float:
    """Of a step in which `n` sequences decode, by the cost model; what they hold aside."""
    return cost.predict(n, 0, 0, n)


def comes_behind(limits: Limits, cost: StepCost, n_wait: int, n_others: int) -> bool:
    """Whether the prompts' chunks are computed behind the rows of `n_others` that decode: their
    graph is built while the device computes those. `n_wait` sequences, whose prompt ends, could
    have decoded with them, and do so in the next step."""
    if not limits.behind or limits.unified or not n_others:
        return False
    return n_wait * decode_seconds(cost, n_others) / n_others < cost.new_graph.step


def unpadded_seconds(
    cost: StepCost, decode: Slots, held: npt.NDArray[np.int64], gap_max: int
) -> float:
    """The same where these slots decode, in as many parts as they are computed in. held: positions
    by slot."""
    return sum(decode_seconds(cost, part.rows) for part in spans(decode, held, gap_max))
