"""When a pool that was streams had better be streams again.

By the cost models of both a step takes longer in a pool than in streams. Once what fits in streams
has lost as much by that as there is to pay for the way back, and for the next way to a pool, the
pool goes. A sequence that needs it begins the count anew: where one comes before so much is lost,
the pool stays. And where one comes before streams have brought in what they cost, the next way back
has to wait for twice as much."""

from ..cost.step_cost import StepCost
from .kv_options import Pool
from .step import Step


class WayBack:
    """`streams`: what there was before the pool, and may be again. `seconds`: that the last change
    has taken, but for what was computed again."""

    def __init__(self, streams: Pool) -> None:
        self.streams = streams
        self.seconds = 0.0
        self._other: StepCost | None = None  # what steps of the layout take that there is not now
        self._gap = 0.0  # seconds of all steps in a pool beyond those in streams, since the change
        self._price = 0.0  # of the last way back, and the way to the pool behind it
        self._times = 1

    def to_pool(self, streams: StepCost | None) -> None:
        """There is a pool from now on. streams: what their steps take; None: not known, and a pool
        stays."""
        self._times = 2 * self._times if self._gap < self._price else 1
        self._other, self._gap = streams, 0.0

    def to_streams(self, pool: StepCost | None) -> None:
        self._other, self._gap = pool, 0.0

    @property
    def counts(self) -> bool:
        """Whether there has been a pool, and what steps take is known."""
        return self._other is not None

    def computed(self, step: Step, n: int, held: int, cells: float, cost: StepCost) -> None:
        """`step` was computed `n` times. held: cells of its own sequences; cells: that it attends
        to, or would in a pool. cost: what steps take now."""
        if self._other is None:
            return
        rows, prefill, _, n_seqs = step.shape(0)
        pool, streams = (cost, self._other) if cost.unified else (self._other, cost)
        longer = pool.predict(rows, prefill, cells, n_seqs)
        self._gap += n * max(0.0, longer - streams.predict(rows, prefill, held, n_seqs))

    def needs_pool(self) -> None:
        """A sequence that has been computed would not fit in a stream."""
        self._gap = 0.0

    def pays(self, n_again: int) -> bool:
        """Whether it is time, when `n_again` tokens have to be computed again."""
        if self._other is None or self._gap <= 2 * self.seconds * self._times:
            return False
        n = self.streams.limits.n_ubatch
        again = n_again * self._other.predict(n, n, 0, 1) / n
        self._price = 2 * (self.seconds + again)
        return self._gap > self._price * self._times
