"""Which sequences must be done by when."""

import heapq


class Deadlines:
    """Times on the scheduler's clock, by sequence id. `next`: the earliest one."""

    __slots__ = ("_heap", "_times", "next")

    def __init__(self) -> None:
        self.next: float | None = None
        self._times: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []  # those of sequences that are gone, too

    def add(self, id: int, time: float) -> None:
        self._times[id] = time
        heapq.heappush(self._heap, (time, id))
        self._find_next()

    def remove(self, id: int) -> None:
        """Fine when there is none."""
        if self._times.pop(id, None) is not None:
            self._find_next()

    def due(self, now: float) -> list[int]:
        """The sequences whose time has come, earliest first; they have no deadline any more."""
        ids: list[int] = []
        while self.next is not None and self.next <= now:
            ids.append(self._heap[0][1])
            self.remove(ids[-1])
        return ids

    def _find_next(self) -> None:
        heap = self._heap
        while heap and heap[0][1] not in self._times:
            heapq.heappop(heap)
        self.next = heap[0][0] if heap else None
