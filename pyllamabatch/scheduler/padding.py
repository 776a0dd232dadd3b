"""Padding: rows that no sequence reads, so that the graph of decoding stays the same.

Where every sequence has a stream of cells, libllama's graph is made for certain slots: whenever a
sequence comes or goes it has to make another one, and a device to prepare for it. With a row for
every slot below some width, used or not, it need not. A row costs little or much, and a graph too:
a width that is too large is given up when its rows have cost as much as another graph would, and
one more when it is needed again.
"""

from __future__ import annotations

from ..cost.step_cost import StepCost
from ..kv import Slots

_LEARNED = 0.25  # the share of a new observation


class Padding:
    """Of one context. possible: its sequences have streams, and rows at their ends can be taken out
    again. graph: seconds that a new graph costs, as observed; None: not yet."""

    def __init__(self, *, possible: bool) -> None:
        self.graph: float | None = None
        self._possible = possible
        self._width = 0
        self._wasted = 0.0  # seconds, since it has this width

    def observe_graph(self, seconds: float) -> None:
        """A step that made a new graph took `seconds` longer than the next ones."""
        seconds = max(0.0, seconds)
        before = seconds if self.graph is None else self.graph
        self.graph = before + _LEARNED * (seconds - before)

    def width(self, decode: Slots, cost: StepCost | None) -> int:
        """Slots, from 0 on, that have a row in a step in which these decode (ascending); 0: only
        these."""
        price = self._price(cost)
        if not self._possible or not price or not len(decode):
            return 0
        needed = int(decode[-1]) + 1
        wasted = self._wasted + _waste(needed, self._width, cost)
        if needed > self._width or wasted > price:
            self._width, self._wasted = needed, 0.0
        return self._width

    def computed(self, decode: Slots, width: int, n: int, cost: StepCost | None) -> None:
        """`n` steps were computed with so many rows."""
        self._wasted += n * _waste(int(decode[-1]) + 1, width, cost)

    def _price(self, cost: StepCost | None) -> float:
        measured = 0.0 if cost is None else sum(cost.new_graph)
        return 2 * max(measured, self.graph or 0.0)


def _waste(needed: int, width: int, cost: StepCost | None) -> float:
    """Seconds that a step takes longer with `width` rows than with those that are needed."""
    if cost is None or needed >= width:
        return 0.0
    return max(0.0, cost.predict(width, 0, 0, width) - cost.predict(needed, 0, 0, needed))
