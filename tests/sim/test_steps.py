"""An engine's trace beside the cost model."""

import numpy as np

from pyllamabatch.sim.validate import own_cells
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
