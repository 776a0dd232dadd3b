"""Which sequences must be done by when."""

from __future__ import annotations

import heapq


class Deadlines:
    """Times on the scheduler's clock, by sequence id."""

    __slots__ = ("_heap", "_times")

    def __init__(self) -> None:
        self._times: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []  # those of sequences that are gone, too

    def add(self, id: int, time: float) -> None:
        self._times[id] = time
        heapq.heappush(self._heap, (time, id))

    def remove(self, id: int) -> None:
        """Fine when there is none."""
        self._times.pop(id, None)

    @property
    def next(self) -> float | None:
        """The earliest one."""
        heap = self._heap
        while heap and heap[0][1] not in self._times:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now: float) -> list[int]:
        """The sequences whose time has come, earliest first; they have no deadline any more."""
        ids = []
        while (time := self.next) is not None and time <= now:
            ids.append(heapq.heappop(self._heap)[1])
            self.remove(ids[-1])
        return ids
