"""PrefixCache: which sequence starts from which cells, which prefixes stay cached, and which goes
when cells or slots are short. Decisions only: what is to be done in the memory comes out as KV
operations, which the engine carries out and the simulator skips.

Every slot that holds something is known by its tokens: a running one by those that its sequence
started with, a cached one (its sequence has ended, or was preempted) by all that it holds."""

from collections.abc import Callable, Collection, Hashable, Iterator

from .accounting import KvAccounting
from .radix_tree import RadixTree, Tokens, n_common
from .sharing import MIN_PREFIX, NO_HIT, Hit, Key, KvOperation, Sharing, key_of

# Share of a prefix that is taken to be asked for again, as long as nothing is known; a copy of a
# stream is paid for at once.
REUSED, REUSED_COPIES = 1 / 2, 1 / 16
LEARNED = 1 / 16  # the share of a new observation


def _free(n: int) -> float:
    return 0.0


class PrefixCache:
    """Owns the slots of `accounting`. `retain`: whether what a sequence leaves behind is cached; if
    not, running sequences of one space still start from each other. `copy_share(n)`: what a copy of
    a stream takes, as a share of computing `n` positions.

    To be cached has a price, as a share of computing the same tokens again. In a pool every step
    looks over the cached cells, too (`charge`). In streams the sequences that run are neighbours,
    so that they share ubatches, and what is cached is copied to the `n_cached` slots behind them.
    The price is paid as long as it is below what caching is likely to save: the share of a prefix
    that a sequence has started from, or the one that is asked for again of all of them.
    Where cells or slots of a pool are short, what has least left to pay goes, and all others pay as
    much.

    A *space* divides sequences that must not share: other adapters, other tenants. `changed`: keys
    of sequences whose hit may have become another one, until `Admission`
    clears it. `kv_operations`: what is to be done in the memory, in this order, before the next
    step; `Scheduler` takes them."""

    def __init__(
        self,
        accounting: KvAccounting,
        sharing: Sharing,
        *,
        retain: bool = True,
        copy_share: Callable[[int], float] = _free,
    ) -> None:
        self.sharing = sharing
        self.retain = retain and sharing.any
        self.kv_operations: list[KvOperation] = []
        self._copying: set[int] = set()  # slots of copies that were taken and wait for a step
        self.changed: set[Key] = set()
        self._accounting = accounting
        n_slots = accounting.n_seq_max
        self._apart = sharing.n_cached > 0 and not accounting.unified
        self._n_running = n_slots - sharing.n_cached if self._apart else n_slots
        self._copy_share = copy_share
        self._reused = REUSED_COPIES if self._apart else REUSED
        self._free = list(range(self._n_running))  # empty slots
        self.next_slots: list[int] = []  # where the next ones start, if they are empty
        self._behind = list(range(self._n_running, n_slots))  # the same of those for copies
        self._trees: dict[Hashable, RadixTree] = {}
        self._known: dict[int, tuple[Key, Tokens]] = {}  # by slot
        self._paid = 0.0  # by one that has been cached from the start on
        self._cached: dict[int, float] = {}  # by slot: what `_paid` will be when it has paid enough
        self._lost: list[tuple[Key, Tokens]] = []  # the last unproven ones
        self._n_lost = sharing.n_cached or n_slots  # of these, which may be asked for again
        self._proven: dict[int, float] = {}  # by cached slot: the share that one has started from
        self._stops: dict[int, set[int]] = {}  # by running slot: where a checkpoint is wanted

    @property
    def n_cached(self) -> int:
        return len(self._cached)

    # -- looking for a start

    def find(self, tokens: Tokens, space: Hashable) -> Hit:
        """The longest usable prefix of `tokens`; the last token is left to compute."""
        best, best_cached = NO_HIT, False
        limit = len(tokens) - 1
        for slot, n in self._matches(tokens, space):
            n = self.sharing.whole(min(n, limit))
            if n < max(best.n, MIN_PREFIX):
                break
            n, cached = self.sharing.whole(self._usable(slot, n)), slot in self._cached
            # in a stream of its own what is cached needs no copy
            if n > best.n or (
                n == best.n and cached and not best_cached and not self._accounting.unified
            ):
                best, best_cached = Hit(slot, n), cached
        if best.n < MIN_PREFIX:
            return NO_HIT
        return Hit(best.slot, best.n, self._cells(best))

    def pending(self, tokens: Tokens, space: Hashable, n_sure: int) -> Hit:
        """A prefix worth waiting for, if `n_sure` tokens can be had at once: a running slot is
        computing it and is not there yet."""
        sharing, limit = self.sharing, len(tokens) - 1
        if not sharing.copy_part and not sharing.copy_whole:
            return NO_HIT
        for slot, n in self._matches(tokens, space):
            n = sharing.whole(min(n, limit))
            if n < n_sure + MIN_PREFIX:
                break
            if slot in self._cached or self._accounting.held(slot) >= n:
                continue
            if sharing.at_checkpoints:
                self._stops.setdefault(slot, set()).add(n)
            elif not sharing.copy_part and not sharing.trim:
                continue
            return Hit(slot, n)
        return NO_HIT

    def _matches(self, tokens: Tokens, space: Hashable) -> Iterator[tuple[int, int]]:
        tree = self._trees.get(space)
        return iter(()) if tree is None else tree.matches(tokens)

    def _usable(self, slot: int, n: int) -> int:
        """How much of the `n` tokens in common with `slot` a sequence can start from."""
        sharing, cached = self.sharing, slot in self._cached
        held = self._accounting.held(slot)
        n = min(n, held)
        copies = sharing.copy_whole or sharing.copy_part
        if n == held:
            return n if cached or copies else 0
        if sharing.window and held > sharing.window and not sharing.tries:
            return 0
        return n if sharing.copy_part or (sharing.trim and (cached or copies)) else 0

    def _cells(self, hit: Hit) -> int:
        takes_over = hit.slot in self._cached and not self._copies(hit)
        if self._accounting.unified or takes_over:
            return self._accounting.unused(hit.slot, hit.n)
        return hit.n

    def _copies(self, hit: Hit) -> bool:
        """Whether a start from `hit` leaves its slot as it is."""
        sharing = self.sharing
        if hit.slot not in self._cached:
            return True
        whole = hit.n == self._accounting.held(hit.slot)
        return sharing.n_cached > 0 and (
            sharing.copy_part or (sharing.copy_whole and (whole or sharing.trim))
        )

    # -- sequences come and go

    def start(self, id: int, hit: Hit = NO_HIT) -> int:
        """A slot for sequence `id`, which holds the first `hit.n` tokens."""
        source, n, accounting = hit.slot, hit.n, self._accounting
        copies = n > 0 and self._copies(hit)
        slot = self._take_slot(besides=(source,)) if copies or n == 0 else None
        if n == 0:
            if slot is None:
                raise ValueError("every slot is running")
            return slot
        if slot is None:  # the cached slot itself goes on
            self._forget(source)
            accounting.resume(source)
            if n < accounting.held(source):
                accounting.trim(source, n)
                self.kv_operations.append(KvOperation("trim", source, n=n, id=id))
            return source
        held = accounting.held(source)
        whole = n == held or not self.sharing.copy_part
        if source in self._cached:
            before, share = self._proven.get(source, 0.0), n / held
            if before <= self._reused:
                self._asked_again(share)
            self._proven[source] = max(before, share)
            self._use(source)
        self.kv_operations.append(
            KvOperation("copy", slot, source, held if whole else n, whole, id)
        )
        accounting.share(source, slot, held if whole else n)
        if whole and n < held:
            accounting.trim(slot, n)
            self.kv_operations.append(KvOperation("trim", slot, n=n, id=id))
        return slot

    def start_saved(self) -> int | None:
        """An empty slot that a saved state can be loaded into. None: not before the next step, with
        which copies are made that would read or write what is loaded."""
        waits = self._copying.union(*map(self._copies_in, self.kv_operations))
        return self._take_slot(besides=waits)

    def lives(self, slot: int, tokens: Tokens, space: Hashable, start: int) -> None:
        """A sequence that begins with `tokens` runs in `slot`, from position `start` on; or it
        goes on with other tokens than it was said to."""
        if not self.sharing.any:
            return
        self._forget(slot)
        tokens = tokens[: self.sharing.of_known(len(tokens))]
        if self.sharing.at_checkpoints:  # where it parts from others, the next one may part as well
            n = min(next(self._matches(tokens, space), (0, 0))[1], len(tokens) - 1)
            if n >= start + MIN_PREFIX:
                self._stops.setdefault(slot, set()).add(n)
        self._learn(slot, tokens, space)
        self._misses(tokens, space, start)

    def leaves(self, slot: int, tokens: Tokens | None, *, comes_back: bool = False) -> None:
        """The sequence in `slot` does not run any more. `tokens`: all that it knew, None when what
        it holds is worth nothing. `comes_back`: it or another one is going to start there."""
        known = self._known.get(slot)
        held = self._accounting.held(slot)
        n = 0 if tokens is None or known is None or not self.retain else len(tokens)
        n = self.sharing.whole(min(held, self.sharing.of_known(n)))
        self._forget(slot)
        if n < MIN_PREFIX or (n < held and not self.sharing.trim):
            self._empty(slot)
            return
        assert tokens is not None
        assert known is not None
        tokens, space = tokens[:n], known[0][0]
        if self._covered(tokens, space):
            self._empty(slot)
            return
        proven = 1.0 if comes_back else 0.0
        proven = max(proven, self._drop_covered(tokens, space))
        place = self._out_of_the_way(slot, n, comes_back=comes_back)
        if place is None:
            self._lose(known[0], tokens)
            self._empty(slot)
            return
        if n < self._accounting.held(place):
            self._accounting.trim(place, n)
            self.kv_operations.append(KvOperation("trim", place, n=n))
        if proven:
            self._proven[place] = proven
        self._hold(place, tokens, space)

    def move(self, id: int, slot: int) -> int | None:
        """Sequence `id`, which runs in `slot`, goes on in the lowest empty one: where. None when
        there is none, or none below, unless `slot` is one of `next_slots`, which stay empty."""
        empty = [free for free in self._free if free not in self.next_slots]
        if not empty or (min(empty) > slot and slot not in self.next_slots):
            return None
        target, held = min(empty), self._accounting.held(slot)
        self._free.remove(target)
        known, stops = self._known.get(slot), self._stops.get(slot)
        if held:
            self._accounting.share(slot, target, held)
            self.kv_operations.append(KvOperation("copy", target, slot, held, True, id))
        self._forget(slot)
        if known is not None:
            self._learn(target, known[1], known[0][0])
        if stops is not None:
            self._stops[target] = stops
        self._empty(slot)
        return target

    def _out_of_the_way(self, slot: int, n: int, *, comes_back: bool) -> int | None:
        """Where `n` positions of a slot that runs no more stay cached: in a pool where they are; in
        streams in a slot behind those that run, to which they are copied. None: nowhere."""
        if not self._apart:
            return slot
        if self._copy_share(n) > (1 if comes_back else self._reused):
            return None
        place = self._take_slot(to_cache=True)
        if place is None:
            return None
        held = self._accounting.held(slot)
        self._accounting.share(slot, place, held)
        self.kv_operations.append(KvOperation("copy", place, slot, held, whole=True))
        self._empty(slot)
        return place

    def _hold(self, slot: int, tokens: Tokens, space: Hashable) -> None:
        self._accounting.cache(slot)
        self._learn(slot, tokens, space)
        self._use(slot)

    def _use(self, slot: int) -> None:
        """What a cached slot has paid is worth it."""
        self._cached.pop(slot, None)  # of two that are equal the older one goes first
        self._cached[slot] = self._paid + max(self._reused, self._proven.get(slot, 0.0))

    def _learn(self, slot: int, tokens: Tokens, space: Hashable) -> None:
        tree = self._trees.get(space)
        if tree is None:
            tree = self._trees[space] = RadixTree()
        tree.insert(slot, tokens)
        key = key_of(tokens, space)
        self._known[slot] = key, tokens
        self.changed.add(key)

    def _forget(self, slot: int) -> None:
        """What `slot` holds is not to be found any more."""
        self._cached.pop(slot, None)
        self._proven.pop(slot, None)
        self._stops.pop(slot, None)
        if slot in self._known:
            key, _ = self._known.pop(slot)
            self.changed.add(key)
            tree = self._trees[key[0]]
            tree.remove(slot)
            if not len(tree):
                del self._trees[key[0]]

    def _covered(self, tokens: Tokens, space: Hashable) -> bool:
        """Another cached slot can do all that one of `tokens` could."""
        for slot, n in self._matches(tokens, space):
            if n < len(tokens):
                return False
            if slot in self._cached and self._usable(slot, n) == n:
                self._use(slot)
                return True
        return False

    def _drop_covered(self, tokens: Tokens, space: Hashable) -> float:
        """Cached slots that can't do more than one of `tokens` will, where any part of it is good.
        The share of `tokens` that a sequence has started from there."""
        proven = 0.0
        if not self.sharing.copy_part or self.sharing.window:
            return proven
        for slot, n in list(self._matches(tokens, space)):
            if slot in self._cached and n == self._accounting.held(slot):
                proven = max(proven, self._proven.get(slot, 0.0) * n / len(tokens))
                self.drop(slot)
        return proven

    # -- checkpoints

    def cut(self, slot: int, start: int, n: int) -> int:
        """How many of `n` rows from `start` on may be computed before a checkpoint is due."""
        stops = self._stops.get(slot, ())
        return min((stop - start for stop in stops if start < stop < start + n), default=n)

    def make_checkpoints(self) -> None:
        """Keep copies of the states that were asked for and are there now. Called before each
        step."""
        for slot, stops in list(self._stops.items()):
            n = self._accounting.held(slot)
            if n in stops:
                target = self._take_slot(to_cache=True)
                if target is not None:
                    (space, _), tokens = self._known[slot]
                    self._accounting.share(slot, target, n)
                    self.kv_operations.append(KvOperation("copy", target, slot, n, whole=True))
                    self._hold(target, tokens[:n], space)
            left = {stop for stop in stops if stop > n}
            if left:
                self._stops[slot] = left
            else:
                del self._stops[slot]

    # -- making room

    def make_cells(self, n: int) -> None:
        """Drop what is cached until `n` cells are empty. The accounting has them: see
        `KvAccounting.free`."""
        accounting = self._accounting
        if not accounting.unified:
            return
        while accounting.empty < n:
            slot = next(s for s in self._by_worth() if accounting.unused(s, accounting.held(s)))
            missing, alone = n - accounting.empty, accounting.alone(slot)
            # not cell by cell: every cut costs a look at all cells
            cut = max(missing, MIN_PREFIX, alone // 4)
            left = accounting.held(slot) - cut
            if self.sharing.trim and not self.sharing.window and cut < alone and left >= MIN_PREFIX:
                accounting.trim(slot, left)
                self.kv_operations.append(KvOperation("trim", slot, n=left))
                self.changed.add(self._known[slot][0])
            else:
                self._evict(slot)

    def charge(self, price: float) -> None:
        """What is cached in a pool pays `price`: by this share of computing a cell again a cell has
        made steps longer. What has paid enough goes."""
        self._paid += price
        for slot in [slot for slot, most in self._cached.items() if most <= self._paid]:
            self._evict(slot)

    def _by_worth(self) -> list[int]:
        """Cached slots. In a pool those with least left to pay come first; in streams, which have
        paid, those that no sequence has started from, the least recently used first."""
        unified = self._accounting.unified
        key = self._cached.__getitem__ if unified else self._proven.__contains__
        return sorted(self._cached, key=key)

    def _evict(self, slot: int) -> None:
        """All others have paid as much as this one had to."""
        self._paid = max(self._paid, self._cached[slot])
        if self._proven.get(slot, 0.0) <= self._reused:
            self._lose(*self._known[slot])
        self.drop(slot)

    # -- whether prefixes are asked for again

    def _asked_again(self, share: float) -> bool:
        """A sequence asks for this share of an unproven prefix. Whether that is worth as much as
        one is taken to be: if not, as with what all prompts begin with, it proves nothing."""
        worth = share > self._reused
        if worth:
            self._reused += LEARNED * (share - self._reused)
        return worth

    def _misses(self, tokens: Tokens, space: Hashable, start: int) -> None:
        """A sequence of `tokens` has the first `start` of them. What is gone might have had more:
        the share counts that of it which is gone."""
        key, most, best = key_of(tokens, space), 0.0, -1
        for i, (other, lost) in enumerate(self._lost):
            if other == key and (n := n_common(lost, tokens)) > start:
                share = (n - start) / (len(lost) - start)
                if share > most:
                    most, best = share, i
        if self._asked_again(most):
            del self._lost[best]

    def _lose(self, key: Key, tokens: Tokens) -> None:
        """A prefix is not cached, and what a sequence has started from it proves nothing yet."""
        self._lost.append((key, tokens))
        if len(self._lost) > self._n_lost:
            del self._lost[0]
            self._reused -= LEARNED * self._reused

    def drop(self, slot: int) -> None:
        """Empty a cached slot; fine when it is not cached."""
        if slot in self._cached:
            self._forget(slot)
            self._empty(slot)

    def drop_all(self) -> bool:
        """Empty all cached slots; whether there was any."""
        slots = list(self._cached)
        for slot in slots:
            self.drop(slot)
        return bool(slots)

    def take_kv_operations(self) -> tuple[KvOperation, ...]:
        """Those that were decided since the last call."""
        operations, self.kv_operations = self.kv_operations, []
        self._copying.update(*map(self._copies_in, operations))
        return tuple(operations)

    def computed(self) -> None:
        """A step was, and with it the copies that were taken are made."""
        self._copying.clear()

    def _copies_in(self, operation: KvOperation) -> tuple[int, ...]:
        """From where and to where it copies with the next step."""
        waits = not (self._accounting.unified or self.sharing.at_once)
        return (operation.source, operation.slot) if waits and operation.kind == "copy" else ()

    def _empty(self, slot: int) -> None:
        self._accounting.release(slot)
        self.kv_operations.append(KvOperation("remove", slot))
        (self._free if slot < self._n_running else self._behind).append(slot)

    def _take_slot(self, besides: Collection[int] = (), *, to_cache: bool = False) -> int | None:
        """An empty slot, or a cached one, emptied, but none of `besides`; None when there is none.
        `to_cache`: one for a copy."""
        slots = self._behind if to_cache and self._apart else self._free
        empty = [slot for slot in slots if slot not in besides]
        if not empty:
            behind, first = slots is self._behind, self._n_running
            found = [s for s in self._by_worth() if s not in besides and (s >= first) == behind]
            if not found:
                return None
            self._evict(found[0])
            empty = found[:1]
        slot = next((slot for slot in self.next_slots if slot in empty), min(empty))
        slots.remove(slot)
        return slot
