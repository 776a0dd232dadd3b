"""Prompts of neighbours: which are filled up, and which sequences move away."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import KvOptions, Limits, PromptChunk, Scheduler, Step
from pyllamabatch.scheduler.neighbours import Neighbours
from tests.support.made_up_costs import Linear

LIMITS = Limits(256, 256, 8, n_cells=8 * 300, n_cells_seq=300, unified=False, fills=True)


def neighbours(limits: Limits = LIMITS, stream_seconds: float = 0.0) -> Neighbours:
    return Neighbours(limits, stream_seconds, moves=True)


def filled(chunks: dict[int, int], cost: Linear, start: int = 0) -> dict[int, int]:
    """Rows of the chunk in each slot, and how many fill it up."""
    given = [PromptChunk(100 + slot, slot, start, n) for slot, n in chunks.items()]
    found = neighbours().evened(given, cost)
    assert [chunk.slot for chunk in found] == sorted(chunks)
    assert {chunk.slot: chunk.n for chunk in found} == chunks
    return {chunk.slot: chunk.fill for chunk in found}


@pytest.mark.parametrize(
    ("chunks", "call_rows", "fill"),
    [
        ({2: 50, 3: 40}, 11, [0, 10]),  # a call costs as much as so many rows
        ({3: 40, 2: 50}, 9, [0, 0]),
        ({2: 50, 4: 40}, 99, [0, 0]),  # no neighbours
        ({1: 10, 2: 60, 3: 55}, 20, [0, 0, 5]),
        ({1: 60, 2: 55, 4: 30, 5: 31}, 20, [0, 5, 1, 0]),
        ({1: 100, 2: 95, 3: 80}, 99, [0, 5, 0]),  # a call has 248 rows beside those that decode
        ({**dict.fromkeys(range(8), 9), 8: 8}, 99, [0] * 9),  # eight at a time
    ],
)
def test_a_chunk_is_filled_up_where_that_costs_less_than_a_call(
    chunks: dict[int, int], call_rows: float, fill: list[int]
) -> None:
    assert [*filled(chunks, Linear(call_rows, 1.0)).values()] == fill


def calls(chunks: dict[int, int], cost: Linear, limits: Limits = LIMITS) -> list[dict[int, int]]:
    """Rows by slot of each call of a step with these chunks, beside as many sequences as there can
    be that decode."""
    given = [PromptChunk(100 + slot, slot, 0, n) for slot, n in chunks.items()]
    evened = neighbours(limits).evened(given, cost)
    n_left = limits.n_batch - sum(chunks.values())
    decode = np.arange(20, 20 + min(limits.n_seq_max - len(chunks), n_left), dtype=np.int32)
    n_rows = len(decode) + sum(chunks.values())
    parts = Step(decode, evened, (), (), n_rows, {}, behind=True).parts()
    for part in parts:
        assert part.n_rows + part.n_fill <= limits.n_batch
    return [{chunk.slot: chunk.n + chunk.fill for chunk in part.chunks} for part in parts]


def test_groups_that_are_as_long_are_a_call_each() -> None:
    """Together they would have more rows than a call may."""
    dear = Linear(99.0, 1.0)
    assert calls({1: 100, 2: 20, 3: 100, 4: 20}, dear) == [{1: 100, 2: 100}, {3: 100, 4: 100}]
    assert calls({1: 50, 2: 50, 3: 50, 4: 50, 5: 50}, dear) == [dict.fromkeys(range(1, 6), 50)]


@given(
    st.dictionaries(st.integers(0, 7), st.sampled_from([5, 20, 21, 60, 100]), min_size=2),
    st.integers(0, 150),
    st.integers(9, 260),
    st.integers(4, 260),
)
def test_no_call_has_more_rows_than_it_may(
    chunks: dict[int, int], call_rows: int, n_batch: int, n_ubatch: int
) -> None:
    limits = replace(LIMITS, n_batch=n_batch, n_ubatch=n_ubatch)
    while sum(chunks.values()) > n_batch:
        del chunks[max(chunks)]
    if chunks:
        found = calls(chunks, Linear(call_rows, 1.0), limits)
        assert sorted(slot for call in found for slot in call) == sorted(chunks)


def test_a_stream_has_no_room_for_more_rows_than_cells() -> None:
    assert filled({1: 50, 2: 20}, Linear(99.0, 1.0), 250) == {1: 0, 2: 30}
    assert filled({1: 50, 2: 20}, Linear(99.0, 1.0), 251) == {1: 0, 2: 0}


def window(occupied: list[int], sizes: list[int], stream_seconds: float = 0.0) -> list[int] | None:
    by_slot = np.array([slot in occupied for slot in range(8)])
    return neighbours(stream_seconds=stream_seconds).window(sizes, by_slot, Linear(20.0, 1.0))


def test_newcomers_get_slots_in_a_row() -> None:
    assert window([0, 2, 4, 5, 6, 7], [50, 50]) == [0, 1]  # the one in slot 0 moves to slot 3
    assert window([0, 2, 3, 6, 7], [50, 50]) == [4, 5]  # none has to move
    assert window([0, 2, 3, 7], [50, 20, 40]) == [6, 4, 5]  # similar ones are neighbours
    assert window([0, 2, 4, 5, 6, 7], [50]) is None
    assert window([0, 2, 4, 5, 6, 7], [50, 10]) is None  # 40 rows more for a call less
    assert window([0, 2, 4, 5, 6, 7], [50, 50], stream_seconds=19.0) == [0, 1]
    assert window([0, 2, 4, 5, 6, 7], [50, 50], stream_seconds=20.0) is None
    assert window([0, 2], [50] * 5) == [1, 2, 3, 4, 5]  # no higher than need be
    assert window([], [50, 20]) is None  # nothing runs
    assert window([], [50, 20, 45]) == [2, 0, 1]


def test_not_where_prompts_are_computed_apart() -> None:
    pool = Limits(256, 256, 8, n_cells=2400, n_cells_seq=2400)
    apart = Limits(256, 256, 8, 2400, 300, unified=False, behind=False)
    for limits in (pool, apart):
        assert not Scheduler(limits, kv=KvOptions(Sharing(trim=True))).limits.fills
        assert not neighbours(limits).moves
    for sharing, fills in (
        (Sharing(trim=True), True),
        (Sharing(), False),
        (Sharing(trim=True, window=64), False),
        (Sharing(trim=True, window=64, tries=True), True),
    ):
        assert Scheduler(LIMITS, kv=KvOptions(sharing)).limits.fills is fills
