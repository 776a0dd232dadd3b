"""How far a simulation is from a live engine, on a device whose speed drifts.

The trace is cut into segments, and a probe with requests of its own runs before and after each. A
probe measures four things: the device's speed relative to its profile (steps that only decode,
steps with prompt rows, new graphs), the time of a native call beside its steps, and the time from
a token to its reader. A segment is simulated at the mean speed of the two probes around it, so no
measurement of a segment predicts that segment.

Two more simulations stand beside it: the profile at one mean speed, and the cost model as the
engine has refined it during the segment. The latter shows the simulator's own error.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.step_cost import SETTLED, NewGraph
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError
from pyllamabatch.kv import KvAccounting
from pyllamabatch.sim import EngineSpec, Outcome, TraceRequest, simulate, summarise
from pyllamabatch.sim.replica import OVERHEAD
from pyllamabatch.step.ring_reader import TIMES
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.trace import Trace
from tools.live import run_live, spec_of

Figures = Mapping[str, float]
Array = npt.NDArray[Any]

COMPARED = {
    "tokens_per_s": "output tokens/s",
    "tpot_mean": "TPOT, mean, ms",
    "ttft_p50": "TTFT, median, ms",
    "ttft_p99": "TTFT, 99th percentile, ms",
    "e2el_mean": "E2EL, mean, ms",
}
"""Figures that a simulation is judged by."""

BOUNDS = {"tokens_per_s": 0.05, "tpot_mean": 0.05, "ttft_p50": 0.10, "ttft_p99": 0.20}
"""Relative errors that it is to stay within."""

AT_SPEED = "at the probes' speed"
"""The simulation that the bounds are for."""

_PROBE_SECONDS = 2.0
_PROBE_PROMPT, _PROBE_OUTPUT = 64, (16, 48)  # tokens; prompts are as the trace's where there is one
_N_ALONE = 4
_LEAST_STEPS = 8  # of a regime, to say something of it


class Speed(NamedTuple):
    """What a probe found. Ratios of measured time to the model's: decode (steps without prompt
    rows, one per regime of the kernels), prompt (steps with prompt rows), graph (new graphs and
    the steps that settle behind them). overhead, latency: seconds, as in `EngineSpec`."""

    decode: tuple[float, ...]
    prompt: float
    graph: float
    overhead: float
    latency: float

    @classmethod
    def mean(cls, found: Iterable[Speed]) -> Speed:
        decode, *others = zip(*found, strict=True)
        each = tuple(fmean(regime) for regime in zip(*decode, strict=True))
        prompt, graph, overhead, latency = map(fmean, others)
        return cls(each, prompt, graph, overhead, latency)


class Steps(NamedTuple):
    """Steps of a trace, arrays of shape (steps,): rows, regime of the kernels, prompt rows, new
    graphs, whether the step settles behind a new graph, seconds measured, and seconds by the model
    without new graphs and settling."""

    rows: Array
    regime: Array
    prompt: Array
    new: Array
    behind: Array
    seconds: Array
    model: Array

    def reckoned(self, new_graph: NewGraph) -> Array:
        """Seconds by the model, new graphs and what settles behind them included."""
        step, settle = new_graph
        found: Array = self.model + self.new * step + self.behind * settle / (SETTLED - 1)
        return found


@dataclass(frozen=True, slots=True)
class Validation:
    """live, simulated by name: figures of all segments together. errors: those of each segment, of
    `AT_SPEED`, by figure. steps: of all segments, the model at the probes' speed."""

    live: Figures
    simulated: Mapping[str, Figures]
    errors: Mapping[str, Sequence[float]]
    speeds: Sequence[Speed]
    steps: Steps
    new_graph: NewGraph


def split(requests: Sequence[TraceRequest], n: int) -> list[list[TraceRequest]]:
    """About `n` segments whose first arrival is 0; one where requests come after others."""
    if any(request.after is not None for request in requests) or n == 1:
        return [list(requests)]
    ordered = sorted(requests, key=lambda r: r.arrival)
    size = -(-len(ordered) // n)
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [[replace(r, arrival=r.arrival - part[0].arrival) for r in part] for part in parts]


def steps_of(table: Trace, cost: CostModel, n_ubatch: int) -> Steps:
    """The computed steps of an engine's trace, beside the model's seconds. The trace begins while
    no sequence runs. It lacks two facts: the cells of sequences that sit a step out, and whether
    libllama cut a step into several (it does so for streams that are not adjacent)."""
    table = table[table["code"] == 0]
    rows, prompt = table["rows"], table["prefill_rows"]
    n_seqs = (table["ids"] > 0).sum(axis=1) + table["filled"]
    if not cost.unified:
        kv = own_cells(table)
    else:
        kv = table["kv_used"] - rows
        if cost.computes_masked:
            kv = np.maximum(kv, reaches(table))
    filled = table["prompt_filled"].sum(1)
    of_prompts = prompt + filled
    computed = rows + table["filled"] + filled
    shapes = zip(computed.tolist(), of_prompts.tolist(), kv.tolist(), n_seqs.tolist(), strict=True)
    model = np.array([cost.predict(*shape) for shape in shapes])
    regime = np.array([cost.regime_of(n) for n in computed.tolist()], dtype=np.int64)
    seconds = seconds_of(table)
    new = np.maximum(-(-rows // n_ubatch) - table["reused"], 0)
    fresh = new > 0
    behind = np.zeros(len(table), dtype=bool)
    for k in range(1, SETTLED):
        behind[k:] |= fresh[:-k]
    return Steps(rows, regime, prompt, new, behind & ~fresh, seconds, model)


def reaches(table: Trace) -> npt.NDArray[np.int64]:
    """`KvAccounting.reach` before each step, where no sequence starts from cached cells."""
    ids, counts = table["ids"], np.maximum(table["chunk"], 1)
    n_steps, n_slots = ids.shape
    ends = np.zeros(ids.shape, dtype=bool)  # the last step of the slot's sequence
    for slot in range(n_slots):
        at = ids[:, slot].nonzero()[0]
        ends[at[np.diff(ids[at, slot], append=0) != 0], slot] = True
    accounting = KvAccounting(2**31, n_slots)
    found = np.zeros(n_steps, dtype=np.int64)
    for i, here in enumerate(ids):
        found[i] = accounting.reach
        decodes = (here != 0) & (table["chunk"][i] == 0)
        accounting.take_each(decodes.nonzero()[0])
        for slot in ((here != 0) & ~decodes).nonzero()[0].tolist():
            accounting.take(slot, int(counts[i, slot]))
        for slot in ends[i].nonzero()[0].tolist():
            accounting.release(slot)
    return found


def own_cells(table: Trace) -> npt.NDArray[np.int64]:
    """Cells before each step of the sequences that have rows in it, where none starts from cached
    cells."""
    ids, counts = table["ids"], np.maximum(table["chunk"], 1)
    held, owner = np.zeros((2, ids.shape[1]), dtype=np.int64)
    found = np.zeros(len(table), dtype=np.int64)
    for i, here in enumerate(ids):
        on = here != 0
        held[on & (here != owner)] = 0
        owner[on] = here[on]
        found[i] = held[on].sum()
        held[on] += counts[i][on]
    return found


def ratios_of(
    table: Trace, cost: CostModel, n_ubatch: int
) -> tuple[tuple[float, ...], float, float]:
    """(decode, prompt, graph) of `Speed`: measured time over the model's.

    decode: from settled steps without a new graph; a regime with few such steps gets the ratio of
    all regimes. graph: from steps that decode with a new graph or behind one; 1 where none tell."""
    steps = steps_of(table, cost, n_ubatch)
    decodes = steps.prompt == 0
    old = decodes & (steps.new == 0)
    settled = old & ~steps.behind
    chosen = next(those for those in (settled, old, decodes) if those.any())
    ratio = steps.seconds / steps.model
    overall = _typical(ratio[chosen], steps.model[chosen])
    decode = [overall] * cost.n_regimes
    for i in range(cost.n_regimes):
        those = chosen & (steps.regime == i)
        if those.sum() >= _LEAST_STEPS:
            decode[i] = _typical(ratio[those], steps.model[those])
    speed = np.array(decode)[steps.regime] * steps.model
    extra = steps.reckoned(cost.new_graph) - steps.model
    unsettled, graph = decodes & (extra > 0.1 * speed), 1.0  # a smaller share is noise
    if unsettled.any() and settled.any():
        extra = extra[unsettled]
        more = np.minimum((steps.seconds - speed)[unsettled], 4 * extra)
        graph = max(0.0, float(more.sum() / extra.sum()))
    prompts = steps.prompt > 0
    ratio = (steps.seconds - graph * steps.new * cost.new_graph.step) / steps.model
    return tuple(decode), _typical(ratio[prompts], steps.model[prompts]), graph


class Validator:
    """Of one engine that has no other user. The engine needs a calibrated cost model and a trace
    that is long enough for a segment. Raises ArgumentError without a profile."""

    def __init__(self, engine: Engine, policy: str) -> None:
        if engine.cost is None or not engine.cost.calibrated:
            raise ArgumentError("engine", engine, "has no profile: run `pyllamabatch calibrate`")
        self.engine = engine
        self.policy = policy
        self._cost = copy.deepcopy(engine.cost)
        self._seed = 0
        self._lengths = np.array([_PROBE_PROMPT])  # of prompts
        self._n_runs = -1  # the newest native call that was looked at

    def spec(self) -> EngineSpec:
        """By the profile as it is."""
        return spec_of(self.engine, OVERHEAD, cost=self._cost)

    def run(
        self, segments: Sequence[Sequence[TraceRequest]], progress: Callable[[str], None] = print
    ) -> Validation:
        """The segments live, one after the other, and simulated."""
        self._lengths = np.array([r.n_prompt for segment in segments for r in segment])
        self.probe()  # an engine's first calls are slower
        speeds = [self.probe()]
        lived: list[list[Outcome]] = []
        came: list[list[TraceRequest]] = []
        refined: list[EngineSpec] = []
        tables: list[Trace] = []
        for i, segment in enumerate(segments, 1):
            self._new_steps()
            lived.append(run_live(self.engine, segment))
            came.append(_as_they_came(segment, lived[-1]))
            tables.append(self._new_steps())
            refined.append(spec_of(self.engine, 0.0))
            speeds.append(self.probe())
            progress(f"segment {i} of {len(segments)}: {_words(speeds[-1])}")
        around = [Speed.mean(pair) for pair in pairwise(speeds)]
        overall = Speed.mean(speeds)
        specs = {
            "profile": [self._spec(overall, self._cost)] * len(segments),
            AT_SPEED: [self._spec(s, self._at(s)) for s in around],
            "refined": [
                replace(m, overhead=s.overhead, latency=s.latency)
                for m, s in zip(refined, around, strict=True)
            ],
        }
        simulated = {
            name: [simulate(*pair, self.policy).outcomes for pair in zip(came, arm, strict=True)]
            for name, arm in specs.items()
        }
        pairs = zip(lived, simulated[AT_SPEED], strict=True)
        each = [(_figures([live]), _figures([found])) for live, found in pairs]
        steps = [
            steps_of(table, self._at(s), self.engine.n_ubatch)
            for table, s in zip(tables, around, strict=True)
        ]
        return Validation(
            live=_figures(lived),
            simulated={name: _figures(found) for name, found in simulated.items()},
            errors={name: [b[name] / a[name] - 1 for a, b in each] for name in COMPARED},
            speeds=speeds,
            steps=Steps(*map(np.concatenate, zip(*steps, strict=True))),
            new_graph=self._at(overall).new_graph,
        )

    def probe(self) -> Speed:
        """Requests alone, then a few at once and as many as can be, in turn, for
        `_PROBE_SECONDS`. Their lengths differ, so that they end one after the other."""
        began = perf_counter()
        waits: list[float] = []
        tables: list[Trace] = []
        n_seq_max = self.engine.n_seq_max
        while not tables or perf_counter() - began < _PROBE_SECONDS:
            for n in sorted({1, min(2, n_seq_max), -(-n_seq_max // 2), n_seq_max}):
                for _ in range(_N_ALONE if n == 1 else 1):
                    self._new_steps()
                    ttft = self._ask(n)
                    tables.append(self._new_steps())
                    if n == 1:
                        waits.append(_beside_steps(ttft[0], tables[-1]))
        table = np.concatenate(tables)
        changed = np.diff(table["run"], prepend=table["run"][:1]) > 0
        overhead = float(np.median(table["python_ns"][changed])) * 1e-9
        latency = max(0.0, median(waits) - overhead)
        ratios = ratios_of(table, self._cost, self.engine.n_ubatch)
        return Speed(*ratios, overhead, latency)

    def _ask(self, n: int) -> list[float]:
        """n requests at once, of random tokens; their times to the first token, s."""
        self._seed += 1
        generator = np.random.default_rng([self._seed, 1])
        limits, n_outputs = self.engine.limits, generator.integers(*_PROBE_OUTPUT, n, endpoint=True)
        each = min(limits.n_cells_seq, limits.n_cells // self.engine.n_seq_max)
        n_prompts = generator.choice(self._lengths, n).clip(1, max(1, each - _PROBE_OUTPUT[1] - 1))
        streams = [
            self.engine.submit(
                generator.integers(0, self.engine.model.n_vocab, int(n_prompt), dtype=np.int32),
                SamplingParams(max_tokens=int(n_output), ignore_eog=True, seed=1),
            )
            for n_prompt, n_output in zip(n_prompts, n_outputs, strict=True)
        ]
        found = [stream.result() for stream in streams]
        for result in found:
            if result.error is not None:
                raise result.error
        return [result.ttft_s or 0.0 for result in found]

    def _new_steps(self) -> Trace:
        """Steps since it was called last."""
        table = self.engine.trace()
        new = table[table["run"] > self._n_runs]
        if len(table):
            self._n_runs = int(table["run"][-1])
        return new

    def _spec(self, speed: Speed, cost: CostModel) -> EngineSpec:
        return spec_of(self.engine, speed.overhead, speed.latency, cost)

    def _at(self, speed: Speed) -> CostModel:
        return self._cost.at_speed(speed.decode, speed.prompt, speed.graph)


def _as_they_came(
    requests: Sequence[TraceRequest], outcomes: Iterable[Outcome]
) -> list[TraceRequest]:
    """With the times at which they were really submitted: a thread may wake up late."""
    at = {o.id: o.arrival for o in outcomes}
    return [r if r.after is not None else replace(r, arrival=at[r.id]) for r in requests]


def _beside_steps(ttft: float, table: Trace) -> float:
    """Seconds of a request's time to its first token that are none of its steps', nor between
    them."""
    first = table[: int(np.argmax(table["sampled"] > 0)) + 1]
    return float(ttft - seconds_of(first).sum() - first["python_ns"][1:].sum() * 1e-9)


def _typical(ratio: Array, weight: Array) -> float:
    """The mean, in which what holds the device up now and then counts as it does in a run; but no
    step for more than four times the median."""
    return float(np.average(np.minimum(ratio, 4.0 * np.median(ratio)), weights=weight))


def seconds_of(table: Trace) -> Array:
    total: Array = np.sum([table[name] for name in TIMES], axis=0) * 1e-9
    return total


def _figures(segments: Sequence[Sequence[Outcome]]) -> Figures:
    """Of segments as if they had followed each other without a pause."""
    outcomes: list[Outcome] = []
    end = 0.0
    for segment in segments:
        shift = end - min(o.arrival for o in segment)
        for o in segment:
            moved = replace(o, arrival=o.arrival + shift, first=o.first + shift, end=o.end + shift)
            outcomes.append(moved)
            end = max(end, moved.end)
    return summarise(outcomes, [], {})


def _words(speed: Speed) -> str:
    decode = " ".join(f"{x:.3f}" for x in speed.decode)
    return (
        f"steps take {decode} of the profile's, {speed.prompt:.3f} with prompts, new "
        f"graphs {speed.graph:.2f}; "
        f"{1e3 * speed.overhead:.2f} ms a call, {1e3 * speed.latency:.2f} ms to the reader"
    )


def kinds(found: Validation) -> dict[str, dict[str, float]]:
    """The live run's steps by kind: how many `steps`, mean `rows`, `share` of the time, and mean
    seconds, `measured` and by the `model` at the probes' speed, new graphs included."""
    steps = found.steps
    model = steps.reckoned(found.new_graph)
    chosen = {
        "decode": (steps.prompt == 0) & (steps.new == 0),
        "decode, new graph": (steps.prompt == 0) & (steps.new > 0),
        "with prompts": steps.prompt > 0,
    }
    return {
        name: {
            "steps": float(those.sum()),
            "rows": float(steps.rows[those].mean()),
            "share": float(steps.seconds[those].sum() / steps.seconds.sum()),
            "measured": float(steps.seconds[those].mean()),
            "model": float(model[those].mean()),
        }
        for name, those in chosen.items()
        if those.any()
    }
