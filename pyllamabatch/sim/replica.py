"""Replica: the scheduler that an engine has, with a cost model in the place of the device.

It does what the decoder thread does: take in who has come, plan, compute. A call of several steps
is in flight until a sequence ends, or somebody comes and it ends with the step that it is in. Time
is a number that whoever owns the replica passes in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import starmap
from math import inf
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..engine.kv_config import LEAST_KEPT
from ..kv import Sharing
from ..kv.radix_tree import Tokens
from ..scheduler import Limits, Policy, Scheduler, Step
from .metrics import F64, Load, Outcome
from .workload import Request

N_POINTS = 2000  # of the curves over time, at least half of it once there are so many calls
# Seconds of the engine around a call, on a fast core: plan, admission, rows of prompts. `python -m
# bench step` measures what it is on a machine ("gap, turnover").
OVERHEAD = 1e-4
_N_KV = 256  # cells that a graph's attention grows by (src/llama-kv-cache.cpp: `get_n_kv`)


class Cost(Protocol):
    """See `CostModel.predict`. About linear in `kv`: the steps of one call are taken between the
    first and the last."""

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Machine:
    """What every replica is. `sharing`, `retain`: see `Scheduler`. Seconds: `overhead`, of a native
    call beside its steps; `latency`, until a token that is there has reached whoever waits for it;
    `new_graph`: (of a step whose graph is new, of those behind it), see `CostModel.new_graph`."""

    cost: Cost
    limits: Limits
    sharing: Sharing = field(default_factory=Sharing)
    retain: bool = True
    overhead: float = OVERHEAD
    latency: float = 0.0
    new_graph: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(
        cls,
        cost: Cost,
        *,
        n_seq_max: int = 16,
        n_cells: int = 32768,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        unified: bool = True,
        prefix_cache: bool | None = None,
        overhead: float = OVERHEAD,
        gap_max: int = 16,
    ) -> Machine:
        """One with ordinary attention, as an engine makes it: any beginning can be shared
        (unified), or copied whole and cut (a stream for each sequence). `prefix_cache`: keep what
        requests leave, default where cells are unified. `gap_max`: see `Limits`, for cells that
        are not unified; by default what a GPU gets."""
        n_cells_seq = n_cells if unified else max(1, n_cells // n_seq_max)
        retain = unified if prefix_cache is None else prefix_cache
        n_cached = 0
        if unified and retain:
            n_cached = max(0, min(max(n_seq_max, LEAST_KEPT), 256 - n_seq_max, n_batch - n_seq_max))
        limits = Limits(
            n_batch, n_ubatch, n_seq_max, n_cells, n_cells_seq, unified, 0 if unified else gap_max
        )
        sharing = Sharing(copy_part=unified, copy_whole=True, trim=True, n_cached=n_cached)
        cost, new_graph = with_switch(cost), getattr(cost, "new_graph", (0.0, 0.0))
        return cls(cost, limits, sharing, retain, overhead, new_graph=new_graph)


def with_switch(cost: Cost) -> Cost:
    """Where nobody knows what a switch costs: as much as a new graph."""
    if getattr(cost, "switch", 0.0) is None:
        cost = copy.copy(cost)
        cost.switch = getattr(cost, "new_graph", (0.0, 0.0))[0]  # type: ignore[attr-defined]
    return cost


@dataclass(slots=True)
class _Open:
    """A request that has come and not ended. While it runs in `slot` the next three are in the
    replica's arrays. left: tokens to its end; last: when it got its last one; gap: the longest time
    between two; out: when it was preempted."""

    request: Request
    outcome: Outcome
    lefts: npt.NDArray[np.int64]  # the replica's, by slot
    slot: int = -1
    left: int = 0
    last: float = 0.0
    gap: float = 0.0
    out: float = 0.0

    def known(self) -> Tokens:
        left = self.left if self.slot < 0 else int(self.lefts[self.slot])
        return self.request.tokens(self.request.n_output - left)


@dataclass(slots=True)
class _Flight:
    """A call: when each of its steps ends, the cells that were free before it."""

    step: Step
    start: float
    ends: F64
    free: int


class Replica:
    """`ended(outcome)` is called for each request at its end."""

    def __init__(
        self, machine: Machine, policy: Policy, ended: Callable[[Outcome], None], index: int = 0
    ) -> None:
        self.machine = machine
        self.index = index
        self.load = Load(n_cells=machine.limits.n_cells)
        self.points: list[tuple[float, int, int, int]] = []  # time, running, waiting, cells
        self.scheduler = Scheduler(
            machine.limits,
            policy,
            cost=machine.cost,
            sharing=machine.sharing,
            retain=machine.retain,
        )
        self._ended = ended
        self._mail: list[tuple[Request, float]] = []
        self._open: dict[int, _Open] = {}
        self._parts: list[Step] = []  # of the step that is computed, not begun yet
        self._flight: _Flight | None = None
        self._wake = inf
        n = self.scheduler.n_slots
        # By slot, of those that run; see `_Open`.
        self._at: list[_Open | None] = [None] * n
        self._left = np.zeros(n, dtype=np.int64)
        self._last = np.zeros(n)
        self._gap = np.zeros(n)
        self._every, self._n_calls = 1, 0
        self._graph: tuple[object, ...] = ()  # what the last one was made for, but for its cells
        self._decoded = b""  # the slots of its rows
        self._fresh = False  # the last step before this call was the first one with its graph
        self._n_kv = 0  # cells that it looks at
        self._grown = np.zeros(0, dtype=np.int64)  # the same, at each step of the call

    # -- requests

    @property
    def n_open(self) -> int:
        """Requests that have come and not ended."""
        return len(self._open) + len(self._mail)

    def submit(self, request: Request, now: float) -> None:
        """It is taken in between two calls; one that goes on ends with the step that it is in.
        RequestTooLong when it can never fit."""
        self.scheduler.check_fits(request.n_prompt, request.max_tokens or request.n_output)
        self._mail.append((request, now))
        flight = self._flight
        if flight is not None:
            n = int(np.searchsorted(flight.ends, now)) + 1
            flight.ends = flight.ends[:n]

    @property
    def next(self) -> float:
        """When there is something to do: `turn` is to be called then."""
        if self._flight is not None:
            return float(self._flight.ends[-1])
        return -inf if self._mail else self._wake

    def turn(self, now: float) -> None:
        """The call in flight is over, or there was none: the next one begins, if there is anything
        to compute."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._apply(flight)
        while True:
            if self._parts:
                self._begin(self._parts.pop(0), now)
                return
            self._take_mail()
            step = self.scheduler.plan(now)
            self._wake = inf
            if step is None:
                if not self.scheduler.idle:
                    pause = self.scheduler.hold(now)
                    self._wake = now + pause if pause > 0 else inf
                return
            for id, slot in step.preempted:
                self._leave(id, slot, now)
            for id, slot in step.admitted:
                self._sit(id, slot, now)
            if step.n_rows:
                unified = self.machine.limits.unified
                self._parts = [step] if unified else list(step.parts())

    # -- inside

    def _take_mail(self) -> None:
        mail, self._mail = self._mail, []
        for request, now in mail:
            outcome = Outcome(
                request.id, now, request.n_prompt, request.n_output, request.tenant, self.index
            )
            one = _Open(request, outcome, self._left, left=request.n_output)
            self._open[request.id] = one
            self.scheduler.add(
                request.id,
                request.n_prompt,
                request.max_tokens or request.n_output,
                arrival=now,
                priority=request.priority,
                tenant=request.tenant,
                deadline=None if request.deadline is None else now + request.deadline,
                itl_target=request.itl_target,
                tokens=one if self.machine.sharing.any else None,
            )

    def _sit(self, id: int, slot: int, now: float) -> None:
        one = self._at[slot] = self._open[id]
        one.slot = slot
        self._left[slot], self._last[slot], self._gap[slot] = one.left, one.last, one.gap
        outcome = one.outcome
        if outcome.preemptions:
            outcome.preempted_s += now - one.out
        else:
            outcome.admitted = now
            outcome.prefix = self.scheduler.sequence(id).prefix_hit

    def _leave(self, id: int, slot: int, now: float) -> None:
        one = self._open[id]
        one.slot, one.out = -1, now
        one.left, one.last = int(self._left[slot]), float(self._last[slot])
        one.gap = float(self._gap[slot])
        one.outcome.preemptions += 1
        self._at[slot] = None

    def _begin(self, step: Step, now: float) -> None:
        """A call: as many steps as the plan stands for, or to the end of a sequence."""
        machine, accounting = self.machine, self.scheduler.accounting
        self._note(now)
        n = step.repeat
        if n > 1:
            n = min(n, int(self._left[step.decode].min()))
        predict, kv = machine.cost.predict, self.scheduler.attended_cells(step)
        shapes = self.scheduler.shapes(step, kv)
        first = sum(starmap(predict, shapes))
        start = now + machine.overhead
        if n > 1:
            later = self.scheduler.attended_cells(step, n - 1)
            last = sum(
                [predict(rows, 0, held * later / kv, seqs) for rows, _, held, seqs in shapes]
            )
            times: F64 = first + (last - first) / (n - 1) * np.arange(n, dtype=np.float64)
        else:
            times = np.array([first], dtype=np.float64)
        if machine.new_graph[0] or getattr(machine.cost, "switch", 0.0):
            self._add_new_graphs(times, step, len(shapes))
        self._flight = _Flight(step, now, start + np.cumsum(times), accounting.free)

    def _add_new_graphs(self, times: F64, step: Step, n_parts: int) -> None:
        """To the steps whose graph libllama can't reuse (src/llama-graph.h: `allow_reuse`): other
        rows than before, or cells in sight beyond what the graph was made for. n_parts: those that
        decode are computed in so many."""
        new, settle = self.machine.new_graph
        limits, n, who = self.machine.limits, len(times), step.decode.tobytes()
        if limits.unified:  # whose rows they are does not matter
            graph: tuple[object, ...] = (len(step.decode), *((c.n, c.last) for c in step.chunks))
        else:
            graph = (who, *((c.slot, c.n, c.last) for c in step.chunks))
        n_graphs = max(n_parts, -(-step.n_rows // limits.n_ubatch))
        at = [0] if graph != self._graph else []
        if not at and n_graphs == 1 and not step.chunks and who != self._decoded:
            times[0] += getattr(self.machine.cost, "switch", 0.0) or 0.0
        self._decoded = who
        if n_graphs > 1:  # libllama keeps the last one alone
            at = list(range(n))
            new, settle = new * n_graphs, 0.0
        self._graph = graph if n_graphs == 1 else ()
        accounting, ahead = self.scheduler.accounting, np.arange(1, n + 1)
        if limits.unified:
            cells = np.maximum(accounting.reach, accounting.used + step.n_rows * ahead)
        else:
            cells = accounting.longest(step.slots) + ahead
        grown = -(-cells // _N_KV) * _N_KV
        before = np.concatenate(([self._n_kv], grown[:-1]))
        at += [i for i in np.flatnonzero(grown != before).tolist() if i not in at]
        self._grown = grown
        if self._fresh and 0 not in at:
            times[0] += settle
        self._fresh = n - 1 in at
        for i in at:
            times[i] += new
            if i + 1 < n and i + 1 not in at:
                times[i + 1] += settle

    def _apply(self, flight: _Flight) -> None:
        step, ends, scheduler = flight.step, flight.ends, self.scheduler
        n, end, decode = len(ends), float(ends[-1]), step.decode
        self._count(flight, n, end)
        if len(self._grown):
            self._n_kv = int(self._grown[n - 1])
        scheduler.advance(step, n)
        done: list[int] = []
        if len(decode):
            gaps = ends[0] - self._last[decode]
            itl = self.load.itl
            itl.add(gaps)
            if n > 1:
                within = np.diff(ends)
                itl.add(within, len(decode))
                gaps = np.maximum(gaps, within.max())
            self._gap[decode] = np.maximum(self._gap[decode], gaps)
            self._last[decode] = end
            self._left[decode] -= n
            done = decode[self._left[decode] == 0].tolist()
        for chunk in step.chunks:
            if chunk.last:
                self._token(chunk.slot, end)
                if not self._left[chunk.slot]:
                    done.append(chunk.slot)
        for slot in done:
            self._end(slot, end)

    def _token(self, slot: int, now: float) -> None:
        """A prompt is computed to its end: one token."""
        one = self._at[slot]
        assert one is not None
        if self._left[slot] == one.request.n_output:
            one.outcome.first = now + self.machine.latency
        else:
            gap = now - self._last[slot]
            self.load.itl.add(np.array([gap]))
            self._gap[slot] = max(self._gap[slot], gap)
        self._last[slot] = now
        self._left[slot] -= 1

    def _end(self, slot: int, now: float) -> None:
        one = self._at[slot]
        assert one is not None
        self._at[slot] = None
        outcome = one.outcome
        outcome.end = now + self.machine.latency
        outcome.longest_itl = float(self._gap[slot])
        self.scheduler.remove(outcome.id)
        del self._open[outcome.id]
        self._ended(outcome)

    # -- what is counted

    def _count(self, flight: _Flight, n: int, end: float) -> None:
        load, n_rows = self.load, flight.step.n_rows
        seconds, held = end - flight.start, load.n_cells - flight.free
        load.seconds += seconds
        load.kv_seconds += (held + 0.5 * n * n_rows) * seconds
        load.kv_peak = max(load.kv_peak, held + n * n_rows)
        load.rows[n_rows] = load.rows.get(n_rows, 0) + n

    def _note(self, now: float) -> None:
        """A point of the curves; every second one goes, and from then on every second call, when
        there are too many."""
        self._n_calls += 1
        if self._n_calls % self._every:
            return
        scheduler = self.scheduler
        held = scheduler.limits.n_cells - scheduler.accounting.free
        self.points.append((now, scheduler.n_running, scheduler.n_waiting, held))
        if len(self.points) > N_POINTS:
            del self.points[::2]
            self._every *= 2

    def finished(self) -> Load:
        """What it has done, all in all."""
        counters = self.scheduler.counters
        self.load.known_tokens = counters.known_tokens
        self.load.prefix_tokens = counters.prefix_tokens
        self.load.prefill_rows = counters.prefill_rows
        self.load.recomputed_rows = counters.recomputed_rows
        return self.load
