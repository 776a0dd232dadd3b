"""Whose turn it is, where sequences decode a few at a time."""

from bisect import bisect_right
from collections import deque
from collections.abc import Set
from itertools import islice
from typing import Protocol

from ..view import StepView


class Rotation(Protocol):
    def follow(self, view: StepView) -> None:
        """Those of `view.decoding` decode now."""

    def out(self, width: int) -> Set[int]:
        """Those that sit out while at most `width` others have a row."""

    def turn(self, width: int) -> None:
        """They have had it."""


class Queue:
    """The one that has waited longest is first; a new one is last. Any `width` go together."""

    __slots__ = ("_ids", "_queue")

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._queue: deque[int] = deque()

    def follow(self, view: StepView) -> None:
        new = [id for id in view.decoding if id not in self._ids]
        self._ids = {*view.decoding}
        here = (id for id in self._queue if id in self._ids)
        self._queue = deque([*here, *new])

    def out(self, width: int) -> Set[int]:
        return frozenset(islice(self._queue, width, None))

    def turn(self, width: int) -> None:
        self._queue.rotate(-width)


class Windows:
    """In the order of their slots the next `width` of them at a time, and at the end those that are
    left: those of a window follow each other."""

    __slots__ = ("_after", "_ids", "_slots")

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._slots: list[int] = []  # of each, ascending
        self._after = -1  # the last slot of the window before this one

    def follow(self, view: StepView) -> None:
        self._ids = sorted(view.decoding, key=view.kv.slot_of)
        self._slots = [view.kv.slot_of(id) for id in self._ids]

    def out(self, width: int) -> Set[int]:
        first = self._first()
        return frozenset((*self._ids[:first], *self._ids[first + width :]))

    def turn(self, width: int) -> None:
        self._after = self._slots[min(self._first() + width, len(self._ids)) - 1]

    def _first(self) -> int:
        at = bisect_right(self._slots, self._after)
        return at if at < len(self._slots) else 0
