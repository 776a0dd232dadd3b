"""Sequences in an order, with ways to look at them that need not go through all of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .view import SequenceView

Rank = Callable[["SequenceView"], Any]
Key = Callable[["SequenceView"], Hashable]
Column = npt.NDArray[Any]


class SequenceList(Sequence["SequenceView"]):
    """The running, prefilling or waiting sequences of a view: a sequence of `SequenceView`s.

    `by`, `above` and `split` cost little at each step, because the scheduler keeps what they have
    sorted: the function that they get must be the same one each time (not a lambda made on the
    spot), and must look only at what stays as it is while a sequence is in that line: not at
    `computed` of a prefilling one, not at `generated` of a running one.
    """

    __slots__ = ("_views",)

    def __init__(self, views: Iterable[SequenceView] = ()) -> None:
        self._views = tuple(views)

    def __len__(self) -> int:
        return len(self._views)

    def __iter__(self) -> Iterator[SequenceView]:
        return iter(self._views)

    @overload
    def __getitem__(self, index: int) -> SequenceView: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SequenceView, ...]: ...
    def __getitem__(self, index: int | slice) -> SequenceView | tuple[SequenceView, ...]:
        return self._views[index]

    def by(self, rank: Rank) -> Iterable[SequenceView]:
        """The smallest `rank(sequence)` first; equal ones in the order of the line."""
        return sorted(self, key=rank)

    def above(self, rank: Rank, bound: Any) -> Iterable[SequenceView]:
        """As `by`, but only those whose rank is larger than `bound`."""
        return (view for view in self.by(rank) if rank(view) > bound)

    def split(self, key: Key) -> Mapping[Hashable, Iterable[SequenceView]]:
        """One line for each value of `key(sequence)`."""
        lines: dict[Hashable, list[SequenceView]] = {}
        for view in self:
            lines.setdefault(key(view), []).append(view)
        return lines

    def column(self, name: str) -> Column:
        """One number of each sequence, in the order of the line: int64, shape (n,). The name is
        one of `SequenceView`'s; `itl_target` is float64, infinity where there is none."""
        if name == "itl_target":
            targets = (view.itl_target for view in self)
            return np.array([np.inf if t is None else t for t in targets], dtype=np.float64)
        return np.array([getattr(view, name) for view in self], dtype=np.int64)

    def unordered(self, name: str) -> Column:
        """As `column`, in some other order, the same one for every name: costs less where
        sequences come and go at every step."""
        return self.column(name)


class Seen(Protocol):
    """What a scheduler's line holds of each sequence."""

    view: SequenceView


E = TypeVar("E", bound=Seen)


class SequenceQueue(SequenceList, Generic[E]):
    """A line that sequences join and leave. Each view is made when it is looked at (`seen`), and
    every order that was asked for is kept up to date; whoever asks for none pays for none."""

    __slots__ = ("_first", "_last", "_orders", "_seen", "_splits", "_where", "ids")

    def __init__(self, seen: Callable[[E], SequenceView]) -> None:
        self._seen = seen
        self.ids: OrderedDict[int, E] = OrderedDict()  # whom it holds; changed by itself alone
        # id -> a number that grows along the line, from the first order on
        self._where: dict[int, int] | None = None
        self._first = self._last = 0
        self._orders: dict[Rank, _Sorted] = {}
        self._splits: dict[Key, _Split] = {}

    # -- for the scheduler

    def join(self, id: int, entry: E, *, first: bool = False) -> None:
        """At the end of the line, or with `first` at its head."""
        self.ids[id] = entry
        if first:
            self.ids.move_to_end(id, last=False)
        if self._where is None:
            return
        if first:
            self._first -= 1
            self._where[id] = self._first
        else:
            self._where[id] = self._last
            self._last += 1
        self._index(id, entry.view, self._where[id])

    def leave(self, id: int) -> E | None:
        """What the line held of `id`; None when it did not."""
        entry = self.ids.pop(id, None)
        if self._where is not None and self._where.pop(id, None) is not None:
            self._unindex(id)
        return entry

    def get(self, id: int) -> E | None:
        return self.ids.get(id)

    def put(self, id: int, **changes: Any) -> None:
        """Change fields of the view of a sequence in the line: it may rank differently then."""
        entry = self.ids[id]
        entry.view = replace(entry.view, **changes)
        if self._where is not None:
            self._unindex(id)
            self._index(id, entry.view, self._where[id])

    # -- for the policy

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[SequenceView]:
        return map(self._seen, self.ids.values())

    def __reversed__(self) -> Iterator[SequenceView]:
        return map(self._seen, reversed(self.ids.values()))

    @overload
    def __getitem__(self, index: int) -> SequenceView: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SequenceView, ...]: ...
    def __getitem__(self, index: int | slice) -> SequenceView | tuple[SequenceView, ...]:
        entries = list(self.ids.values())
        if isinstance(index, slice):
            return tuple(map(self._seen, entries[index]))
        return self._seen(entries[index])

    def by(self, rank: Rank) -> Iterable[SequenceView]:
        entries, seen = self.ids, self._seen
        return (seen(entries[id]) for _, _, id in self._sorted(rank))

    def above(self, rank: Rank, bound: Any) -> Iterable[SequenceView]:
        order, entries, seen = self._sorted(rank), self.ids, self._seen
        start = bisect_right(order, bound, key=_rank_of)
        return (seen(entries[id]) for _, _, id in islice(order, start, None))

    def split(self, key: Key) -> Mapping[Hashable, Iterable[SequenceView]]:
        split = self._splits.get(key)
        if split is None:
            _make_room(self._splits)
            split = self._splits[key] = _Split(key, self.ids.values(), self._places())
        entries, seen = self.ids, self._seen

        def views(line: list[tuple[int, int]]) -> Iterable[SequenceView]:
            return (seen(entries[id]) for _, id in line)

        return _Lines(split.lines, views)

    # -- inside

    def _sorted(self, rank: Rank) -> list[Ranked]:
        order = self._orders.get(rank)
        if order is None:
            _make_room(self._orders)
            order = self._orders[rank] = _Sorted(rank, self.ids.values(), self._places())
        return order.sorted

    def _places(self) -> Mapping[int, int]:
        if self._where is None:
            self._where = {id: place for place, id in enumerate(self.ids)}
            self._last = len(self._where)
        return self._where

    def _index(self, id: int, view: SequenceView, place: int) -> None:
        for order in self._orders.values():
            order.add(id, view, place)
        for split in self._splits.values():
            split.add(id, view, place)

    def _unindex(self, id: int) -> None:
        for order in self._orders.values():
            order.remove(id)
        for split in self._splits.values():
            split.remove(id)


MOST_ORDERS = 8  # kept up to date at once; the oldest one is forgotten for a new one


def _make_room(kept: dict[Any, Any]) -> None:
    if len(kept) >= MOST_ORDERS:
        del kept[next(iter(kept))]


Ranked = tuple[Any, int, int]  # rank, place in the line, id


def _rank_of(item: Ranked) -> Any:
    return item[0]


class _Sorted:
    """Each sequence, smallest first."""

    __slots__ = ("_at", "_rank", "sorted")

    def __init__(self, rank: Rank, entries: Iterable[Seen], where: Mapping[int, int]) -> None:
        self._rank = rank
        views = [entry.view for entry in entries]
        self._at = {view.id: (rank(view), where[view.id], view.id) for view in views}
        self.sorted = sorted(self._at.values())

    def add(self, id: int, view: SequenceView, place: int) -> None:
        item = self._at[id] = (self._rank(view), place, id)
        insort(self.sorted, item)

    def remove(self, id: int) -> None:
        del self.sorted[bisect_left(self.sorted, self._at.pop(id))]


class _Split:
    """(place in the line, id) of each sequence, by key."""

    __slots__ = ("_at", "_key", "lines")

    def __init__(self, key: Key, entries: Iterable[Seen], where: Mapping[int, int]) -> None:
        self._key = key
        self._at: dict[int, tuple[Hashable, tuple[int, int]]] = {}
        self.lines: dict[Hashable, list[tuple[int, int]]] = {}
        for view in [entry.view for entry in entries]:
            self.add(view.id, view, where[view.id])

    def add(self, id: int, view: SequenceView, place: int) -> None:
        key, item = self._at[id] = (self._key(view), (place, id))
        insort(self.lines.setdefault(key, []), item)

    def remove(self, id: int) -> None:
        key, item = self._at.pop(id)
        line = self.lines[key]
        del line[bisect_left(line, item)]
        if not line:
            del self.lines[key]


class _Lines(Mapping[Hashable, Iterable["SequenceView"]]):
    """A split as a policy sees it."""

    __slots__ = ("_lines", "_views")

    def __init__(
        self,
        lines: dict[Hashable, list[tuple[int, int]]],
        views: Callable[[list[tuple[int, int]]], Iterable[SequenceView]],
    ) -> None:
        self._lines = lines
        self._views = views

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._lines)

    def __getitem__(self, key: Hashable) -> Iterable[SequenceView]:
        return self._views(self._lines[key])
