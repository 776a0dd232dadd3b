"""The native calls of a step: where every sequence has a stream of cells of its own, and where
groups can't share one."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pyllamabatch.scheduler import PromptChunk, Step
from pyllamabatch.scheduler.step import spans
from pyllamabatch.scheduler.view import Prices

FILLED = PromptChunk(104, 4, 0, 15, fill=5)


def step(decode: list[int], chunks: dict[int, int]) -> Step:
    rows = tuple(PromptChunk(100 + slot, slot, 0, n) for slot, n in chunks.items())
    n_rows = len(decode) + sum(chunks.values())
    return Step(np.array(decode, np.int32), rows, ((1, 2),), ((3, 4),), n_rows, {7: "why"})


def shape(whole: Step) -> list[tuple[list[int], dict[int, int]]]:
    return [(p.decode.tolist(), {c.slot: c.n for c in p.chunks}) for p in whole.parts()]


def test_pure_steps_are_one_call() -> None:
    assert shape(step([0, 1, 5], {})) == [([0, 1, 5], {})]
    assert shape(step([], {3: 1})) == [([], {3: 1})]
    assert shape(step([], {4: 50})) == [([], {4: 50})]


def test_prompts_go_apart_from_those_that_decode() -> None:
    """Before them: the last token of one of the prompts may be among their rows."""
    assert shape(step([0, 1], {2: 20})) == [([], {2: 20}), ([0, 1], {})]
    assert shape(step([0, 2, 5], {5: 1, 4: 1})) == [([], {4: 1, 5: 1}), ([0, 2, 5], {})]


def test_last_tokens_go_along_with_their_prompts_but_where_that_costs_a_graph() -> None:
    assert shape(step([2], {2: 20})) == [([2], {2: 20})]
    assert shape(step([2, 3], {2: 20, 3: 20})) == [([2, 3], {2: 20, 3: 20})]
    assert shape(step([2], {2: 20, 3: 20})) == [([], {2: 20, 3: 20}), ([2], {})]
    assert shape(step([2, 4], {2: 20, 4: 20})) == [([2], {2: 20}), ([4], {4: 20})]
    assert shape(step([1, 2], {2: 20})) == [([2], {2: 20}), ([1], {})]
    padded = replace(step([1, 2], {2: 20}), n_pad=4)
    assert shape(padded) == [([], {2: 20}), ([1, 2], {})]
    assert [part.n_pad for part in padded.parts()] == [0, 4]
    assert [part.n_pad for part in replace(step([2], {2: 20}), n_pad=4).parts()] == [0]


def test_a_last_token_stays_between_others_that_decode() -> None:
    """Without it they would be two ubatches."""
    assert shape(step([1, 2, 3], {2: 20})) == [([], {2: 20}), ([1, 2, 3], {})]
    assert shape(step([1, 2, 3, 4], {3: 20, 4: 9})) == [([3], {3: 20}), ([4], {4: 9}), ([1, 2], {})]


def test_only_the_rows_that_decode_are_padded() -> None:
    parts = replace(step([0, 3], {3: 20}), n_pad=8).parts()
    assert [part.n_pad for part in parts] == [0, 8]
    assert parts[1].shape(50.0) == (8, 0, 50.0, 8)


def test_prompts_go_together_where_libllama_can_compute_them_together() -> None:
    assert shape(step([], {4: 20, 3: 20, 2: 20})) == [([], {2: 20, 3: 20, 4: 20})]
    assert shape(step([], {2: 20, 3: 21})) == [([], {2: 20}), ([], {3: 21})]
    assert shape(step([0], {2: 20, 4: 20})) == [([], {2: 20}), ([], {4: 20}), ([0], {})]


def test_prompts_behind_the_rows_that_decode_share_a_call_with_them() -> None:
    whole = replace(step([0, 1], {3: 20, 2: 20, 5: 9}), n_pad=4, behind=True)
    assert shape(whole) == [([0, 1], {2: 20, 3: 20}), ([], {5: 9})]
    assert [part.n_pad for part in whole.parts()] == [4, 0]
    assert shape(replace(step([], {2: 20, 5: 9}), behind=True)) == [([], {2: 20}), ([], {5: 9})]
    assert shape(replace(step([0, 1], {}), behind=True)) == [([0, 1], {})]


@given(
    st.lists(st.integers(0, 9), unique=True).map(sorted),
    st.dictionaries(st.integers(10, 19), st.integers(1, 3), min_size=1),
    st.booleans(),
)
def test_every_row_is_in_one_part_and_in_order(
    decode: list[int], chunks: dict[int, int], behind: bool
) -> None:
    whole = replace(step(decode, chunks), behind=behind)
    parts = whole.parts()
    assert [s for p in parts for s in p.decode.tolist()] == decode
    assert {c.slot: c for p in parts for c in p.chunks} == {c.slot: c for c in whole.chunks}
    assert sum(len(p.chunks) for p in parts) == len(chunks)
    for i, part in enumerate(parts):
        assert part.n_rows == len(part.decode) + sum(c.n for c in part.chunks) > 0
        assert (part.preempted, part.admitted) == (
            (whole.preempted, whole.admitted) if i == 0 else ((), ())
        )
        slots = [c.slot for c in part.chunks]
        assert slots == sorted(slots)
        lengths = {c.n for c in part.chunks}
        assert len(lengths) <= 1
        if lengths:
            assert part.decode.tolist() in ([], decode if behind else slots)
            assert slots == list(range(slots[0], slots[0] + len(slots)))


def test_a_prompts_last_row_costs_what_a_decode_does() -> None:
    rows = np.array([0, 1, 7], np.int32)
    prompts = (PromptChunk(110, 7, 0, 16), PromptChunk(111, 8, 4, 1))
    assert Step(rows, (), (), (), 3, {}).shape(50.0) == (3, 0, 50.0, 3)
    assert Step(rows, prompts, (), (), 20, {}).shape(50.0) == (20, 17, 50.0, 5)


def test_groups_get_a_call_each_and_the_first_one_comes_first() -> None:
    whole = replace(step([0, 1, 2, 5], {3: 20, 4: 1}), repeat=1)
    parts = whole.by_group(lambda slot: "ab"[slot % 2], "b")
    assert [(p.decode.tolist(), [c.slot for c in p.chunks]) for p in parts] == [
        ([1, 5], [3]),
        ([0, 2], [4]),
    ]
    assert [p.n_rows for p in parts] == [22, 3]
    assert (parts[0].preempted, parts[0].admitted) == (whole.preempted, whole.admitted)
    assert (parts[1].preempted, parts[1].admitted) == ((), ())
    assert whole.by_group(lambda slot: 7, 7) == (whole,)
    assert whole.by_group(lambda slot: 7, 8) == (whole,)


def test_a_group_has_the_drafts_of_its_own_slots() -> None:
    prices = Prices(np.ones(9), np.ones(9), 1.0)
    whole = replace(step([0, 1, 2, 5], {}), drafts={0: 4, 1: 3, 2: 2}, prices=prices)
    parts = whole.by_group(lambda slot: slot % 3, 0)
    assert [p.decode.tolist() for p in parts] == [[0], [1], [2, 5]]
    assert [p.drafts for p in parts] == [{0: 4}, {1: 3}, {2: 2}]
    parts = whole.by_group(lambda slot: slot // 3, 0)
    assert [p.drafts for p in parts] == [{0: 4, 1: 3, 2: 2}, {}]
    assert [p.prices for p in parts] == [prices, None]  # as a step that has none


def test_a_group_has_no_rows_that_make_a_prompt_as_long_as_one_of_another() -> None:
    whole = step([], {3: 20, 4: 15})
    filled = replace(whole, chunks=(whole.chunks[0]._replace(apart=True), FILLED))
    assert [part.n_fill for part in filled.by_group(lambda slot: slot % 2, 0)] == [0, 0]
    (one,) = filled.by_group(lambda slot: 0, 0)
    assert one.n_fill == FILLED.fill


def test_groups_take_turns() -> None:
    whole = replace(step([0, 1], {}), repeat=100)
    (alone,) = whole.by_group(lambda slot: "a", "a")
    assert alone.repeat == 100
    assert [p.repeat for p in whole.by_group(lambda slot: slot, 1)] == [8, 8]
    assert [p.decode.tolist() for p in whole.by_group(lambda slot: slot, 1)] == [[1], [0]]


@given(st.sets(st.integers(0, 30), min_size=1), st.sets(st.integers(0, 30)), st.integers(0, 4))
def test_a_span_ends_where_a_gap_cannot_be_filled(
    decode: set[int], others: set[int], gap_max: int
) -> None:
    held = np.zeros(31, np.int64)
    held[[*decode, *others]] = 1
    found = spans(np.array(sorted(decode), np.int32), held, gap_max)
    left, expected = sorted(decode), []
    while left:
        together = [left.pop(0)]
        while left:
            between = range(together[-1] + 1, left[0])
            if len(between) > gap_max or any(held[slot] for slot in between):
                break
            together.append(left.pop(0))
        expected.append((together[-1] - together[0] + 1, len(together)))
    assert [(span.rows, span.decode) for span in found] == expected
