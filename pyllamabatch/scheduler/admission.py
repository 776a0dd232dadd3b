"""Where sequences start: behind a prefix that is in the cache, from a saved state, or at 0."""

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import islice

from ..kv import Hit, KvAccounting, KvOperation, PrefixCache, Sharing, SwapChoice
from ..kv.radix_tree import Tokens
from ..kv.sharing import NO_HIT, Key, key_of
from .view import Prefix

LOOKS = 32  # so many waiting sequences at most are looked at again before one step


@dataclass(slots=True)
class StartPoint:
    """What a waiting sequence could start from now. `tokens`: those that it is to compute, None
    when it shares nothing. `pending`: a longer prefix that a running one is about to have
    computed. `saved`: positions in its own saved state."""

    tokens: Tokens | None
    saved: int
    key: Key = (None, b"")  # how the tokens begin
    hit: Hit = NO_HIT
    pending: Hit = NO_HIT

    @property
    def n(self) -> int:
        return max(self.hit.n, self.saved)

    @property
    def cells(self) -> int:
        """Cells that count as free and that it takes before it computes anything."""
        return self.saved if self.saved > self.hit.n else self.hit.cells

    @property
    def prefix(self) -> Prefix:
        """As a policy sees it, while the sequence waits."""
        return Prefix(self.n, self.cells, self.pending.n)

    @property
    def taken(self) -> Prefix:
        """The same, once it runs."""
        return Prefix(self.n)


class Admission:
    """`retain`: see `PrefixCache`. `swap`: what a preemption does."""

    def __init__(
        self,
        accounting: KvAccounting,
        sharing: Sharing,
        *,
        retain: bool = True,
        swap: SwapChoice | None = None,
    ) -> None:
        self.swap = swap or SwapChoice("recompute")
        self.accounting = accounting
        self._retain = retain
        self.cache = self._new_cache(sharing)
        self._spaces: dict[int, Hashable] = {}  # by id, of all sequences
        self._saved: dict[int, int] = {}  # positions in the saved state, by id
        self._waiting: dict[int, StartPoint] = {}
        self._alike: dict[Key, set[int]] = {}  # who waits, by how they begin
        self._dirty: dict[int, None] = {}  # ids to look at again, in this order
        self._pending: set[int] = set()

    def _new_cache(self, sharing: Sharing) -> PrefixCache:
        return PrefixCache(
            self.accounting, sharing, retain=self._retain, copy_share=self.swap.copy_share
        )

    def restart(self, sharing: Sharing) -> list[tuple[int, Prefix]]:
        """No sequence runs and no slot holds anything. What those that wait could start from."""
        self.cache = self._new_cache(sharing)
        for id, start in self._waiting.items():
            start.hit = start.pending = NO_HIT
            self._dirty[id] = None
        self._pending.clear()
        return [(id, start.prefix) for id, start in self._waiting.items()]

    # -- while they wait

    def add(self, id: int, space: Hashable, saved: int = 0) -> None:
        """A new sequence. Those of one `space` may start from each other; None is the space of all
        that name none, or of no other one when nothing is retained. `saved`: see `StartPoint`."""
        self._spaces[id] = ("alone", id) if space is None and not self.cache.retain else space
        if saved:
            self._saved[id] = saved
            self.cache.kv_operations.append(KvOperation("store", -1, n=saved, id=id))

    def isolate(self, id: int) -> None:
        """It shares nothing with others, from its next start on."""
        self._spaces[id] = ("alone", id)

    def forget(self, id: int) -> None:
        """A sequence that is in no slot and does not wait ends."""
        self.drop_saved(id)
        del self._spaces[id]

    def drop_saved(self, id: int) -> None:
        """Its saved state is of no use; fine when there is none."""
        if not self._saved.pop(id, 0):
            return
        self.cache.kv_operations.append(KvOperation("discard", -1, id=id))
        if id in self._waiting:
            self._dirty[id] = None

    def trim_saved(self, id: int, known: int) -> None:
        """Of a sequence that is in no slot only the first `known` tokens are left."""
        if self._saved.get(id, 0) >= known:
            self.drop_saved(id)

    def start_waiting(self, id: int, tokens: Tokens | None, n_wanted: int) -> Prefix:
        """It waits from now on, to compute its first `n_wanted` tokens, of which it may share
        `tokens`. What it need not compute."""
        if self._saved.get(id, 0) >= n_wanted:  # no row would be left to run with
            self.drop_saved(id)
        start = self._waiting[id] = StartPoint(tokens, self._saved.get(id, 0))
        if tokens is not None:
            start.key = key_of(tokens, self._spaces[id])
            self._alike.setdefault(start.key, set()).add(id)
            self._look(id, start)
        return start.prefix

    def stop_waiting(self, id: int) -> None:
        """It does not wait any more; fine when it did not."""
        start = self._waiting.pop(id, None)
        if start is None:
            return
        self._dirty.pop(id, None)
        if start.tokens is None:
            return
        self._pending.discard(id)
        alike = self._alike[start.key]
        alike.discard(id)
        if not alike:
            del self._alike[start.key]

    def refresh(self) -> list[tuple[int, Prefix]]:
        """Who of those that wait could start from something else now. At most `LOOKS` of them at a
        time: the others' turn comes at the next call."""
        changed = self.cache.changed
        if not (changed or self._pending or self._dirty):
            return []
        for key in changed:
            self._dirty.update(dict.fromkeys(self._alike.get(key, ())))
        changed.clear()
        for id in self._pending:
            pending = self._waiting[id].pending
            if self.accounting.held(pending.slot) >= pending.n:
                self._dirty[id] = None
        moved = []
        for id in list(islice(self._dirty, LOOKS)):
            del self._dirty[id]
            start = self._waiting[id]
            before = start.hit, start.pending, start.saved
            start.saved = self._saved.get(id, 0)
            self._look(id, start)
            if before != (start.hit, start.pending, start.saved):
                moved.append((id, start.prefix))
        return moved

    def _look(self, id: int, start: StartPoint) -> None:
        if start.tokens is None:
            return
        space = start.key[0]
        start.hit = self.cache.find(start.tokens, space)
        start.pending = self.cache.pending(start.tokens, space, start.n)
        if start.pending is NO_HIT:
            self._pending.discard(id)
        else:
            self._pending.add(id)

    # -- while they run

    def admit(
        self, id: int, spare: int, fresh: set[int], *, alone: bool
    ) -> tuple[int, StartPoint] | None:
        """A slot for a sequence that waits, and what it starts from there. `spare`: free cells that
        the rows of this step do not need. `fresh`: slots that were given in the same plan. `alone`:
        no other sequence has rows. None, and nothing has changed, when it had better wait for one
        of these, or for the step."""
        start, cache = self._waiting[id], self.cache
        start.saved = self._saved.get(id, 0)
        if start.tokens is None and not start.saved:
            self.stop_waiting(id)
            return cache.start(id), start
        self._look(id, start)
        if start.pending.slot in fresh:
            return None
        if start.cells > spare:
            start.hit, start.saved = NO_HIT, 0
        slot = None
        if start.saved > start.hit.n:
            slot = cache.start_saved()
            if slot is not None:
                start.hit = NO_HIT
            elif alone:
                start.saved = 0
            else:
                return None
        n = start.n
        if slot is not None:
            cache.make_cells(n)
            self.accounting.take(slot, n)
            cache.kv_operations.append(KvOperation("load", slot, n=n, id=id))
            del self._saved[id]
        else:
            slot = cache.start(id, start.hit)
            self.drop_saved(id)
        self.stop_waiting(id)
        if start.tokens is not None:
            cache.lives(slot, start.tokens, self._spaces[id], n)
        return slot, start

    def trim(self, id: int, slot: int, n: int, tokens: Tokens | None) -> None:
        """Only the first `n` positions of a running sequence are left. What comes next may differ
        from what it knew, also where none of that was computed yet, and may never come."""
        if n < self.accounting.held(slot):
            self.accounting.trim(slot, n)
            self.cache.kv_operations.append(KvOperation("cut", slot, n=n, id=id))
        if tokens is not None:
            self.cache.lives(slot, tokens[:n], self._spaces[id], n)

    def preempt(self, id: int, slot: int, tokens: Tokens | None) -> None:
        """The sequence in `slot` does not run for a while: what it holds is cached, or saved."""
        n = self.accounting.held(slot)
        if self.swap.swaps(n):
            self._saved[id] = n
            self.cache.kv_operations.append(KvOperation("save", slot, n=n, id=id))
            tokens = None
        self.cache.leaves(slot, tokens, comes_back=True)
