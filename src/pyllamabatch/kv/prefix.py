"""PrefixCache: which sequence starts from whose cells, which beginnings are kept, and which of
them goes when cells or slots are short. Decisions only: what is to be done in the memory comes out
as moves, which the engine carries out and the simulator skips.

Every slot that holds something is known by its tokens: the live ones by those that they began
with, the kept ones (their sequence has ended, or was preempted) by all that they hold.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from .ledger import KvLedger
from .tree import PrefixTree, Tokens

# Shorter beginnings are computed again: that costs less than a step's wait for them.
MIN_HIT = 16


@dataclass(frozen=True, slots=True)
class Sharing:
    """What sequences of one context can take over from each other.

    - copy_part: any beginning of a sequence can be copied to an empty slot.
    - copy_whole: all of a sequence can.
    - trim: the end of a sequence can be cut off.
    - window: a sequence longer than this is only good as a whole (older cells of a sliding window
      are given to others); 0: no such limit.
    - n_kept: slots beyond those that may run at once, for what is kept.
    """

    copy_part: bool = False
    copy_whole: bool = False
    trim: bool = False
    window: int = 0
    n_kept: int = 0

    @property
    def any(self) -> bool:
        """Whether there is any way to use what another sequence has computed."""
        return self.copy_part or self.copy_whole or self.trim

    @property
    def at_checkpoints(self) -> bool:
        """Only whole states can be taken over, so they have to be kept at the right positions."""
        return self.copy_whole and not self.trim and not self.copy_part and self.n_kept > 0


@dataclass(frozen=True, slots=True)
class Move:
    """A change of the memory. remove: all of `slot`. trim: all of `slot` but its first `n`
    positions. copy: the first `n` positions of `source` (all that it holds, if `whole`) to the
    empty `slot`. save: the state of `slot` to the host, for sequence `id`. load: the saved state of
    `id` to the empty `slot`. `id`: the sequence that starts from this, 0 when none does."""

    kind: Literal["remove", "trim", "copy", "save", "load"]
    slot: int
    source: int = -1
    n: int = 0
    whole: bool = False
    id: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """The first `n` tokens of a sequence are in `slot`. `cells`: those of them that count as free
    until they are used."""

    slot: int = -1
    n: int = 0
    cells: int = 0


NO_HIT = Hit()


class PrefixCache:
    """`ledger`: of the same slots. `keep`: whether what a sequence leaves behind is kept; if not,
    live sequences of one space still start from each other.

    A *space* divides sequences that must not share: other adapters, other tenants. `version` moves
    whenever a hit may have become another one."""

    def __init__(self, ledger: KvLedger, sharing: Sharing, *, keep: bool = True) -> None:
        self.sharing = sharing
        self.version = 0
        self.moves: list[Move] = []
        self._ledger = ledger
        self._keep = keep and sharing.any
        self._trees: dict[Hashable, PrefixTree] = {}
        self._space: dict[int, Hashable] = {}  # by slot
        self._kept: OrderedDict[int, None] = OrderedDict()  # slots, the least recently used first
        self._stops: dict[int, set[int]] = {}  # by live slot: where a checkpoint is wanted

    @property
    def n_kept(self) -> int:
        return len(self._kept)

    # -- looking for a start

    def find(self, tokens: Tokens, space: Hashable) -> Hit:
        """The longest usable beginning of `tokens`; the last token is left to compute."""
        best, best_kept = NO_HIT, False
        limit = len(tokens) - 1
        tree = self._trees.get(space)
        for slot, n in tree.matches(tokens) if tree is not None else ():
            n = min(n, limit)
            if n < max(best.n, MIN_HIT):
                break
            n, kept = self._usable(slot, n), self._ledger.is_kept(slot)
            # in a stream of its own what is kept needs no copy
            if n > best.n or (n == best.n and kept and not best_kept and not self._ledger.unified):
                best, best_kept = Hit(slot, n), kept
        if best.n < MIN_HIT:
            return NO_HIT
        return Hit(best.slot, best.n, self._cells(best))

    def pending(self, tokens: Tokens, space: Hashable, hit: Hit) -> Hit:
        """A beginning worth waiting for: a live slot is computing it and is not there yet."""
        if not self.sharing.copy_part and not self.sharing.copy_whole:
            return NO_HIT
        limit = len(tokens) - 1
        tree = self._trees.get(space)
        for slot, n in tree.matches(tokens) if tree is not None else ():
            n = min(n, limit)
            if n < hit.n + MIN_HIT:
                break
            if self._ledger.is_kept(slot) or self._ledger.held(slot) >= n:
                continue
            if self.sharing.copy_part or self.sharing.trim:
                return Hit(slot, n)
            if self.sharing.at_checkpoints:
                self._stops[slot].add(n)
                return Hit(slot, n)
        return NO_HIT

    def _usable(self, slot: int, n: int) -> int:
        """How much of the `n` tokens in common with `slot` a sequence can start from."""
        sharing, kept = self.sharing, self._ledger.is_kept(slot)
        held = self._ledger.held(slot)
        n = min(n, held)
        copies = sharing.copy_whole or sharing.copy_part
        if n == held:
            return n if kept or copies else 0
        if sharing.window and held > sharing.window:
            return 0
        return n if sharing.copy_part or (sharing.trim and (kept or copies)) else 0

    def _cells(self, hit: Hit) -> int:
        takes_over = self._ledger.is_kept(hit.slot) and not self._copies(hit)
        if self._ledger.unified or takes_over:
            return self._ledger.not_live(hit.slot, hit.n)
        return hit.n

    def _copies(self, hit: Hit) -> bool:
        """Whether a start from `hit` leaves its slot as it is."""
        if not self._ledger.is_kept(hit.slot):
            return True
        whole = hit.n == self._ledger.held(hit.slot)
        return self.sharing.n_kept > 0 and (
            self.sharing.copy_part or (whole and self.sharing.copy_whole)
        )

    # -- sequences come and go

    def start(self, id: int, slot: int | None, hit: Hit) -> int:
        """Sequence `id` starts from `hit` in the empty `slot` (None: there is none, and what is
        kept has to make way). Returns its slot."""
        if hit is NO_HIT:
            return self.free_slot() if slot is None else slot
        self.version += 1
        source, n, ledger = hit.slot, hit.n, self._ledger
        copies = self._copies(hit)
        if slot is None and copies:
            slot = self._make_slot(besides=source)
        if slot is None or not copies:  # the kept slot itself goes on
            self._forget(source)
            ledger.revive(source)
            if n < ledger.held(source):
                ledger.trim(source, n)
                self.moves.append(Move("trim", source, n=n, id=id))
            return source
        held = ledger.held(source)
        whole = n == held or not self.sharing.copy_part
        if source in self._kept:
            self._kept.move_to_end(source)
        self.moves.append(Move("copy", slot, source, held if whole else n, whole, id))
        ledger.share(source, slot, held if whole else n)
        if whole and n < held:
            ledger.trim(slot, n)
            self.moves.append(Move("trim", slot, n=n, id=id))
        return slot

    def lives(self, slot: int, tokens: Tokens, space: Hashable, start: int) -> None:
        """A sequence that begins with `tokens` runs in `slot` now, from position `start` on."""
        if not self.sharing.any:
            return
        self.version += 1
        stops = self._stops[slot] = set()
        tree = self._trees.setdefault(space, PrefixTree())
        if self.sharing.at_checkpoints:  # where it parts from others, the next one may part as well
            n = min(next(tree.matches(tokens), (0, 0))[1], len(tokens) - 1)
            if n >= start + MIN_HIT:
                stops.add(n)
        tree.insert(slot, tokens)
        self._space[slot] = space

    def leaves(self, slot: int, tokens: Tokens | None) -> bool:
        """The sequence in `slot` does not run any more. `tokens`: all that it knew, None when what
        it holds is worth nothing. True when the slot is kept, False when it is empty now."""
        space = self._space.get(slot)
        self._forget(slot)
        ledger = self._ledger
        held = ledger.held(slot)
        if tokens is not None and self._keep and min(held, len(tokens)) >= MIN_HIT:
            n = min(held, len(tokens))
            if (n == held or self.sharing.trim) and not self._covered(tokens[:n], space):
                if n < held:
                    ledger.trim(slot, n)
                    self.moves.append(Move("trim", slot, n=n))
                self._drop_covered(tokens[:n], space)
                self._hold(slot, tokens[:n], space)
                return True
        self._remove(slot)
        return False

    def _hold(self, slot: int, tokens: Tokens, space: Hashable) -> None:
        self._ledger.keep(slot)
        self._trees.setdefault(space, PrefixTree()).insert(slot, tokens)
        self._space[slot] = space
        self._kept[slot] = None
        self.version += 1

    def _covered(self, tokens: Tokens, space: Hashable) -> bool:
        """Another kept slot can do all that one of `tokens` could."""
        tree = self._trees.get(space)
        for slot, n in tree.matches(tokens) if tree is not None else ():
            if n < len(tokens):
                return False
            if slot in self._kept and self._usable(slot, n) == n:
                self._kept.move_to_end(slot)
                return True
        return False

    def _drop_covered(self, tokens: Tokens, space: Hashable) -> None:
        """Kept slots that can't do more than one of `tokens` will, where any part of it is good."""
        if not self.sharing.copy_part or self.sharing.window:
            return
        tree = self._trees.get(space)
        found = list(tree.matches(tokens)) if tree is not None else []
        for slot, n in found:
            if slot in self._kept and n == self._ledger.held(slot):
                self.drop(slot)

    # -- checkpoints

    def cut(self, slot: int, start: int, n: int) -> int:
        """How many of `n` rows from `start` on may be computed before a checkpoint is due."""
        stops = self._stops.get(slot, ())
        return min((stop - start for stop in stops if start < stop < start + n), default=n)

    def wants_checkpoint(self, slot: int) -> bool:
        """Whether `slot` is where a checkpoint was asked for; it is crossed off."""
        stops = self._stops.get(slot)
        if not stops or self._ledger.held(slot) not in stops:
            return False
        stops.discard(self._ledger.held(slot))
        return True

    def checkpoint(self, slot: int, target: int, tokens: Tokens) -> None:
        """Keep a copy of what the live `slot` holds, the beginning of `tokens`, in `target`."""
        n = self._ledger.held(slot)
        self._ledger.share(slot, target, n)
        self.moves.append(Move("copy", target, slot, n, whole=True))
        self._hold(target, tokens[:n], self._space[slot])

    # -- making room

    def make_cells(self, n: int) -> None:
        """Drop what is kept, the least recently used first, until `n` cells are empty. The ledger
        has them: see `KvLedger.free`."""
        ledger = self._ledger
        if not ledger.unified:
            return
        while ledger.empty < n:
            slot = next(s for s in self._kept if ledger.not_live(s, ledger.held(s)))
            missing, alone = n - ledger.empty, ledger.alone(slot)
            # not cell by cell: every cut costs a look at all cells
            cut = max(missing, MIN_HIT, alone // 4)
            left = ledger.held(slot) - cut
            if self.sharing.trim and not self.sharing.window and cut < alone and left >= MIN_HIT:
                ledger.trim(slot, left)
                self.moves.append(Move("trim", slot, n=left))
                self.version += 1
            else:
                self.drop(slot)

    def free_slot(self) -> int:
        """The least recently used kept slot, emptied."""
        slot = self._make_slot()
        if slot is None:
            raise ValueError("every slot is live")
        return slot

    def _make_slot(self, besides: int = -1) -> int | None:
        slot = next((slot for slot in self._kept if slot != besides), None)
        if slot is not None:
            self.drop(slot)
        return slot

    def drop(self, slot: int) -> None:
        """Empty a kept slot."""
        self._forget(slot)
        self._remove(slot)

    def drop_all(self) -> list[int]:
        """Empty all kept slots; these are they."""
        slots = list(self._kept)
        for slot in slots:
            self.drop(slot)
        return slots

    def _remove(self, slot: int) -> None:
        self.version += 1
        self._ledger.release(slot)
        self.moves.append(Move("remove", slot))

    def _forget(self, slot: int) -> None:
        """What `slot` holds is not to be found any more."""
        self._kept.pop(slot, None)
        self._stops.pop(slot, None)
        if slot in self._space:
            self.version += 1
            space = self._space.pop(slot)
            tree = self._trees[space]
            tree.remove(slot)
            if not len(tree):
                del self._trees[space]
