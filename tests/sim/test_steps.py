"""An engine's trace beside the cost model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyllamabatch.device.cost import NewGraph
from pyllamabatch.sim.validate import Validator, own_cells, steps_of
from pyllamabatch.trace import trace_dtype


def test_cells_of_those_that_have_rows() -> None:
    """A prompt of two chunks in slot 1, one that decodes in slot 0; then another one in slot 1."""
    steps = [
        ({0: 7}, {0: 30}),
        ({1: 8}, {1: 20}),
        ({0: 7}, {}),
        ({1: 8}, {1: 5}),
        ({0: 7, 1: 8}, {}),
        ({1: 9}, {1: 40}),
        ({0: 7, 1: 9}, {}),
    ]
    table = np.zeros(len(steps), dtype=trace_dtype(4))
    for row, (ids, chunks) in zip(table, steps, strict=True):
        for slot, id in ids.items():
            row["ids"][slot] = id
        for slot, n in chunks.items():
            row["chunk"][slot] = n
    assert own_cells(table).tolist() == [0, 0, 30, 20, 31 + 25, 0, 32 + 40]


class Costs:
    """A millisecond a row, half of one more for a new graph, and one in the two steps behind it."""

    unified = True
    new_graph = NewGraph(0.0005, 0.001)

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        return 0.001 * rows


def traced(factor: float) -> Any:
    """A prompt of 64 rows and two answers, four steps of two rows and then of one, on a device that
    takes `factor` times what the model says beside the graphs."""
    table = np.zeros(9, dtype=trace_dtype(2))
    table["rows"] = [64, 2, 2, 2, 2, 1, 1, 1, 1]
    table["prefill_rows"] = [64, *[0] * 8]
    table["decode_rows"] = table["rows"] - table["prefill_rows"]
    table["kv_used"] = 100
    table["chunk"][0] = 64
    table["ids"][:, 0] = 7
    table["reused"] = [0, 0, 1, 1, 1, 0, 1, 1, 1]
    seconds = factor * 0.001 * table["rows"]
    seconds[[0, 1, 5]] += 0.0005
    seconds[[2, 3, 6, 7]] += 0.0005
    table["decode_ns"] = np.round(1e9 * seconds)
    return table


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.7])
def test_what_graphs_cost_is_no_part_of_a_device_s_speed(factor: float) -> None:
    table, cost = traced(factor), Costs()
    steps = steps_of(table, cost, 512)  # type: ignore[arg-type]
    assert steps.new.tolist() == [1, 1, 0, 0, 0, 1, 0, 0, 0]
    assert steps.behind.tolist() == [False, False, True, True, False, False, True, True, False]
    probed: Any = SimpleNamespace(_cost=cost, engine=SimpleNamespace(n_ubatch=512))
    assert Validator._ratios(probed, table) == pytest.approx((factor, factor))
    short = table[:3]  # nothing has settled: what there is, then
    decode, _ = Validator._ratios(probed, short)
    assert decode == pytest.approx(factor + 0.25)


def test_rows_that_fill_gaps_are_computed_too() -> None:
    table = traced(1.0)
    table["filled"][4] = 3
    model = steps_of(table, Costs(), 512).model  # type: ignore[arg-type]
    assert model[[3, 4]].tolist() == pytest.approx([0.002, 0.005])
