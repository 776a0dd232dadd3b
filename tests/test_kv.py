"""KvLedger: cells are counted exactly, in one pool and in separate streams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllamabatch.kv import KvLedger


def test_one_pool_is_shared_by_all() -> None:
    ledger = KvLedger(10, 4)
    ledger.take(0, 6)
    ledger.take(1, 3)
    assert (ledger.used, ledger.free, ledger.room(0), ledger.room(2)) == (9, 1, 1, 1)
    with pytest.raises(ValueError, match="slot 2 asks for 2 cells, there is room for 1"):
        ledger.take(2, 2)
    assert ledger.release(0) == 6
    assert (ledger.free, ledger.held(0), ledger.held(1)) == (7, 0, 3)


def test_streams_do_not_lend_each_other_cells() -> None:
    ledger = KvLedger(12, 3, unified=False)
    assert ledger.n_cells_seq == 4
    ledger.take(0, 4)
    assert (ledger.room(0), ledger.room(1), ledger.free) == (0, 4, 8)
    with pytest.raises(ValueError, match="room for 0"):
        ledger.take(0, 1)


def test_one_each_checks_the_pool_before_it_changes_anything() -> None:
    ledger = KvLedger(5, 4)
    ledger.take(0, 3)
    with pytest.raises(ValueError, match="3 cells are asked for, 2 are free"):
        ledger.take_each(np.array([0, 1, 2], dtype=np.int32))
    assert ledger.used == 3
    ledger.take_each(np.array([0, 2], dtype=np.int32))
    assert [ledger.held(slot) for slot in range(4)] == [4, 0, 1, 0]


def test_several_steps_at_once() -> None:
    ledger = KvLedger(12, 4)
    slots = np.array([3, 1], dtype=np.int32)
    with pytest.raises(ValueError, match="14 cells are asked for, 12 are free"):
        ledger.take_each(slots, 7)
    ledger.take_each(slots, 5)
    assert [ledger.held(slot) for slot in range(4)] == [0, 5, 0, 5]
    assert (ledger.used, ledger.free) == (10, 2)


@pytest.mark.parametrize(("n_cells", "n_seq_max"), [(0, 1), (1, 0), (-1, 1)])
def test_a_ledger_of_nothing_is_refused(n_cells: int, n_seq_max: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        KvLedger(n_cells, n_seq_max)


@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 12), st.booleans()), max_size=60),
)
def test_it_balances_whatever_happens(
    unified: bool, operations: list[tuple[int, int, bool]]
) -> None:
    ledger = KvLedger(20, 4, unified=unified)
    held = [0, 0, 0, 0]
    for slot, n, release in operations:
        if release:
            assert ledger.release(slot) == held[slot]
            held[slot] = 0
        elif 0 <= n <= ledger.room(slot):
            ledger.take(slot, n)
            held[slot] += n
        else:
            with pytest.raises(ValueError, match="cells"):
                ledger.take(slot, n)
        assert [ledger.held(s) for s in range(4)] == held
        assert ledger.used == sum(held)
        assert ledger.free == 20 - sum(held) >= 0
        assert max(held) <= ledger.n_cells_seq
