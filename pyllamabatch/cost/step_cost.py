"""StepCost: what the scheduler, its policies and the simulator ask about a device."""

from abc import abstractmethod
from typing import NamedTuple, Protocol

SETTLED = 3  # steps after a new graph until the device has prepared for it


class NewGraph(NamedTuple):
    """Seconds that a new graph costs. step: more for the step that makes it. settle: more in all
    for the next steps with the same graph, for which the device prepares."""

    step: float = 0.0
    settle: float = 0.0


NO_COST = NewGraph()


class StepCost(Protocol):
    """The seconds of a step. `CostModel` is one; one of your own inherits this class and defines
    `predict`.

    calibrated: from measurements, not a guess. error: median and 95th percentile of the relative
    error. edges: row counts behind which a step may cost a jump. new_graph: see `NewGraph`. switch:
    seconds more for a step whose decoding sequences are others than in the step before, though as
    many; None: not observed yet. unified: one pool of KV cells for all sequences. layout_measured:
    steps with this layout of the cells were, not those of the other one alone. computes_masked:
    attention computes free and masked cells, too."""

    calibrated: bool = True
    error: tuple[float, float] = (0.0, 0.0)
    edges: tuple[int, ...] = ()
    new_graph: NewGraph = NO_COST
    switch: float | None = 0.0
    unified: bool = True
    layout_measured: bool = True
    computes_masked: bool = False

    @property
    def absolute(self) -> bool:
        """Whether its seconds are measured, or corrected by at least one measured step."""
        return self.calibrated

    @abstractmethod
    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        """Seconds of a step of `rows` rows in `n_seqs` sequences, `prefill` of them prompt rows,
        when `kv` cells are held before it. The simulator takes it as linear in `kv`."""

    def deeper(self, prefill: int, own: float, depth: float) -> float:
        """Seconds that a step takes longer than `predict` says where the sequences of its `prefill`
        prompt rows hold `depth` cells each, and not `own`, the average of all. Below 0 for fewer;
        0 where that is not known."""
        return 0.0

    def observe(
        self, rows: int, prefill: int, kv: float, n_seqs: int, seconds: float, n_steps: int = 1
    ) -> None:
        """An engine has run `n_steps` such steps, `seconds` each on average."""
        return

    def observe_switch(self, seconds: float) -> None:
        """An engine has seen a step take `seconds` longer for a switch."""
        return
