"""StepCalls: the native calls that a step is made of, what each is told, and what it tells."""

from math import isfinite
from time import thread_time

import numpy as np

from ..scheduler import Scheduler, Step
from ..scheduler.drafting import Drafted
from ..scheduler.view import Prices
from ..step.trace import StepTrace
from ..step.types import DraftColumns, Run
from .protocols import Device, StepRunner
from .slot_table import SlotTable


class StepCalls:
    """The leader's. `of`, `write`, `compute` and `ended` come in this order; all but `compute` with
    the core's `state` held."""

    def __init__(
        self, scheduler: Scheduler, table: SlotTable, device: Device, trace: StepTrace | None
    ) -> None:
        self._scheduler = scheduler
        self._table = table
        self._device = device
        self._stepper: StepRunner = device.stepper
        self._trace = trace
        # Where steps may check drafts: what the stepper knows of them.
        drafting = scheduler.drafting
        self._drafts: DraftColumns | None = None if drafting is None else device.stepper.drafts
        if drafting is not None and self._drafts is not None:
            drafting.lacks, drafting.size = self._drafts.n_lacks, device.feed.size
            drafting.asks = device.feed.look
        limits = scheduler.limits
        self._n_timed = 1 + min(limits.n_outputs or limits.n_batch, limits.n_ubatch, limits.n_batch)
        self._running: tuple[Step, int] | None = None  # the call that goes on, and its first step
        self._credit = 0.0  # before it,
        self._gained = 0.0  # by the calls of its step

    def of(self, step: Step) -> tuple[Step, ...]:
        """The calls: rows with different adapters can't share one."""
        self._gained = 0.0
        calls: tuple[Step, ...] = (step,)
        if self._device.loras.names:
            calls = step.by_group(self._table.lora_at, self._device.loras.applied)
        if not self._scheduler.limits.unified:
            calls = tuple(part for call in calls for part in call.parts())
        return calls

    def write(self, call: Step) -> int:
        """Its rows of prompts, its drafts and its line in the trace. Returns how many rows come
        before those that the native call makes of `call.decode`."""
        n_before = self._write_chunks(call) if call.chunks else 0
        first = self._stepper.n_recorded
        if self._trace is not None:
            prompts = [(chunk.slot, chunk.id, chunk.n, chunk.fill) for chunk in call.chunks]
            used = self._scheduler.accounting.used
            rows = call.n_rows, used, call.decode
            self._trace.begin(first, *rows, prompts, call.reasons)
        self._running = call, first
        if self._drafts is not None:
            set_drafts(self._drafts, call)
            self._drafts.credit[0] += self._gained
            self._credit = float(self._drafts.credit[0])
            self._device.feed.fill(call, self._table.in_slot)
        return n_before

    def compute(self, call: Step, n_steps: int, n_before: int) -> Run:
        """It is computed, up to `n_steps` times."""
        loras = self._device.loras
        if loras.names:
            loras.apply(self._table.lora_at(call.slots[0]))
        threads = self._device.threads
        if threads is not None:
            n_steps = threads.begin(call, n_steps)
        began = thread_time()
        run = self._stepper.compute(call.decode, n_steps, n_before, call.n_pad)
        if threads is not None:
            threads.took(call, run, thread_time() - began)
        return run

    def ended(self) -> None:
        """It was computed, or has failed."""
        self._running = None

    def progress(self) -> tuple[int, int]:
        """Of the call that goes on: steps that are done and in no counter yet, and the rows of
        each, which decode: one with rows of prompts is a single step, and counted at its end."""
        if self._running is None or self._running[0].chunks:
            return 0, 0
        call, first = self._running
        return max(0, self._stepper.n_published - first), call.n_rows

    def drafted(self, call: Step, run: Run) -> Drafted | None:
        """What came of its drafts. None where the scheduler needs not know."""
        drafts, drafting, threads = self._drafts, self._scheduler.drafting, self._device.threads
        if drafts is None or drafting is None:
            return None
        self._device.feed.computed(run)
        if self._device.feed.is_over:
            drafting.stop()
        seconds = 0.0 if call.chunks else run.seconds
        if drafting.passes(run.n_steps, seconds, asked=bool(call.drafts)):
            return None
        gained = None
        if call.prices is not None and isfinite(call.prices.credit):
            gained = float(drafts.credit[0]) - self._credit
        self._gained += gained or 0.0
        timed = threads is None or not threads.tries
        rows = slice(self._n_timed)
        return Drafted(
            drafts.n_taken,
            run.n_rows,
            run.n_drafted,
            run.n_accepted,
            drafts.found,
            drafts.right,
            run.seconds,
            drafts.n_timed[rows] * timed,
            drafts.ns_timed[rows] * 1e-9,
            gained,
            int(drafts.n_drafts[call.decode].sum()),
            drafts.n_right,
            run.catch_up_seconds,
        )

    def tell_drafted(self, call: Step) -> None:
        """Each request, what came of its drafts."""
        drafts = self._drafts
        assert drafts is not None
        for slot in call.drafts:
            if drafts.n_drafted[slot]:
                counts = drafts.n_drafts[slot], drafts.n_drafted[slot], drafts.n_accepted[slot]
                self._table.in_slot(slot).sink.drafted(*map(int, counts))

    def _write_chunks(self, call: Step) -> int:
        rows = self._stepper.rows
        end = 0
        for chunk in call.chunks:
            request = self._table.in_slot(chunk.slot)
            start, stop, end = end, end + chunk.n, end + chunk.n + chunk.fill
            rows.token[start:stop] = request.tokens[chunk.start : chunk.start + chunk.n]
            rows.token[stop:end] = rows.token[stop - 1]
            rows.pos[start:end] = np.arange(chunk.start, chunk.start + end - start)
            rows.seq[start:end] = chunk.slot
        rows.flags[:end] = 0
        return end


def set_drafts(drafts: DraftColumns, step: Step) -> None:
    """What each slot may draft in the next run, and what rows cost there."""
    drafts.n_most[:] = 0
    for slot, n in step.drafts.items():
        drafts.n_most[slot] = n
    prices = step.prices
    if step.invariance is not None and step.drafts:  # no rows but those that give the same bits
        n_priced = len(drafts.seconds)
        prices = prices or Prices(np.ones(n_priced), np.zeros(n_priced), np.inf)
        seconds = step.invariance.allowed(prices.seconds, step.n_pad)
        prices = prices._replace(seconds=seconds)
    drafts.n_priced[0] = 0 if prices is None else len(prices.seconds)
    if prices is not None:
        drafts.seconds[: len(prices.seconds)] = prices.seconds
        drafts.worst[: len(prices.worst)] = prices.worst
        drafts.credit[0], drafts.gain[0] = prices.credit, prices.gain
        drafts.new_graph[0] = prices.new_graph
