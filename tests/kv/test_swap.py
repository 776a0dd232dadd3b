"""Swap or recompute: the estimate; and where the states lie."""

from pathlib import Path

import pytest

from pyllamabatch.kv.swap import SwapChoice, SwapSpace


def test_nothing_is_swapped_before_anything_was_measured() -> None:
    choice = SwapChoice(bytes_per_token=1.0)
    assert not choice.swaps(1000)
    choice.computed(100, 1.0)
    assert choice.swaps(1000)
    assert not choice.swaps(0)


def test_the_cheaper_way_is_taken() -> None:
    choice = SwapChoice(bytes_per_token=1000.0)
    choice.copy_rate = 1e6  # 2 ms a token, out and in
    choice.computed(1000, 1.0)  # 1 ms a token
    assert not choice.swaps(50)
    choice.prefill_rate = 400.0
    assert choice.swaps(50)


def test_a_copy_of_a_stream_is_a_share_of_computing_it() -> None:
    choice = SwapChoice(stream_seconds=0.01)
    assert choice.copy_share(50) == 0.0  # nothing is known yet
    choice.computed(1000, 1.0)
    assert choice.copy_share(50) == pytest.approx(0.2)
    assert choice.copy_share(100) == pytest.approx(0.1)


def test_it_is_forced() -> None:
    assert SwapChoice("swap").swaps(1)
    assert not SwapChoice("swap").swaps(0)
    choice = SwapChoice("recompute")
    choice.computed(1, 1e9)
    assert not choice.swaps(10**6)
    with pytest.raises(ValueError, match="auto, recompute or swap"):
        SwapChoice("sometimes")  # type: ignore[arg-type]


def test_rates_follow_what_is_measured() -> None:
    choice = SwapChoice()
    for _ in range(100):
        choice.copied(10**6, 0.01, 100)
        choice.computed(50, 0.1)
    assert choice.copy_rate == pytest.approx(1e8, rel=0.01)
    assert choice.prefill_rate == pytest.approx(500)
    assert choice.bytes_per_token == 10**4


def test_states_go_to_files_above_the_limit(tmp_path: Path) -> None:
    space = SwapSpace(10, tmp_path)
    space.put(1, b"12345678")
    space.put(2, b"abcdef")
    space.put(3, b"xy")
    assert (space.used, len(space), len(list(tmp_path.iterdir()))) == (10, 3, 1)
    assert space.take(2) == b"abcdef"
    assert list(tmp_path.iterdir()) == []
    assert space.take(1) == b"12345678"
    assert (space.used, 1 in space, 3 in space) == (2, False, True)
    with pytest.raises(KeyError):
        space.take(1)
    space.put(3, b"a longer one")
    space.drop(3)
    space.drop(3)
    space.put(4, b"longer than ten")
    space.clear()
    assert (space.used, len(space), list(tmp_path.iterdir())) == (0, 0, [])


def test_less_memory_moves_the_oldest_states_to_files(tmp_path: Path) -> None:
    space = SwapSpace(10, tmp_path)
    space.put(1, b"1234")
    space.put(2, b"abc")
    space.resize(5)
    assert (space.used, len(list(tmp_path.iterdir()))) == (3, 1)
    space.put(3, b"xyz")
    assert (space.used, len(list(tmp_path.iterdir()))) == (3, 2)
    space.resize(10)
    space.put(4, b"in ram")
    assert (space.used, len(list(tmp_path.iterdir()))) == (9, 2)
    assert [space.take(id) for id in (1, 2, 3, 4)] == [b"1234", b"abc", b"xyz", b"in ram"]


def test_a_state_that_no_file_takes_stays_in_memory(tmp_path: Path) -> None:
    space = SwapSpace(10, tmp_path / "missing")
    space.put(1, b"1234")
    with pytest.raises(OSError, match="missing"):
        space.resize(0)
    assert (space.used, space.take(1)) == (4, b"1234")


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    space = SwapSpace(0, tmp_path / "missing")
    with pytest.raises(OSError, match="missing"):
        space.put(1, b"x")
    assert 1 not in space


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    space = SwapSpace(0, tmp_path)
    space.put(1, b"x")
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(OSError, match="No such file"):
        space.take(1)
    assert 1 not in space
