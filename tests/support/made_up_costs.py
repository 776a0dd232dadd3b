"""Steps of a made-up device, whose seconds are a straight line."""

from dataclasses import dataclass

from pyllamabatch.cost.step_cost import NO_COST, NewGraph, StepCost


@dataclass
class Linear(StepCost):
    """A step takes `step_s` for each `tile` rows, and more for each of its rows and cells."""

    step_s: float = 0.0
    row_s: float = 0.0
    cell_s: float = 0.0
    tile: int = 2**31
    absolute: bool = True
    new_graph: NewGraph = NO_COST
    unified: bool = True

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return self.step_s * -(-rows // self.tile) + self.row_s * rows + self.cell_s * kv
