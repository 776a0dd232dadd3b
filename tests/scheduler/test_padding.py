"""Rows that no sequence reads: as long as they cost less than another graph."""

from dataclasses import replace

import numpy as np
import pytest

from pyllamabatch.cost.step_cost import NewGraph, StepCost
from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import Limits
from pyllamabatch.scheduler.padding import Padding
from tests.support.made_up_costs import Linear
from tests.support.scheduler_machine import Machine

STREAMS = Limits(64, 64, 8, 8 * 256, 256, unified=False)
POOL = Limits(64, 64, 8, 2048, 2048)
TRIM = Sharing(copy_whole=True, trim=True)


def rows(graph: float) -> Linear:
    return Linear(row_s=1e-3, new_graph=NewGraph(graph), unified=False)


def widths(padding: Padding, cost: StepCost | None, *decoding: list[int]) -> list[int]:
    """When these slots decode, step by step."""
    found = []
    for slots in decoding:
        decode = np.array(slots, np.int32)
        width = padding.width(decode, np.ones(8, np.int64), cost)
        if width:
            padding.computed(1)
        found.append(width)
    return found


def padding(*, possible: bool = True) -> Padding:
    return Padding(STREAMS, possible=possible)


ALL, SIX, LAST = [*range(8)], [*range(6)], [7]


def test_a_width_stays_until_its_rows_have_cost_two_graphs() -> None:
    # 2 ms wasted a step, two graphs of 5 ms
    found = widths(padding(), rows(5e-3), ALL, *[SIX] * 7, ALL)
    assert found == [8, 8, 8, 8, 8, 8, 6, 6, 8]


def test_one_that_is_left_in_a_high_slot_is_alone_before_long() -> None:
    found = widths(padding(), rows(5e-3), ALL, *[LAST] * 4, [3], [2, 7], [2, 7])
    assert found == [8, 8, 0, 0, 0, 0, 8, 0]
    assert widths(padding(), rows(1e-3), LAST, [6, 7], ALL) == [0, 0, 8]


def test_where_a_row_costs_more_than_graphs_nothing_is_padded() -> None:
    assert widths(padding(), rows(0.4e-3), ALL, SIX, [0, 2], [0, 1]) == [8, 6, 0, 0]


@pytest.mark.parametrize(
    ("one", "cost"),
    [
        (padding(possible=False), rows(1.0)),
        (padding(), rows(0.0)),
        (padding(), None),
        (Padding(replace(STREAMS, n_ubatch=4), possible=True), rows(1.0)),
    ],
)
def test_where_it_is_not_known_or_not_possible_there_is_none(
    one: Padding, cost: StepCost | None
) -> None:
    assert widths(one, cost, ALL, SIX) == [0, 0]


def test_what_a_graph_costs_is_learned() -> None:
    one, cost = padding(), rows(0.0)
    one.observe_graph(5e-3)
    assert widths(one, cost, ALL, SIX) == [8, 8]
    for _ in range(20):
        one.observe_graph(0.0)
    assert widths(one, cost, ALL, SIX) == [8, 6]


def test_only_steps_in_which_all_decode_are_padded() -> None:
    for limits, sharing, padded in (
        (STREAMS, TRIM, True),
        (STREAMS, Sharing(copy_whole=True), False),
        (POOL, TRIM, False),
    ):
        machine = Machine(limits, cost=rows(5e-3), sharing=sharing)
        for id in range(3):
            machine.add(id, 10, 5 + 20 * (id != 2))
        pads = {step.n_pad for step in machine.steps()}
        assert pads == ({3, 2} if padded else {0})


@pytest.mark.parametrize(("gone", "n_pad", "stands"), [(2, 1, True), (1, 2, False)])
def test_a_lone_sequence_needs_a_plan_for_each_token_only_where_rows_are_wasted(
    gone: int, n_pad: int, stands: bool
) -> None:
    machine = Machine(STREAMS, cost=rows(5e-3), sharing=TRIM)
    for id in (1, 2):
        machine.add_interactive(id, 10)
    machine.run()
    machine.remove(gone)
    machine.scheduler.interactive.ask(3 - gone)
    step = machine.scheduler.plan(0.0)
    assert step is not None
    assert (step.n_pad, step.stands > 1) == (n_pad, stands)
