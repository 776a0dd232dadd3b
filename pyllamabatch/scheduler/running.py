"""The running sequences: their counters, in arrays by slot, and how a policy sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..kv import Slots
from ..kv.radix_tree import Tokens
from .queue import Column, SequenceList, SequenceQueue
from .view import SequenceView

I64 = npt.NDArray[np.int64]

# What `Running` knows of each without a view of it.
IN_ARRAYS = frozenset(("itl_target", "generated", "turn", "n_prompt", "computed", "max_tokens"))


class KnownTokens(Protocol):
    """What a sequence's tokens are read from."""

    def known(self) -> Tokens:
        """All tokens that the sequence knows now: int32, its prompt and what was sampled."""


@dataclass(slots=True)
class Entry:
    """One sequence. While it runs its counters are those of `Running` at `slot`. `tokens`: None
    where it shares nothing."""

    view: SequenceView
    tenant: int
    tokens: KnownTokens | None = None
    slot: int = -1
    high: int = 0  # tokens that were computed at least once
    true: bool = True  # `view` says how it is now


class Running(SequenceQueue[Entry]):
    """In the order of admission. The arrays (int64, shape (n_seq_max,)) are 0 where nobody runs.

    `computed` and `known` tokens; `counts` is both of them, shape (2, n_seq_max); `most`: what
    `known` is at the very end. `decoding`: id -> 1 for those that decode, as a policy sees it.
    """

    def __init__(self, n_seq_max: int) -> None:
        super().__init__(self.seen)
        self._numbers = np.zeros((6, n_seq_max), dtype=np.int64)
        self.computed, self.known, self._n_prompt, self.most, self._start, self._tenant = (
            self._numbers
        )
        self.counts = self._numbers[:2]
        self._itl_target = np.full(n_seq_max, np.inf)
        self._decoding: dict[int, int] = {}
        self.decoding: Mapping[int, int] = MappingProxyType(self._decoding)
        self._decodes_in = np.zeros(n_seq_max, dtype=bool)
        self._decode_slots: Slots | None = None
        self._slot_of: dict[int, int] = {}
        # Of all, in the order of admission and ascending; made again when it has changed.
        self._slots: npt.NDArray[np.intp] | None = None
        self._ascending: npt.NDArray[np.intp] | None = None

    def join(self, id: int, entry: Entry, *, first: bool = False) -> None:
        """`entry.slot` is its own from now on."""
        super().join(id, entry, first=first)
        view, slot = entry.view, entry.slot
        entry.true = False
        known = view.known
        most = view.n_prompt + view.max_tokens
        self._numbers[:, slot] = 0, known, view.n_prompt, most, known, entry.tenant + 1
        self._itl_target[slot] = np.inf if view.itl_target is None else view.itl_target
        self._slot_of[id] = slot
        self._slots = self._ascending = None

    def leave(self, id: int) -> Entry | None:
        entry = super().leave(id)
        if entry is not None:
            self._numbers[:, entry.slot] = 0
            del self._slot_of[id]
            self._slots = self._ascending = None
        return entry

    def seen(self, entry: Entry) -> SequenceView:
        """How it is now; made anew only when it has changed."""
        view = entry.view
        if entry.true:
            return view
        slot = entry.slot
        computed, known = self.counts[:, slot].tolist()
        generated = known - view.n_prompt
        if view.computed != computed or view.generated != generated or not view.running:
            turn = known - int(self._start[slot])
            view = moved(view, computed, generated, True, view.preemptions, view.queued, turn)
            entry.view = view
        entry.true = view.id not in self.decoding  # a decode moves without a word
        return view

    def set(self, entry: Entry, view: SequenceView) -> None:
        """A running sequence is `view` from now on, whose `turn` is what it was."""
        entry.view, entry.true = view, False
        slot, known = entry.slot, view.known
        self.computed[slot], self.known[slot] = view.computed, known
        self._n_prompt[slot], self._start[slot] = view.n_prompt, known - view.turn

    def decodes(self, id: int, slot: int) -> None:
        """It decodes from now on."""
        self._decoding[id] = 1
        self._decodes_in[slot] = True
        self._decode_slots = None

    def decodes_no_more(self, id: int, slot: int) -> bool:
        """Whether it did."""
        if self._decoding.pop(id, None) is None:
            return False
        self._decodes_in[slot] = False
        self._decode_slots = None
        return True

    @property
    def decode_slots(self) -> Slots:
        """Of those that decode: ascending, read-only."""
        if self._decode_slots is None:
            self._decode_slots = self._decodes_in.nonzero()[0].astype(np.int32)
            self._decode_slots.flags.writeable = False
        return self._decode_slots

    def decode_slots_but(self, out: list[int]) -> Slots:
        """`decode_slots` without these."""
        left = self._decodes_in.copy()
        left[out] = False
        slots: Slots = left.nonzero()[0].astype(np.int32)
        return slots

    def remaining(self, entry: Entry) -> int:
        """`seen(entry).remaining`, and no view is made."""
        goal = entry.view.goal
        last = self.known[entry.slot] if goal is None else goal
        return max(0, int(last - self.computed[entry.slot]))

    def turn(self, slot: int) -> int:
        """Tokens that the sequence in `slot` has generated since its admission."""
        return int(self.known[slot] - self._start[slot])

    def turns(self) -> tuple[I64, I64]:
        """By slot: the tenant's number + 1, 0 where nobody runs, and tokens generated since the
        admission."""
        return self._tenant, self.known - self._start

    @property
    def slots(self) -> npt.NDArray[np.intp]:
        """Of each in turn."""
        if self._slots is None:
            self._slots = np.fromiter(self._slot_of.values(), np.intp, len(self._slot_of))
        return self._slots

    def column(self, name: str) -> Column:
        if name not in IN_ARRAYS:
            return super().column(name)
        return self._column(name, self.slots)

    def unordered(self, name: str) -> Column:
        if name not in IN_ARRAYS:
            entries = sorted(self.ids.values(), key=_slot)
            return SequenceList(map(self.seen, entries)).column(name)
        if self._ascending is None:
            (self._ascending,) = self._tenant.nonzero()
        return self._column(name, self._ascending)

    def _column(self, name: str, slots: npt.NDArray[np.intp]) -> Column:
        if name == "itl_target":
            return self._itl_target[slots]
        known = self.known[slots]
        if name == "generated":
            return known - self._n_prompt[slots]
        if name == "turn":
            return known - self._start[slots]
        if name == "n_prompt":
            return self._n_prompt[slots]
        if name == "computed":
            return self.computed[slots]
        return self.most[slots] - self._n_prompt[slots]  # max_tokens


def _slot(entry: Entry) -> int:
    return entry.slot


def moved(
    view: SequenceView,
    computed: int,
    generated: int,
    running: bool,
    preemptions: int,
    queued: int,
    turn: int,
) -> SequenceView:
    """As `dataclasses.replace`, which takes several times as long."""
    return SequenceView(
        view.id,
        view.arrival,
        view.n_prompt,
        computed,
        generated,
        view.max_tokens,
        running,
        view.priority,
        view.tenant,
        view.deadline,
        view.prefix_hit,
        preemptions,
        view.goal,
        view.itl_target,
        queued,
        turn,
    )
