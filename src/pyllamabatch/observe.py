"""What the calls of an engine say of its device: to the cost model, and to the estimate of what a
preemption costs."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from ._stream_step import Run
from .kv import Slots
from .scheduler import Scheduler, Step


class Observer:
    """`scheduler.cost` is the model, when there is one."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._before: Slots | None = None  # who decoded in the call before, and nobody else did
        self._end = 0.0  # of that call

    def __call__(self, step: Step, run: Run) -> None:
        """After a call, and before the scheduler advances."""
        scheduler, n, n_decode = self._scheduler, run.n_steps, len(step.decode)
        cost = scheduler.cost
        if step.n_rows - n_decode >= 16 + 8 * n_decode:
            scheduler.starts.swap.computed(step.n_rows, run.seconds)
        if cost is None:
            return
        end = perf_counter()
        switched = self._switched(step)
        self._before = None if step.chunks else step.decode
        gap, self._end = end - run.seconds - self._end, end
        seconds = run.seconds / n
        made_anew = not step.chunks and run.n_reused == n - 1  # the graph, for the first step
        if made_anew and n > 1:
            seconds = (run.seconds - run.first_seconds) / (n - 1)
        kv = scheduler.ledger.used + step.n_rows * (n - 1) / 2
        shape = step.shape(kv, scheduler.limits.unified)
        if switched and run.code == 0:
            if made_anew and n == 1:
                seconds = cost.predict(*shape)
            first = run.first_seconds - seconds if made_anew else 0.0
            cost.observe_switch(max(0.0, first) + max(0.0, gap))
        if not (switched and made_anew and n == 1):
            cost.observe(*shape, seconds)

    def _switched(self, step: Step) -> bool:
        """As many sequences decode as before, and nobody else, but not the same ones."""
        before, now = self._before, step.decode
        if before is None or step.chunks or before is now or len(before) != len(now):
            return False
        return not np.array_equal(before, now)
