"""SimulatedReplica: a scheduler in virtual time, with a cost model in the place of the device.

Its `step` does what `EngineCore.step` does: update, take requests, schedule, carry out, run. A
native call of several steps is in flight until a sequence ends; a request that arrives, or a
deadline, ends it after its current step. The owner of the replica passes the time in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import starmap
from math import inf

import numpy as np

from pyllamabatch.cost.graphs import F64, Graphs, NativeCall
from pyllamabatch.cost.step_cost import NO_COST, NewGraph, StepCost
from pyllamabatch.engine.layout import DRAFT_MOST, most_draft_rows, n_copies
from pyllamabatch.errors import ArgumentError, integer, number
from pyllamabatch.kv import KvOperation, Sharing, SwapChoice
from pyllamabatch.kv.radix_tree import Tokens
from pyllamabatch.scheduler import Invariance, KvOptions, Limits, Policy, Scheduler, Step
from pyllamabatch.scheduler.kv_options import Pool
from pyllamabatch.scheduler.router import ReplicaView, expected_wait, row_seconds
from pyllamabatch.scheduler.step import Shape
from pyllamabatch.sim.drafts import Before, Luck, Steps, drafted_of, plain, steps_of
from pyllamabatch.sim.metrics import Load, Outcome
from pyllamabatch.sim.recorder import StepRecorder
from pyllamabatch.sim.workload import TraceRequest

# Seconds of the engine around a native call: plan, admission, rows of prompts. `python -m bench
# step` measures it ("gap, turnover").
OVERHEAD = 1e-4


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What every replica is. sharing, retain, invariance, swap: see `KvOptions`; each replica has a
    copy of `swap`, and copies take as long as that says. overhead: seconds of a native call beside
    its steps. latency: seconds from a token to its reader. new_graph: see `NewGraph`. pool: what
    streams become when a sequence needs it."""

    cost: StepCost
    limits: Limits
    sharing: Sharing = field(default_factory=Sharing)
    retain: bool = True
    overhead: float = OVERHEAD
    latency: float = 0.0
    new_graph: NewGraph = NO_COST
    invariance: Invariance | None = None
    pool: EngineSpec | None = None
    swap: SwapChoice = field(default_factory=lambda: SwapChoice("recompute"))

    @classmethod
    def of(
        cls,
        cost: StepCost,
        *,
        n_seq_max: int = 16,
        n_cells: int = 32768,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        unified: bool = True,
        prefix_cache: bool = True,
        overhead: float = OVERHEAD,
        gap_max: int = 16,
        batch_invariant: bool = False,
        speculate: bool = False,
    ) -> EngineSpec:
        """An engine of a model with plain attention. In a pool (unified) sequences share any
        prefix; with a stream for each, a prefix is copied whole. prefix_cache: cache the prefixes
        of ended requests. gap_max: see `Limits`; the default is a GPU's. batch_invariant: see
        `Engine`, not in a pool. speculate: steps may check drafts that cost nothing to make, of
        requests with an `acceptance`. ArgumentError for what no engine can be."""
        if batch_invariant and speculate:
            raise ArgumentError("speculate", speculate, "False with batch_invariant")
        if batch_invariant and unified:
            raise ArgumentError("unified", unified, "False with batch_invariant")
        if not hasattr(cost, "switch"):
            raise ArgumentError("cost", cost, "a CostModel, or what inherits StepCost")
        if not isinstance(unified, bool):
            raise ArgumentError("unified", unified, "True (a pool) or False (streams)")
        n_seq_max = integer("n_seq_max", n_seq_max, 1, 256)
        n_cells = integer("n_cells", n_cells, 1, 2**31 - 1)
        n_batch = integer("n_batch", n_batch, n_seq_max, 2**31 - 1)
        n_ubatch = min(integer("n_ubatch", n_ubatch, 1, 2**31 - 1), n_batch)
        overhead = number("overhead", overhead, 0)
        invariance = Invariance.assumed(n_ubatch, n_seq_max) if batch_invariant else None
        n_cached = n_copies(n_seq_max, n_batch, unified=unified) if prefix_cache else 0
        n_cells_seq = n_cells
        if not unified:  # batch_invariant: a cell of each is for a row that fills up a call
            n_cells_seq = max(1, n_cells // n_seq_max - batch_invariant)
            n_cells = n_cells_seq * n_seq_max
        gap_max = 0 if unified else gap_max
        limits = Limits(n_batch, n_ubatch, n_seq_max, n_cells, n_cells_seq, unified, gap_max)
        if speculate:
            n_outputs = min(n_seq_max + n_cached + most_draft_rows(n_seq_max), n_batch)
            limits = replace(limits, n_draft_max=DRAFT_MOST, n_outputs=n_outputs)
        sharing = Sharing(
            copy_part=unified,
            copy_whole=True,
            trim=True,
            n_cached=n_cached,
            grid=1 if invariance is None else invariance.grid,
            at_once=unified,
        )
        cost = with_switch(cost)
        return cls(
            cost,
            limits,
            sharing,
            prefix_cache,
            overhead,
            new_graph=cost.new_graph,
            invariance=invariance,
            swap=SwapChoice("swap" if batch_invariant else "recompute"),
        )


def with_switch(cost: StepCost) -> StepCost:
    """A switch that was never observed costs as much as a new graph."""
    if cost.switch is None:
        cost = copy.copy(cost)
        cost.switch = cost.new_graph.step
    return cost


@dataclass(slots=True)
class _Open:
    """A request that has arrived and not ended. left: tokens to its end; last: time of its last
    token; preempted: when it was preempted last."""

    request: TraceRequest
    outcome: Outcome
    left: int
    last: float = 0.0
    preempted: float = 0.0
    luck: Luck | None = None

    def known(self) -> Tokens:
        """Of its prompt and its output so far."""
        return self.request.tokens(self.request.n_output - self.left)

    def add_tokens(self, n: int, first: float, end: float, longest: float = 0.0) -> None:
        """n tokens, from the time `first` to `end`, `longest` seconds at most between two."""
        self.outcome.longest_itl = max(self.outcome.longest_itl, first - self.last, longest)
        self.last = end
        self.left -= n


@dataclass(slots=True)
class _InFlight:
    """A native call in flight: when it begins, and its first step; the times at which its steps
    end; the cells in use before it; what its steps are, where they may have drafts; rows of
    padding, where they are recorded."""

    step: Step
    start: float
    first: float
    ends: F64
    held: int
    steps: Steps | None = None
    n_filled: int = 0


class SimulatedReplica:
    """`ended(outcome)` is called for each request at its end. `recorder`: has its last `n_trace`
    steps; None for 0."""

    def __init__(
        self,
        spec: EngineSpec,
        policy: Policy,
        ended: Callable[[Outcome], None],
        index: int = 0,
        n_trace: int = 0,
    ) -> None:
        self.index = index
        self._specs = {"streams": spec, "pool": spec.pool or spec}
        self.load = Load(n_cells=spec.limits.n_cells)
        pool = None
        if spec.pool is not None:  # with the slots that the streams have
            sharing = replace(spec.pool.sharing, n_cached=spec.sharing.n_cached)
            pool = Pool(spec.pool.limits, sharing)
        swap = copy.copy(spec.swap)
        kv = KvOptions(spec.sharing, spec.retain, swap, pool, spec.invariance)
        self.scheduler = Scheduler(spec.limits, policy, cost=spec.cost, kv=kv)
        self.load.counters = self.scheduler.counters
        self.recorder = StepRecorder(n_trace, self.scheduler.n_slots) if n_trace else None
        self._said = ReplicaView()
        self._ended = ended
        self._arrived: list[tuple[TraceRequest, float]] = []
        self._open: dict[int, _Open] = {}
        self._in_slot: dict[int, _Open] = {}
        self._parts: list[Step] = []  # of the scheduled step, not run yet
        self._call: _InFlight | None = None
        self._wake = inf
        self._rows_before = 0  # of the last step
        self._before = Before()
        self._copying = 0.0  # seconds of copies before the next call
        self._is(spec)

    def _is(self, spec: EngineSpec) -> None:
        """An engine of this kind from now on."""
        self.spec = spec
        self.load.n_cells = spec.limits.n_cells
        switch = spec.cost.switch or 0.0
        self._graphs: Graphs | None = None
        if any(spec.new_graph) or switch:
            self._graphs = Graphs(spec.new_graph, switch, unified=spec.limits.unified)

    @property
    def computes(self) -> bool:
        """A call is in flight."""
        return self._call is not None

    @property
    def n_open(self) -> int:
        """Requests that have arrived and not ended."""
        return len(self._open) + len(self._arrived)

    @property
    def seen(self) -> ReplicaView:
        """What a router knows of it."""
        return self._said._replace(n_open=self.n_open)

    def report(self) -> None:
        """What a router knows is of now."""
        wait = expected_wait(self.scheduler, self.n_open)
        self._said = ReplicaView(0, wait, row_seconds(self.scheduler))

    @property
    def next(self) -> float:
        """When `step` is to be called."""
        if self._call is not None:
            return float(self._call.ends[-1])
        return -inf if self._arrived else self._wake

    def check_fits(self, request: TraceRequest) -> None:
        """RequestTooLong when it can never fit."""
        self.scheduler.check_fits(request.n_prompt, request.max_tokens or request.n_output)

    def submit(self, request: TraceRequest, now: float) -> None:
        """The call in flight ends with its current step, and the request, which fits, is taken
        then."""
        self._arrived.append((request, now))
        if self._call is not None:
            n_steps = int(np.searchsorted(self._call.ends, now)) + 1
            self._call.ends = self._call.ends[:n_steps]

    def step(self, now: float) -> None:
        """The call in flight ends, and the next one begins if there is anything to compute."""
        self._update()
        while not self._parts:
            self._take_requests()
            self._end_due(now)
            step = self.scheduler.plan(now)
            if step is None:
                deadline = self.scheduler.deadlines.next
                self._wake = min(self._time_to_plan(now), inf if deadline is None else deadline)
                return
            self._carry_out(step, now)
        self._run(self._parts.pop(0), now)

    # -- the parts of a step

    def _update(self) -> None:
        """Advance by the call in flight: times of tokens, sequences that end."""
        call, self._call = self._call, None
        if call is None:
            return
        step, ends = call.step, call.ends
        n, end = len(ends), float(ends[-1])
        self.load.seconds += end - call.start
        n_held = call.held + n * step.n_rows
        if call.steps is not None:  # drafted tokens that were right
            n_held += int(call.steps.taken[:n].sum()) - n * len(step.decode)
        self.load.kv_peak = max(self.load.kv_peak, n_held)
        if self._graphs is not None:
            self._graphs.computed(n)
        if self.recorder is not None:
            self.recorder.ended(step, call.first, ends, call.n_filled, call.steps)
        drafted, drafting = None, self.scheduler.drafting
        seconds = 0.0 if call.steps is None or step.chunks else float(call.steps.seconds[:n].sum())
        passes = drafting is not None and drafting.passes(n, seconds, asked=bool(step.drafts))
        if call.steps is not None and not passes:
            luck = {slot: self._luck(slot) for slot in step.decode.tolist()}
            n_slots, limits = self.scheduler.n_slots, self.scheduler.limits
            drafted = drafted_of(step, call.steps, n, luck, limits, n_slots)
            self._before = call.steps.after[n - 1] if call.steps.after else self._before
        self.scheduler.advance(step, n, end, drafted)
        if drafting is not None:
            drafting.turned(self.spec.overhead, prompts=bool(step.chunks))
        done: list[int] = []
        if call.steps is not None and step.drafts:
            done = self._take_drafted(step, ends, call.steps)
        elif len(step.decode):
            decode, first, itl = step.decode.tolist(), float(ends[0]), self.load.itl
            gaps: list[float] = []
            for slot in decode:
                one = self._in_slot[slot]
                if one.left == one.request.n_output:  # its prompt has ended
                    one.outcome.first, one.last = first + self.spec.latency, first
                else:
                    gaps.append(first - one.last)
            itl.add(np.array(gaps))
            longest = 0.0
            if n > 1:
                within = np.diff(ends)
                itl.add(within, len(decode))
                longest = float(within.max())
            for slot in decode:
                one = self._in_slot[slot]
                one.add_tokens(n, first, end, longest)
                if not one.left:
                    done.append(slot)
        for slot in done:
            self._end(self._in_slot.pop(slot), end)

    def _take_drafted(self, step: Step, ends: F64, steps: Steps) -> list[int]:
        """Several tokens of a step are there at once. Returns the slots of those that end."""
        n, itl, done = len(ends), self.load.itl, []
        for i, slot in enumerate(step.decode.tolist()):
            one = self._in_slot[slot]
            gaps = np.diff(ends, prepend=one.last)
            if one.left == one.request.n_output:
                one.outcome.first, one.last = float(ends[0]) + self.spec.latency, float(ends[0])
                gaps = gaps[1:]
            taken = int(steps.taken[:n, i].sum())
            itl.add(gaps)
            itl.add(np.zeros(taken - n))
            one.outcome.n_drafted += int(steps.n_drafted[:n, i].sum())
            one.outcome.n_accepted += taken - n
            longest = float(gaps.max(initial=0.0))
            one.add_tokens(taken, float(ends[0]), float(ends[-1]), longest)
            if not one.left:
                done.append(slot)
        return done

    def _take_requests(self) -> None:
        arrived, self._arrived = self._arrived, []
        for request, now in arrived:
            outcome = Outcome(
                request.id, now, request.n_prompt, request.n_output, request.tenant, self.index
            )
            one = self._open[request.id] = _Open(request, outcome, request.n_output)
            if self.scheduler.drafting is not None:
                one.luck = Luck(request.id, request.acceptance or 0.0)
            self.scheduler.add(
                request.id,
                request.n_prompt,
                request.max_tokens or request.n_output,
                arrival=now,
                priority=request.priority,
                tenant=request.tenant,
                deadline=None if request.deadline is None else now + request.deadline,
                ttft_target=request.ttft_target,
                itl_target=request.itl_target,
                tokens=one if self.spec.sharing.any else None,
            )

    def _end_due(self, now: float) -> None:
        """Requests whose deadline has come end with what they have."""
        for id in self.scheduler.deadlines.due(now):
            one = self._open[id]
            one.outcome.n_output -= one.left
            one.outcome.deadline = True
            slot = self.scheduler.slot(id)
            if slot is not None:
                del self._in_slot[slot]
            elif one.outcome.preemptions:
                one.outcome.preemption += now - one.preempted
            else:
                one.outcome.admitted = now + self.spec.latency
            self._end(one, now)

    def _time_to_plan(self, now: float) -> float:
        """When to plan again, if no request arrives before."""
        pause = 0.0 if self.scheduler.idle else self.scheduler.hold(now)
        return now + pause if pause > 0 else inf

    def _carry_out(self, step: Step, now: float) -> None:
        """Preempt, admit, move, and find the native calls that the step takes."""
        for id, slot in step.preempted:
            self._open[id].preempted = now
            self._open[id].outcome.preemptions += 1
            del self._in_slot[slot]
        for _, source, slot in step.moved:
            self._in_slot[slot] = self._in_slot.pop(source)
        for id, slot in step.admitted:
            one = self._in_slot[slot] = self._open[id]
            if one.outcome.preemptions:
                one.outcome.preemption += now - one.preempted
            else:
                one.outcome.admitted = now
                one.outcome.prefix = self.scheduler.sequence(id).prefix.hit
        for operation in step.kv_operations:
            if (becomes := self._specs.get(operation.kind)) is not None:
                self._is(becomes)
                self.scheduler.renewed(becomes.cost, 0.0)
            self._copying += self._copy_seconds(operation)
        if self.recorder is not None:
            self.recorder.placed(step)
        if step.n_rows:
            self._parts = [step] if self.spec.limits.unified else list(step.parts())

    def _run(self, step: Step, now: float) -> None:
        """Begin a call: as many steps as the plan stands for, or to the end of a sequence, or to a
        deadline."""
        scheduler = self.scheduler
        assert step.n_rows + step.n_fill <= scheduler.limits.n_batch
        held = scheduler.accounting.used - scheduler.accounting.cached
        self.load.add_point(now, scheduler.n_running, scheduler.n_waiting, held)
        n = step.repeat
        if n > 1:
            n = min(n, *(self._in_slot[slot].left for slot in step.decode.tolist()))
        steps, seconds = None, np.zeros(0)
        if step.drafts:
            steps = self._drafted_steps(step, n)
            seconds = steps.seconds
        else:
            own, seconds = self._seconds(step, n)
            if scheduler.drafting is not None:
                steps = plain(step, seconds, own == seconds)
        self._rows_before = 0 if steps is None else int(steps.rows[-1])
        first, self._copying = now + self.spec.overhead + self._copying, 0.0
        ends = first + np.cumsum(seconds)
        if scheduler.deadlines.next is not None:
            ends = ends[: int(np.searchsorted(ends, scheduler.deadlines.next)) + 1]
        self._call = _InFlight(step, now, first, ends, held, steps)
        if self.recorder is not None:
            shapes = scheduler.attention.shapes(step, 1.0)
            self._call.n_filled = sum(rows for rows, *_ in shapes) - step.n_rows - step.n_fill
            self.recorder.begin(step, now, scheduler.accounting.used)

    # -- inside

    def _copy_seconds(self, operation: KvOperation) -> float:
        """Of a state to the host or back, and of a stream on the device."""
        swap = self.scheduler.admission.swap
        if operation.kind in ("save", "load"):
            return operation.n * swap.bytes_per_token / swap.copy_rate
        streams = not self.spec.limits.unified
        return swap.stream_seconds if operation.kind == "copy" and streams else 0.0

    def _luck(self, slot: int) -> Luck:
        luck = self._in_slot[slot].luck
        assert luck is not None
        return luck

    def _drafted_steps(self, step: Step, n: int) -> Steps:
        """Up to n times this step, to the end of a sequence."""
        scheduler, n_seqs = self.scheduler, len(step.decode)
        slots = step.decode.tolist()
        new = 0.0 if self._graphs is None else self.spec.new_graph.step
        before = self._rows_before

        def seconds_of(rows: int, at: int) -> tuple[float, float]:
            nonlocal before
            graph, before = new if rows != before else 0.0, rows
            kv = scheduler.attention.cells(step, at)
            return self.spec.cost.predict(rows, 0, kv, n_seqs), graph

        if self._graphs is not None:
            self._graphs.replaced()
        left = [self._in_slot[slot].left for slot in slots]
        luck = [self._luck(slot) for slot in slots]
        return steps_of(step, n, left, luck, scheduler.limits, seconds_of, self._before)

    def _seconds(self, step: Step, n: int) -> tuple[F64, F64]:
        """Seconds of each of n times this step, without new graphs and with them."""
        scheduler, predict = self.scheduler, self.spec.cost.predict
        kv = scheduler.attention.cells(step)
        shapes = scheduler.attention.shapes(step, kv)
        each = [*starmap(predict, shapes)]
        for (rows, prompt, *_), took in zip(shapes, each, strict=True):
            scheduler.prefilled(rows, prompt, took)
        first = sum(each) + scheduler.attention.deeper(step, kv)
        seconds = np.full(n, first, dtype=np.float64)
        if n > 1:
            later = scheduler.attention.cells(step, n - 1)
            last = sum(predict(rows, 0, held * later / kv, seqs) for rows, _, held, seqs in shapes)
            seconds += (last - first) / (n - 1) * np.arange(n, dtype=np.float64)
        own = seconds
        if self._graphs is not None:
            seconds = seconds.copy()
            self._graphs.add_to(seconds, self._call_of(step, n, shapes))
        return own, seconds

    def _call_of(self, step: Step, n: int, shapes: list[Shape]) -> NativeCall:
        """Of n times this step, whose parts that are computed at once have these shapes."""
        limits, accounting = self.spec.limits, self.scheduler.accounting
        ahead = np.arange(1, n + 1)
        if limits.unified:
            cells = np.maximum(accounting.reach, accounting.used + step.n_rows * ahead)
        else:
            cells = accounting.longest(step.slots) + ahead
        chunks = tuple((chunk.slot, chunk.n) for chunk in step.chunks)
        decode = np.arange(step.n_pad, dtype=np.int32) if step.n_pad else step.decode
        n_graphs = [-(-rows // limits.n_ubatch) for rows, *_ in shapes]
        return NativeCall(decode, chunks, sum(n_graphs), cells, n_graphs[-1] * step.behind)

    def _end(self, one: _Open, now: float) -> None:
        one.outcome.end = now + self.spec.latency
        self.scheduler.remove(one.outcome.id)
        del self._open[one.outcome.id]
        self._ended(one.outcome)
