"""The running sequences: their counters, in arrays by slot, and how a policy sees them."""

from bisect import bisect_left, insort
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..kv import Slots
from ..kv.radix_tree import Tokens
from .invariance import Computed
from .queue import Column, Rank, SequenceList, SequenceQueue, itl_target
from .view import SequenceView


class KnownTokens(Protocol):
    """What a sequence's tokens are read from."""

    def known(self) -> Tokens:
        """All tokens that the sequence knows now: int32, its prompt and what was sampled."""


@dataclass(slots=True)
class Entry:
    """One sequence. While it runs its counters are those of `RunningSequences` at `slot`.

    - tokens: None where it shares nothing. high: tokens that were computed at least once.
      computed: how they were, where that has to be the same again (`Invariance`).
    - true: `view` says how it is now."""

    view: SequenceView
    tokens: KnownTokens | None = None
    slot: int = -1
    high: int = 0
    computed: Computed | None = None
    true: bool = True

    @property
    def n_wanted(self) -> int:
        """Tokens that it is to have computed, while it does not run."""
        return self.view.known if self.view.goal is None else self.view.goal

    def known_tokens(self) -> Tokens | None:
        """What it is to compute, and may share."""
        if self.tokens is None:
            return None
        tokens = self.tokens.known()[: self.view.goal]
        return tokens if self.computed is None else tokens[: self.computed.shared]


class RunningSequences(SequenceQueue[Entry]):
    """In the order of admission.

    - computed: tokens in the cache, by slot: what `KvAccounting` says it holds.
    - ahead: tokens that are known and not computed; of one that decodes always 1. most: what is
      computed at the very end: all but the last one. owner: id + 1. int64 by slot, 0 where none
      runs.
    - decoding: ids of those that decode. asked: slot -> id of the interactive ones of these."""

    def __init__(self, computed: npt.NDArray[np.int64]) -> None:
        super().__init__(self.seen)
        n_slots = len(computed)
        self.computed = computed
        self._numbers = np.zeros((5, n_slots), dtype=np.int64)
        self.ahead, self._n_prompt, self.most, self._start, self.owner = self._numbers
        self._itl_targets: list[float] = []
        self._facts: dict[Rank, npt.NDArray[np.float64]] = {}  # by the function they come from
        self._decoding: dict[int, None] = {}
        self.decoding: Set[int] = self._decoding.keys()
        self.asked: dict[int, int] = {}
        self._decodes_in = np.zeros(n_slots, dtype=bool)
        self._decode_slots: Slots | None = None
        self._occupied: npt.NDArray[np.intp] | None = None

    def join(self, id: int, entry: Entry, *, first: bool = False) -> None:
        """`entry.slot`, and what that holds, is its own from now on."""
        super().join(id, entry, first=first)
        view, slot = entry.view, entry.slot
        entry.true = False
        known, most = view.known, view.n_prompt + view.max_tokens - 1
        ahead = known - self.computed[slot]
        self._numbers[:, slot] = ahead, view.n_prompt, most, known, id + 1
        insort(self._itl_targets, itl_target(view))
        for function, facts in self._facts.items():
            facts[slot] = function(view)
        self._occupied = None

    def leave(self, id: int) -> Entry | None:
        entry = super().leave(id)
        if entry is not None:
            self._numbers[:, entry.slot] = 0
            self._occupied = None
            targets = self._itl_targets
            del targets[bisect_left(targets, itl_target(entry.view))]
        return entry

    def move(self, entry: Entry, slot: int) -> None:
        """It runs in `slot` from now on, which holds all that it has computed."""
        source, entry.slot = entry.slot, slot
        for by_slot in (*self._numbers, self._decodes_in, *self._facts.values()):
            by_slot[slot] = by_slot[source]
        self._numbers[:, source] = 0
        self._decodes_in[source] = False
        if source in self.asked:
            self.asked[slot] = self.asked.pop(source)
        self._decode_slots = self._occupied = None

    def seen(self, entry: Entry) -> SequenceView:
        """How it is now; made again only when it has changed."""
        view = entry.view
        if entry.true:
            return view
        slot = entry.slot
        computed = int(self.computed[slot])
        known = computed + int(self.ahead[slot])
        generated = known - view.n_prompt
        if view.computed != computed or view.generated != generated or not view.running:
            turn = known - int(self._start[slot])
            view = entry.view = view._replace(
                computed=computed, generated=generated, running=True, turn=turn
            )
        entry.true = view.id not in self.decoding  # a decode moves without a word
        return view

    def set(self, entry: Entry, view: SequenceView) -> None:
        """A running sequence is `view` from now on, whose `turn` is what it was."""
        entry.view, entry.true = view, False
        slot, known = entry.slot, view.known
        self.ahead[slot], self._n_prompt[slot] = known - view.computed, view.n_prompt
        self._start[slot] = known - view.turn
        for function, facts in self._facts.items():
            facts[slot] = function(view)

    def start_decoding(self, entry: Entry) -> None:
        id, slot = entry.view.id, entry.slot
        entry.true = False  # from now on it moves without a word
        self._decoding[id] = None
        if entry.view.goal is not None:
            self.asked[slot] = id
        self._decodes_in[slot] = True
        self._decode_slots = None

    def stop_decoding(self, entry: Entry) -> None:
        """Fine when it did not decode."""
        id, slot = entry.view.id, entry.slot
        if id in self._decoding:
            del self._decoding[id]
            self.asked.pop(slot, None)
            self._decodes_in[slot] = False
            self._decode_slots = None

    @property
    def decode_slots(self) -> Slots:
        """Slots of those that decode: ascending, read-only, the same array until one comes or
        goes."""
        if self._decode_slots is None:
            self._decode_slots = self._decodes_in.nonzero()[0].astype(np.int32)
            self._decode_slots.flags.writeable = False
        return self._decode_slots

    def decode_slots_but(self, out: list[int], more: list[int]) -> Slots:
        """`decode_slots` without `out`, and with `more`."""
        if not (out or more):
            return self.decode_slots
        wanted = self._decodes_in.copy()
        wanted[out] = False
        wanted[more] = True
        slots: Slots = wanted.nonzero()[0].astype(np.int32)
        return slots

    def remaining(self, entry: Entry) -> int:
        """`seen(entry).remaining`, and no view is made."""
        goal, slot = entry.view.goal, entry.slot
        return int(self.ahead[slot] if goal is None else max(0, goal - self.computed[slot]))

    def column(self, what: str | Rank) -> Column:
        """See `SequenceList`. In the order of the slots."""
        if self._occupied is None:
            (self._occupied,) = self.owner.nonzero()
        slots = self._occupied
        if not isinstance(what, str):
            return self._facts_of(what)[slots]
        if what == "id":
            return self.owner[slots] - 1
        if what == "n_prompt":
            return self._n_prompt[slots]
        if what == "computed":
            return self.computed[slots]
        if what == "generated":
            return self._known(slots) - self._n_prompt[slots]
        if what == "turn":
            return self._known(slots) - self._start[slots]
        if what == "max_tokens":
            return self.most[slots] + 1 - self._n_prompt[slots]
        by_slot = sorted(self.ids.values(), key=_slot_of)
        return SequenceList(map(self.seen, by_slot)).column(what)

    def itl_targets(self) -> Sequence[float]:
        return self._itl_targets

    def _known(self, slots: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        return self.computed[slots] + self.ahead[slots]

    def _facts_of(self, function: Rank) -> npt.NDArray[np.float64]:
        facts = self._facts.get(function)
        if facts is None:
            facts = self._facts[function] = np.zeros(len(self.owner))
            for entry in self.ids.values():
                facts[entry.slot] = function(entry.view)
        return facts


def _slot_of(entry: Entry) -> int:
    return entry.slot
