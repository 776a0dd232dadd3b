"""What attention looks over in a step, for the cost model."""

from pyllamabatch.cost.step_cost import StepCost

from ..kv import KvAccounting
from .running import RunningSequences
from .step import Shape, Step, spans
from .view import Limits


class Attention:
    """In a pool of cells that all share these are all that are held, and for kernels that compute
    masked cells (`CostModel.computes_masked`) the free ones between them, too. In streams they are
    the cells of the sequences that are computed."""

    def __init__(
        self,
        limits: Limits,
        accounting: KvAccounting,
        running: RunningSequences,
        cost: StepCost | None,
    ) -> None:
        self._limits = limits
        self._accounting = accounting
        self._running = running
        self._cost = cost

    def of_all(self) -> int:
        """Cells that are attended when all decode."""
        if self._limits.unified:
            return int(self._pool())
        return self._accounting.n_cells - self._accounting.free

    def cells(self, step: Step, ahead: float = 0) -> float:
        """Cells that are attended in `step`, before it, or when it has been computed `ahead`
        times."""
        more = step.n_rows * ahead
        if self._limits.unified:
            return self._pool(more)
        slots = step.slots if step.chunks else step.decode
        if len(slots) == len(self._running.ids):  # all that run
            return self.of_all() + more
        return float(self._running.computed.take(slots).sum() + more)

    def shapes(self, step: Step, kv: float) -> list[Shape]:
        """What `CostModel.predict` is told of each part of `step`, one of its `parts`, that is
        computed at once. One, but where every sequence has a stream of cells of its own and those
        that decode are not neighbours. kv: cells that are attended before it."""
        if self._limits.unified:
            return [step.shape(kv)]
        if not step.chunks:
            return self._decoding(step, kv)
        if not step.behind:  # the last tokens of these prompts, if any
            n = step.n_rows + step.n_fill
            return [(n, n, kv, len(step.slots))]
        n = sum(chunk.n for chunk in step.chunks) + step.n_fill
        held = float(self._running.computed[[chunk.slot for chunk in step.chunks]].sum())
        return [*self._decoding(step, kv - held), (n, n, held, len(step.chunks))]

    def deeper(self, step: Step, kv: float) -> float:
        """Seconds that it takes longer than `predict` says of its shapes: in a pool these do not
        tell what the sequences of its prompts hold. kv: see `shapes`."""
        if self._cost is None or not (self._limits.unified and step.chunks):
            return 0.0
        n = sum(chunk.n for chunk in step.chunks)
        depth = sum(chunk.n * chunk.start for chunk in step.chunks) / n
        *_, n_seqs = step.shape(kv)
        return self._cost.deeper(n, kv / n_seqs, depth)

    def price(self, step: Step, n: int) -> float:
        """By how much a cached cell makes `step` longer when it is computed `n` times, as a share
        of computing that cell again. 0 in streams, and without a cost model."""
        cost, n_cached = self._cost, self._accounting.cached
        if cost is None or not self._limits.unified or not n_cached:
            return 0.0
        n_ubatch, kv = self._limits.n_ubatch, self.cells(step, n / 2)
        rows, prefill, _, n_seqs = step.shape(kv)
        without = cost.predict(rows, prefill, max(0.0, kv - n_cached), n_seqs)
        longer = (cost.predict(rows, prefill, kv, n_seqs) - without) / n_cached
        again = cost.predict(n_ubatch, n_ubatch, kv, n_seqs) / n_ubatch
        return n * longer / again if again else 0.0

    def _decoding(self, step: Step, kv: float) -> list[Shape]:
        n = len(step.decode)
        if step.n_pad:
            return [(max(n, step.n_pad), 0, kv, max(n, step.n_pad))]
        found = spans(step.decode, self._accounting.held_by_slot, self._limits.gap_max)
        return [(rows, 0, kv * decode / n, rows) for rows, decode in found]

    def _pool(self, more: float = 0) -> float:
        """When so many more are held: they go where cells are free, first."""
        held = self._accounting.used + more
        if self._cost is not None and self._cost.computes_masked:
            return max(held, self._accounting.reach)
        return held
