"""Sequences in an order, with ways to look at them that need not go through all of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .view import SequenceView

Rank = Callable[["SequenceView"], Any]
Key = Callable[["SequenceView"], Hashable]
Column = npt.NDArray[Any]

MOST_ORDERS = 8  # of each queue; the oldest one is forgotten for a new one


class SequenceList(Sequence["SequenceView"]):
    """The running, prefilling or waiting sequences of a view: a sequence of `SequenceView`s.

    `by`, `split` and `column` of a function cost little at each step: the scheduler keeps what they
    have sorted. The function must be the same object each time, not a lambda made on the spot. It
    must look only at what stays as it is while a sequence is in that list: not at `computed` of a
    prefilling one, not at `generated` of a running one."""

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
        return tuple(self)[index]

    def find(self, id: int) -> SequenceView | None:
        """The sequence of this id, None when it is not here."""
        return next((view for view in self if view.id == id), None)

    def by(self, rank: Rank) -> Iterable[SequenceView]:
        """The smallest `rank(sequence)` first; equal ones in the order of the list."""
        return sorted(self, key=rank)

    def split(self, key: Key) -> Mapping[Any, Iterable[SequenceView]]:
        """The sequences of each value of `key(sequence)`, in the order of the list."""
        groups: dict[Hashable, list[SequenceView]] = {}
        for view in self:
            groups.setdefault(key(view), []).append(view)
        return groups

    def column(self, what: str | Rank) -> Column:
        """One number of each sequence, shape (n,): a field of `SequenceView` by its name, or
        `what(sequence)` as float64. The order is the same one for all columns of a view, but not
        that of the list."""
        if isinstance(what, str):
            values = [getattr(view, what) for view in self]
            return np.array(values) if values else np.zeros(0, dtype=np.int64)
        return np.array([what(view) for view in self], dtype=np.float64)

    def itl_targets(self) -> Sequence[float]:
        """Seconds, ascending: infinity of each sequence that has none."""
        return sorted(map(itl_target, self))


def itl_target(seq: SequenceView) -> float:
    """Seconds; infinity where it has none."""
    return inf if seq.itl_target is None else seq.itl_target


class HasView(Protocol):
    """What a scheduler's queue holds of each sequence."""

    view: SequenceView


E = TypeVar("E", bound=HasView)


class SequenceQueue(SequenceList, Generic[E]):
    """A list that sequences join and leave. Each view is made when it is looked at (`seen`). Every
    order that was asked for stays up to date."""

    __slots__ = ("_indexes", "_n_joined", "_places", "_seen", "ids")

    def __init__(self, seen: Callable[[E], SequenceView]) -> None:
        self._seen = seen
        self.ids: OrderedDict[int, E] = OrderedDict()  # changed by `join` and `leave` alone
        self._places: dict[int, int] = {}  # id -> a number that grows along the queue
        self._n_joined = 0
        self._indexes: dict[tuple[Key | None, Rank | None], _Index] = {}

    # -- for the scheduler

    def join(self, id: int, entry: E, *, first: bool = False) -> None:
        """At the end of the queue, or with `first` at its head."""
        self._n_joined += 1
        place = self._places[id] = -self._n_joined if first else self._n_joined
        self.ids[id] = entry
        if first:
            self.ids.move_to_end(id, last=False)
        for index in self._indexes.values():
            index.add(self._seen(entry), place)

    def leave(self, id: int) -> E | None:
        """What the queue held of `id`; None when it did not."""
        entry = self.ids.pop(id, None)
        if entry is not None:
            del self._places[id]
            for index in self._indexes.values():
                index.remove(id)
        return entry

    def put(self, id: int, **changes: Any) -> None:
        """Change fields of the view of a sequence: it may rank differently then."""
        entry = self.ids[id]
        entry.view = entry.view._replace(**changes)
        for index in self._indexes.values():
            index.remove(id)
            index.add(entry.view, self._places[id])

    # -- for the policy

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[SequenceView]:
        return map(self._seen, self.ids.values())

    def __reversed__(self) -> Iterator[SequenceView]:
        return map(self._seen, reversed(self.ids.values()))

    def find(self, id: int) -> SequenceView | None:
        entry = self.ids.get(id)
        return None if entry is None else self._seen(entry)

    def by(self, rank: Rank) -> Iterable[SequenceView]:
        return self._views_of(self._index(None, rank).groups.get(None, []))

    def split(self, key: Key) -> Mapping[Any, Iterable[SequenceView]]:
        return _Groups(self._index(key, None).groups, self._views_of)

    # -- inside

    def _views_of(self, ranked: list[Ranked]) -> Iterator[SequenceView]:
        seen, entries = self._seen, self.ids
        return (seen(entries[id]) for _, _, id in ranked)

    def _index(self, key: Key | None, rank: Rank | None) -> _Index:
        index = self._indexes.get((key, rank))
        if index is None:
            if len(self._indexes) >= MOST_ORDERS:
                del self._indexes[next(iter(self._indexes))]
            index = self._indexes[key, rank] = _Index(key, rank)
            for id, entry in self.ids.items():
                index.add(entry.view, self._places[id])
        return index


Ranked = tuple[Any, int, int]  # rank, place in the queue, id


class _Index:
    """The sequences of each group, the smallest rank first. Without a key there is one group, of
    key None; without a rank all rank the same."""

    __slots__ = ("_at", "_key", "_rank", "groups")

    def __init__(self, key: Key | None, rank: Rank | None) -> None:
        self._key, self._rank = key, rank
        self._at: dict[int, tuple[Hashable, Ranked]] = {}
        self.groups: dict[Hashable, list[Ranked]] = {}

    def add(self, view: SequenceView, place: int) -> None:
        group = None if self._key is None else self._key(view)
        item = (None if self._rank is None else self._rank(view), place, view.id)
        self._at[view.id] = group, item
        insort(self.groups.setdefault(group, []), item)

    def remove(self, id: int) -> None:
        group, item = self._at.pop(id)
        ranked = self.groups[group]
        del ranked[bisect_left(ranked, item)]
        if not ranked:
            del self.groups[group]


class _Groups(Mapping[Any, Iterable["SequenceView"]]):
    """A split as a policy sees it."""

    __slots__ = ("_groups", "_views_of")

    def __init__(
        self,
        groups: dict[Hashable, list[Ranked]],
        views_of: Callable[[list[Ranked]], Iterable[SequenceView]],
    ) -> None:
        self._groups = groups
        self._views_of = views_of

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._groups)

    def __getitem__(self, key: Hashable) -> Iterable[SequenceView]:
        return self._views_of(self._groups[key])
