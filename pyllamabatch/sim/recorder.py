"""The steps of a simulated engine, in the form of a live one's trace."""

import numpy as np
import numpy.typing as npt

from pyllamabatch.scheduler import Step
from pyllamabatch.sim.drafts import Steps
from pyllamabatch.step.ring_reader import StepTable
from pyllamabatch.step.trace import StepTrace
from pyllamabatch.step.types import STEP_DTYPE

F64 = npt.NDArray[np.float64]

_PAGE = 1024  # steps


class StepRecorder:
    """`trace` has the last `n_steps` steps, a request by its id + 1: 0 is none. A step's time is
    all in its phase "decode"; graphs that are reused are not told of."""

    def __init__(self, n_steps: int, n_seq_max: int) -> None:
        self.trace = StepTrace(n_steps, n_seq_max)
        self._n = 0
        self._end = 0.0
        self._page = StepTable(_PAGE)
        self.trace.add_steps(self._page)

    def placed(self, step: Step) -> None:
        """Requests that have left their slots, and those that have got one."""
        for id, slot in step.preempted:
            self.trace.preempted[1 + id] = slot
        for id, slot in step.admitted:
            self.trace.ids[slot] = 1 + id
        for id, _, slot in step.moved:
            self.trace.ids[slot] = 1 + id

    def begin(self, step: Step, now: float, kv_used: int) -> None:
        """A call begins. kv_used: cells that are held."""
        self.trace.idle_ns = round((now - self._end) * 1e9) if self._n else 0
        prompts = [(chunk.slot, 1 + chunk.id, chunk.n, chunk.fill) for chunk in step.chunks]
        reasons = {1 + id: text for id, text in step.reasons.items()}
        rows = step.n_rows, kv_used, step.decode
        self.trace.begin(self._n, *rows, prompts, reasons)

    def ended(
        self, step: Step, start: float, ends: F64, n_filled: int, steps: Steps | None
    ) -> None:
        """It has: its first step began at `start`. n_filled: rows of padding beside each of those
        of `step`."""
        n = len(ends)
        table = np.zeros(n, STEP_DTYPE)
        starts = np.concatenate(([start], ends[:-1]))
        table["t_start_ns"] = np.rint(starts * 1e9)
        table["decode_ns"] = np.rint(ends * 1e9) - table["t_start_ns"]
        table["n_rows"], table["n_filled"] = step.n_rows, n_filled
        table["n_results"] = len(step.decode)
        if steps is not None and step.drafts:
            drafted = steps.n_drafted[:n].sum(1)
            rows = np.where(drafted > 0, steps.rows[:n], step.n_rows + n_filled)
            table["n_drafted"], table["n_results"] = drafted, steps.taken[:n].sum(1)
            table["n_accepted"] = table["n_results"] - len(step.decode)
            table["n_filled"] = rows * n_filled // (step.n_rows + n_filled)
            table["n_rows"] = rows - table["n_filled"]
        self._n += n
        self._end = float(ends[-1])
        while len(table):
            page = self._page
            if page.n == len(page.table):
                page = self._page = StepTable(_PAGE)
                self.trace.add_steps(page)
            new, table = np.split(table, [len(page.table) - page.n])
            page.table[page.n : page.n + len(new)] = new
            page.n += len(new)
