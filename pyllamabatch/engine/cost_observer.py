"""CostObserver: tells the cost model, and the estimate of what a preemption costs, how long the
native calls took."""

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from ..cost.step_cost import NO_COST, SETTLED
from ..kv import Slots
from ..scheduler import Scheduler, Step
from ..scheduler.step import Shape
from ..step.types import Run

_AT_ONCE = 1e-3  # seconds between two calls of a step


class CostObserver:
    """`scheduler.cost` is the model, when there is one. asynchronous: see `Device`."""

    def __init__(self, scheduler: Scheduler, *, asynchronous: bool = False) -> None:
        self._scheduler = scheduler
        self._asynchronous = asynchronous
        self._pending: list[tuple[Shape, float]] = []  # calls that nothing has waited for
        self._before: Slots | None = None  # slots of the call before, if all of its rows decoded
        self._end = 0.0  # of that call
        self._n_old = SETTLED  # steps since the last new graph

    def __call__(self, step: Step, run: Run) -> None:
        """After a call, and before the scheduler advances."""
        scheduler, n = self._scheduler, run.n_steps
        cost = scheduler.cost
        if cost is None:
            if len(step.decode) or not self._asynchronous:
                scheduler.prefilled(step.n_rows, step.n_rows - len(step.decode), run.seconds)
            return
        end = perf_counter()
        if run.n_drafted:  # steps of different widths: `Drafting` knows what they take
            self._pending.clear()
            self._before, self._end = None, end
            return
        switched = self._switched(step)
        self._before = None if step.chunks else step.decode
        gap, self._end = end - run.seconds - self._end, end
        kv = scheduler.attention.cells(step, (n - 1) / 2)
        shapes = scheduler.attention.shapes(step, kv)
        if step.behind:
            # The prompts' graph took none of this time.
            rest = run.seconds - sum(cost.predict(*shape) for shape in shapes[:-1])
            if self._asynchronous:
                self._wait_for(shapes[-1], rest + cost.new_graph.step)
            elif rest > 0:
                scheduler.prefilled(*shapes[-1][:2], rest)
                cost.observe(*shapes[-1], rest)
            return
        if self._asynchronous and not len(step.decode):
            self._wait_for(shapes[0], run.seconds - scheduler.attention.deeper(step, kv))
            return
        if self._pending and gap < _AT_ONCE:
            self._waited(shapes, run)
            return
        self._pending.clear()  # the device was done long ago
        scheduler.prefilled(*shapes[0][:2], run.seconds)
        rebuilt = not step.chunks and run.n_reused == n - 1  # the graph, for the first step
        if rebuilt and n > SETTLED:
            later = (run.seconds - run.first_seconds) / (n - 1)
            scheduler.padding.observe_graph(run.first_seconds - later)
        seconds = self._each(step, run, rebuilt)
        if switched and run.code == 0:
            if rebuilt and n == 1:  # no other step to compare it with
                seconds = sum(cost.predict(*shape) for shape in shapes)
            first = run.first_seconds - seconds if rebuilt else 0.0
            cost.observe_switch(max(0.0, first) + max(0.0, gap))
        # Of several parts one number says nothing of each.
        if len(shapes) == 1 and not (switched and rebuilt and n == 1):
            cost.observe(*shapes[0], seconds - scheduler.attention.deeper(step, kv), n)

    def _wait_for(self, shape: Shape, seconds: float) -> None:
        """A call that nothing has waited for. Of more than one nothing is learnt."""
        if len(self._pending) < 2:
            self._pending.append((shape, seconds))

    def _waited(self, shapes: Sequence[Shape], run: Run) -> None:
        """The first step of `run` took as long as the calls before it, too: what it does not need
        itself is theirs."""
        pending, self._pending = self._pending, []
        cost = self._scheduler.cost
        assert cost is not None
        if len(pending) > 1:
            return
        (shape, seconds), (new, _) = pending[0], cost.new_graph
        mine = sum(cost.predict(*one) for one in shapes) + (new if run.n_reused == 0 else 0.0)
        seconds += run.first_seconds - mine - new
        if run.n_steps == 1 and seconds > 0:
            self._scheduler.prefilled(*shape[:2], seconds)
            cost.observe(*shape, seconds)

    def _each(self, step: Step, run: Run, rebuilt: bool) -> float:
        """Seconds of a step whose graph is there already, which is what the model tells: without
        what new graphs were measured to take, or else without the first step, which had one."""
        n, limits = run.n_steps, self._scheduler.limits
        first, settle = NO_COST if self._scheduler.cost is None else self._scheduler.cost.new_graph
        settling = max(0, min(SETTLED - 1 - self._n_old, n))
        self._n_old = n - 1 if rebuilt else self._n_old + n
        if step.chunks:
            self._n_old = 0
            n_graphs = -(-step.n_rows // limits.n_ubatch)
            return run.seconds - max(0, n_graphs - run.n_reused) * first
        if not rebuilt:
            return (run.seconds - settle * settling / (SETTLED - 1)) / n
        if n <= SETTLED:
            return (run.seconds - first - settle * (n - 1) / (SETTLED - 1)) / n
        return (run.seconds - run.first_seconds - settle) / (n - 1)

    def _switched(self, step: Step) -> bool:
        """As many sequences decode as before, without prompts, but not the same ones."""
        before, now = self._before, step.decode
        if before is None or step.chunks or before is now or len(before) != len(now):
            return False
        return not np.array_equal(before, now)
