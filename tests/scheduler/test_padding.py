"""Rows that no sequence reads: as long as they cost less than another graph."""

from __future__ import annotations

import numpy as np
import pytest

from pyllamabatch.cost.step_cost import NewGraph, StepCost
from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import KvOptions, Limits, Scheduler
from pyllamabatch.scheduler.padding import Padding
from tests.support.scheduler_machine import Machine

STREAMS = Limits(64, 64, 8, 8 * 256, 256, unified=False)
TRIM = Sharing(copy_whole=True, trim=True)


class Rows(StepCost):
    """1 ms a row, and so much for a graph."""

    unified = False

    def __init__(self, graph: float) -> None:
        self.new_graph = NewGraph(graph)

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        return 1e-3 * rows


def widths(padding: Padding, cost: StepCost | None, highest: list[int], n: int = 1) -> list[int]:
    """When the last of those that decode is in each of these slots, for n steps."""
    found = []
    for slot in highest:
        decode = np.array([0, slot] if slot else [0], np.int32)
        width = padding.width(decode, cost)
        if width:
            padding.computed(decode, width, n, cost)
        found.append(width)
    return found


def test_a_width_stays_until_its_rows_have_cost_a_graph() -> None:
    padding = Padding(possible=True)
    # 8 slots, then 6 are needed: 2 ms wasted a step, until two graphs of 5 ms are cheaper
    found = widths(padding, Rows(5e-3), [7, 5, 5, 5, 5, 5, 5, 5, 7, 3])
    assert found == [8, 8, 8, 8, 8, 8, 6, 6, 8, 8]


def test_where_a_row_costs_more_than_a_graph_nothing_is_padded() -> None:
    assert widths(Padding(possible=True), Rows(0.5e-3), [7, 5, 6, 0]) == [8, 6, 7, 1]


@pytest.mark.parametrize(
    ("padding", "cost"),
    [
        (Padding(possible=False), Rows(1.0)),
        (Padding(possible=True), Rows(0.0)),
        (Padding(possible=True), None),
    ],
)
def test_where_it_is_not_known_or_not_possible_there_is_none(
    padding: Padding, cost: StepCost | None
) -> None:
    assert widths(padding, cost, [7, 3]) == [0, 0]


def test_what_a_graph_costs_is_learned() -> None:
    padding, cost = Padding(possible=True), Rows(0.0)
    padding.observe_graph(5e-3)
    assert widths(padding, cost, [7, 5]) == [8, 8]
    for _ in range(20):
        padding.observe_graph(0.0)
    assert widths(padding, cost, [7, 5]) == [8, 6]


def test_only_steps_in_which_all_decode_are_padded() -> None:
    for limits, sharing, padded in (
        (STREAMS, TRIM, True),
        (STREAMS, Sharing(copy_whole=True), False),
        (Limits(64, 64, 8, 2048, 2048), TRIM, False),
    ):
        machine = Machine(limits, cost=Rows(5e-3), sharing=sharing)
        for id in range(3):
            machine.add(id, 10, 5 + 20 * (id != 2))
        pads = {step.n_pad for step in machine.steps()}
        assert pads == ({3, 2} if padded else {0})


def test_a_pool_of_cells_has_none() -> None:
    scheduler = Scheduler(STREAMS, kv=KvOptions(TRIM), cost=Rows(5e-3))
    assert scheduler.padding.width(np.array([3], np.int32), scheduler.cost) == 4
