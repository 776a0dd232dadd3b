"""KvAccounting: cells are counted exactly, in a pool and in streams, shared and cached."""

from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyllamabatch.kv import KvAccounting


@pytest.mark.parametrize(("n_cells", "n_seq_max"), [(0, 1), (1, 0), (-1, 1)])
def test_a_ledger_of_nothing_is_refused(n_cells: int, n_seq_max: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        KvAccounting(n_cells, n_seq_max)


class Cells:
    """The model: every cell an object, every slot a list of them."""

    def __init__(self, n_cells: int, n_slots: int) -> None:
        self.n_cells = n_cells
        self.slots: list[list[object]] = [[] for _ in range(n_slots)]
        self.cached = [False] * n_slots

    def held(self, slot: int) -> int:
        return len(self.slots[slot])

    def grow(self, slot: int, n: int) -> None:
        self.slots[slot] += [object() for _ in range(n)]

    def all_of(self, slots: Iterable[int]) -> set[object]:
        return {cell for slot in slots for cell in self.slots[slot]}

    def check(self, kv: KvAccounting) -> None:
        every = range(len(self.slots))
        live = [slot for slot in every if not self.cached[slot]]
        used, of_live = self.all_of(every), self.all_of(live)
        assert (kv.used, kv.cached) == (len(used), len(used - of_live))
        assert (kv.free, kv.empty) == (self.n_cells - len(of_live), self.n_cells - len(used))
        for n in range(len(live)):
            others = self.all_of(live[n:])
            assert kv.frees(*live[:n]) == len(of_live - others)
        for slot in every:
            mine = set(self.slots[slot])
            assert kv.held(slot) == len(mine)
            assert kv.is_cached(slot) == self.cached[slot]
            assert kv.alone(slot) == len(mine - self.all_of(s for s in every if s != slot))
            if slot in live:
                others = self.all_of(s for s in live if s != slot)
                assert kv.frees(slot) == len(mine - others)
            for n in range(len(mine) + 1):
                assert kv.unused(slot, n) == len(set(self.slots[slot][:n]) - of_live)


OPERATIONS = ["take", "take each", "share", "share", "keep", "revive", "trim", "release"]


@settings(max_examples=400)
@example(True, [("take", 0, 0, 5), ("keep", 1, 0, 0), ("share", 0, 1, 3)])
@given(
    st.booleans(),
    st.lists(
        st.tuples(
            st.sampled_from(OPERATIONS), st.integers(0, 4), st.integers(0, 4), st.integers(-1, 12)
        ),
        max_size=50,
    ),
)
def test_it_balances_whatever_happens(
    unified: bool, operations: list[tuple[str, int, int, int]]
) -> None:
    """What can't be is refused, and changes nothing. Streams copy instead of sharing."""
    kv, cells = KvAccounting(40, 5, unified=unified), Cells(40, 5)
    for name, slot, other, n in operations:
        mine, cached = cells.slots[slot], cells.cached[slot]
        room = kv.empty if unified else 8 - len(mine)
        both = np.array([slot, other], np.int32)
        if name == "take each" and (  # who asks knows that these are running, and streams' rooms
            n < 0 or slot == other or any(cells.cached[s] for s in both)
            or not (unified or all(n <= 8 - cells.held(s) for s in both))
        ):  # fmt: skip
            continue
        may = {
            "take": not cached and 0 <= n <= room, "take each": 2 * n <= kv.empty,
            "share": 0 < n <= len(mine) and not cells.slots[other] and not cells.cached[other],
            "keep": not cached, "revive": cached, "trim": 0 <= n <= len(mine), "release": True,
        }  # fmt: skip
        before = kv.used
        with nullcontext() if may[name] else pytest.raises(ValueError, match=r"slot|asked for"):
            if name == "take":
                kv.take(slot, n)
                cells.grow(slot, n)
            elif name == "take each":
                kv.take_each(both, n)
                for each in (slot, other):
                    cells.grow(each, n)
            elif name == "share":
                kv.share(slot, other, n)
                if unified:
                    cells.slots[other] = mine[:n]
                else:
                    cells.grow(other, n)
            elif name == "keep":
                kv.cache(slot)
                cells.cached[slot] = True
            elif name == "revive":
                kv.resume(slot)
                cells.cached[slot] = False
            else:
                left = n if name == "trim" else 0
                emptied = kv.trim(slot, left) if name == "trim" else kv.release(slot)
                assert emptied == before - kv.used
                del mine[left:]
                cells.cached[slot] = cached and left > 0
        cells.check(kv)


class Pool:
    """What libllama does with a pool of cells (src/llama-kv-cache.cpp: `find_slot`, `seq_rm`): here
    a row each, and none shares."""

    def __init__(self, n_cells: int) -> None:
        self.owner = np.full(n_cells, -1)
        self.pos = np.zeros(n_cells, dtype=int)
        self.head = 0

    def take(self, slots: list[int]) -> None:
        """A row for each, in one ubatch."""
        at = self.head
        if at > (self.owner >= 0).sum() + 2 * len(slots):
            at = 0
        for slot in slots:
            while self.owner[at % len(self.owner)] >= 0:
                at += 1
            self.pos[at % len(self.owner)] = (self.owner == slot).sum()
            self.owner[at % len(self.owner)] = slot
            at += 1
        self.head = (at - 1) % len(self.owner) + 1

    def trim(self, slot: int, n: int) -> None:
        at = ((self.owner == slot) & (self.pos >= n)).nonzero()[0]
        self.owner[at] = -1
        self.head = min(self.head, int(at[0]))

    @property
    def reach(self) -> int:
        """`used_max_p1`"""
        held = (self.owner >= 0).nonzero()[0]
        return int(held[-1]) + 1 if len(held) else 0


@pytest.mark.parametrize("n_seqs", [2, 8, 32])
def test_reach_is_about_where_libllama_s_cells_end(n_seqs: int) -> None:
    """Prompts of 20 to 200 tokens, answers of 10 to 100, all slots in use, and some of them give
    half of what they hold back: the mean is within 2%, single steps are 6% off on average; those in
    use alone are a twelfth fewer, or more."""
    random = np.random.default_rng(n_seqs)
    kv, pool = KvAccounting(n_seqs * 300, n_seqs), Pool(n_seqs * 300)
    left = [0] * n_seqs
    found = []
    for _ in range(min(2000, 16_000 // n_seqs)):
        for slot in range(n_seqs):
            if left[slot] == 0:
                n_prompt, left[slot] = random.integers(20, 200), int(random.integers(10, 100))
                kv.take(slot, int(n_prompt))
                pool.take([slot] * n_prompt)
        kv.take_each(np.arange(n_seqs))
        pool.take([*range(n_seqs)])
        found.append((kv.used, kv.reach, pool.reach))
        for slot in range(n_seqs):
            left[slot] -= 1
            if left[slot] == 0:
                kv.release(slot)
                pool.trim(slot, 0)
            elif random.random() < 0.002:
                half = kv.held(slot) // 2
                kv.trim(slot, half)
                pool.trim(slot, half)
    used, reach, exact = np.mean(found[100:], axis=0)
    assert reach == pytest.approx(exact, rel=0.02)
    assert used < 0.93 * exact
    off = [abs(r / e - 1) for _, r, e in found[100:]]
    assert np.mean(off) < 0.06


def test_reach() -> None:
    kv = KvAccounting(100, 4)
    assert kv.reach == 0
    kv.take(0, 30)
    kv.take(1, 20)
    assert kv.reach == 50
    assert kv.release(0) == 30
    assert (kv.used, kv.reach) == (20, 50)
    kv.take(2, 10)  # into the hole
    assert (kv.used, kv.reach) == (30, 50)
    kv.release(1)
    assert 10 <= kv.reach < 50
    kv.take(3, 90)
    assert (kv.used, kv.reach) == (100, 100)
    for slot in (2, 3):
        kv.release(slot)
    assert kv.reach == 0


def test_who_shares_a_prefix_reaches_as_far_as_that() -> None:
    kv = KvAccounting(10000, 4)
    kv.take(0, 100)
    kv.take(1, 5000)
    kv.share(1, 2, 50)
    assert kv.reach == 5100
    kv.release(1)
    assert (kv.used, kv.reach) == (150, 150)
    kv.share(2, 3, 50)
    kv.release(2)
    assert (kv.used, kv.reach) == (150, 150)
    kv.take(0, 10)  # what only slot 1 had held is free, from 150 on
    assert kv.reach == 160


def test_a_shared_prefix_is_not_as_far_as_what_follows_it() -> None:
    """A system prompt in front of a burst; what has it reaches far, by its own cells alone."""
    for goes in (False, True):
        kv = KvAccounting(100000, 4)
        kv.take(0, 1000)
        kv.share(0, 1, 1000)
        kv.take(2, 19000)
        kv.take(1, 300)
        if goes:
            kv.trim(1, 1150)
            kv.release(2)
            assert (kv.used, kv.reach) == (1150, 10650)  # spread from 1,000 to 20,300
            kv.trim(1, 1000)
        else:
            kv.share(1, 3, 1000)
            kv.release(2)
            kv.release(1)
        assert (kv.used, kv.reach) == (1000, 1000)
        kv.share(0, 2, 400)  # a part of it
        kv.release(0)
        kv.release(3)
        kv.release(1)
        assert (kv.used, kv.reach) == (400, 400)


def test_what_is_trimmed_is_not_reached() -> None:
    kv = KvAccounting(10000, 4)
    kv.take(0, 5000)
    kv.cache(0)
    kv.trim(0, 100)
    kv.take(1, 10)
    assert (kv.used, kv.reach) == (110, 110)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=60))
def test_reach_is_never_less_than_what_is_used(moves: list[tuple[int, int]]) -> None:
    """And never more than there is."""
    kv = KvAccounting(100, 4)
    for slot, n in moves:
        if n % 3 and kv.room(slot) >= n:
            kv.take(slot, n)
        elif kv.held(slot):
            kv.trim(slot, 0 if n % 2 else kv.held(slot) // 2)
        assert kv.used <= kv.reach <= 100
        if kv.used == 0:
            assert kv.reach == 0
