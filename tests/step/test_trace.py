"""The step trace: a ring that keeps the last steps, sums that agree with the counters, and JSON
that Perfetto and Chrome read."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.model import Model
from pyllamabatch.step.ring_reader import CLOCK_OFFSET, PHASES, StepTable
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import STEP_DTYPE
from pyllamabatch.step.trace import Prompt, StepTrace, Trace, to_chrome

PROMPTS = [[1, *range(20, 25 + 3 * i)] for i in range(5)]


def small(model: Model, **options: Any) -> Engine:
    sizes: dict[str, Any] = {"n_seq_max": 4, "n_ctx": 512, "n_threads": 1, "speculate": None}
    return Engine(model, **{**sizes, **options})  # without drafts, so that rows can be counted


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eog=True)


def phases(trace: Trace) -> Any:
    return np.sum([trace[f"{name}_ns"] for name in PHASES], axis=0)


def native(first_ns: int, n: int, n_reused: int = 0) -> Trace:
    steps = np.zeros(n, STEP_DTYPE)
    steps["t_start_ns"] = first_ns + 110 * np.arange(n)
    steps["build_ns"], steps["decode_ns"], steps["sync_ns"], steps["sample_ns"] = 5, 60, 20, 15
    steps["n_results"] = 2
    steps["n_reused"] = n_reused + np.arange(n)
    return steps


class Recorder:
    """A trace, and how many steps it has been told of."""

    def __init__(self, capacity: int, n_seq_max: int) -> None:
        self.made = StepTrace(capacity, n_seq_max)
        self.n = 0

    def begin(
        self,
        kv_used: int,
        slots: Sequence[int],
        prompts: Sequence[Prompt] = (),
        first: int | None = None,
    ) -> None:
        n_rows = len(slots) + sum(n for _, _, n, _ in prompts)
        number = self.n if first is None else first
        self.made.begin(number, n_rows, kv_used, np.array(slots, np.int32), prompts)

    def record(
        self, kv_used: int, slots: Sequence[int], table: Trace, prompts: Sequence[Prompt] = ()
    ) -> None:
        """One call, its steps on a page of their own."""
        self.begin(kv_used, slots, prompts)
        steps = StepTable(len(table))
        self.made.add_steps(steps)
        steps.table[:], steps.n = table, len(table)
        self.n += len(table)

    def table(self) -> Trace:
        return self.made.snapshot()()


def test_the_record_of_a_step_and_of_a_run() -> None:
    recorder = Recorder(16, 4)
    made = recorder.made
    made.ids[:] = (7, 0, 9, 8)
    made.idle_ns = 5000
    recorder.record(30, [0, 3], native(1000, 1, 1), prompts=[(2, 9, 6, 0)])
    made.idle_ns = 300
    recorder.record(38, [3, 2], native(2000, 3, 2))
    trace = recorder.table()
    assert trace["rows"].tolist() == [8, 2, 2, 2]
    assert trace["prefill_rows"].tolist() == [6, 0, 0, 0]
    assert trace["decode_rows"].tolist() == [2, 2, 2, 2]
    assert trace["kv_used"].tolist() == [38, 40, 42, 44]
    assert trace["run"].tolist() == [0, 1, 1, 1]
    assert trace["reused"].tolist() == [1, 1, 1, 1]
    assert trace["code"].tolist() == [0, 0, 0, 0]
    assert trace["ids"].tolist() == [[7, 0, 9, 8], *[[0, 0, 9, 8]] * 3]
    assert trace["chunk"].tolist() == [[0, 0, 6, 0], *[[0] * 4] * 3]
    assert trace["python_ns"].tolist() == [0, 900 - 300, 10, 10]
    assert phases(trace).tolist() == [100] * 4
    end = trace["t_start_ns"][-1] + 100
    assert phases(trace).sum() + trace["python_ns"].sum() + 300 == end - trace["t_start_ns"][0]


def test_rows_that_fill_up_prompts_are_told_apart() -> None:
    recorder = Recorder(16, 4)
    recorder.begin(30, [0, 3], [(1, 9, 6, 0), (2, 8, 4, 2)])
    steps = StepTable(1)
    recorder.made.add_steps(steps)
    steps.table[:], steps.n = native(1000, 1), 1
    recorder.n += 1
    recorder.record(42, [0, 3], native(2000, 2))
    trace = recorder.table()
    assert trace["prompt_filled"].tolist() == [[0, 0, 2, 0], [0] * 4, [0] * 4]
    assert trace["filled"].tolist() == [0, 0, 0]
    assert trace["rows"].tolist() == [12, 2, 2]
    assert trace["prefill_rows"].tolist() == [10, 0, 0]


def test_a_step_that_failed_is_there_and_took_no_cells() -> None:
    recorder = Recorder(16, 4)
    steps = native(1000, 3)
    steps["code"][2], steps["n_results"][2] = -3, 0
    recorder.record(10, [0, 1], steps)
    recorder.made.idle_ns = 40
    recorder.begin(7, [2])  # a call that came to nothing: no step of its own
    recorder.made.idle_ns = 2
    recorder.record(7, [2], native(2000, 1, 3))
    trace = recorder.table()
    assert trace["code"].tolist() == [0, 0, -3, 0]
    assert trace["rows"].tolist() == [2, 2, 2, 1]
    assert trace["kv_used"].tolist() == [12, 14, 14, 8]
    assert trace["sampled"].tolist() == [2, 2, 0, 2]
    assert trace["python_ns"].tolist() == [0, 10, 10, 2000 - 1320 - 42]


@pytest.mark.parametrize("sizes", [[1] * 20, [3] * 9, [8, 8], [5, 30], [40], [7, 1, 8, 2]])
def test_the_ring_keeps_the_last_ones_in_order(sizes: list[int]) -> None:
    recorder = Recorder(8, 2)
    for size in sizes:
        n = recorder.n
        recorder.record(n, [0], native(1000 + 110 * n, size, n))
    trace, n = recorder.table(), recorder.n
    first = max(0, n - 8)
    assert trace["kv_used"].tolist() == list(range(first + 1, n + 1))
    assert (np.diff(trace["t_start_ns"]) == 110).all()
    assert trace["python_ns"].tolist() == [0 if first == 0 else 10, *[10] * (len(trace) - 1)]
    assert trace["reused"].tolist() == [0 if first == 0 else 1, *[1] * (len(trace) - 1)]


def test_what_is_computed_but_not_delivered_yet_is_not_there_yet() -> None:
    recorder = Recorder(8, 2)
    recorder.made.add_steps(StepTable(4))
    assert len(recorder.table()) == 0
    recorder.record(0, [0], native(1000, 6))
    for first in (6, 9, 12):
        recorder.begin(6, [0, 1], first=first)
    assert recorder.table()["rows"].tolist() == [1] * 6


@pytest.mark.parametrize(
    ("options", "n_tokens"),
    [({}, 12), ({"n_batch": 8, "n_ubatch": 8}, 12), ({"n_ctx": 256}, 100)],
    ids=str,
)
def test_its_sums_are_the_engines_counters(
    model: Model, options: dict[str, Any], n_tokens: int
) -> None:
    with small(model, **options) as engine:
        assert len(engine.trace()) == 0
        with engine._core.state:  # all of them meet
            streams = [engine.submit(prompt, greedy(n_tokens)) for prompt in PROMPTS]
        for stream in streams:
            stream.result(30)
        engine.generate(PROMPTS[:2], greedy(3))
        trace, stats = engine.trace(), engine.stats()
    assert len(trace) == stats.steps
    for name in ("rows", "prefill_rows", "decode_rows"):
        assert trace[name].sum() == getattr(stats, name)
    assert trace["reused"].sum() == stats.graphs_reused > 0
    assert not trace["code"].any()
    assert trace["sampled"].sum() == stats.tokens
    assert (trace["rows"] == trace["prefill_rows"] + trace["decode_rows"]).all()
    assert (trace["chunk"].sum(axis=1) == trace["prefill_rows"]).all()
    decoding = (trace["ids"] > 0) & (trace["chunk"] == 0)
    assert (decoding.sum(axis=1) <= trace["decode_rows"]).all()
    assert (trace["decode_rows"] == trace["sampled"]).all()
    assert 0 < trace["kv_used"].max() <= stats.kv_total
    for i, stream in enumerate(streams):
        of_it = trace["ids"] == stream.id
        prompt_rows, decodes = trace["chunk"][of_it].sum(), (of_it & decoding).sum()
        if stats.preemptions == 0:
            assert prompt_rows == len(PROMPTS[i]) - 1
            assert decodes in (n_tokens - 1, n_tokens)  # the first one behind its chunk
        assert prompt_rows + decodes >= len(PROMPTS[i]) + n_tokens - 2
    assert (stats.preemptions > 0) == ("n_ctx" in options)
    preempted = [text for why in trace["reasons"] for text in why.values() if "preempted" in text]
    assert bool(preempted) == (stats.preemptions > 0)
    # times: nothing overlaps, nothing is counted twice
    end = trace["t_start_ns"] + phases(trace)
    gaps = trace["t_start_ns"][1:] - end[:-1]
    assert (gaps >= 0).all()
    assert (trace["python_ns"] >= 0).all()
    assert (trace["python_ns"][1:] <= gaps).all()
    assert trace["python_ns"][0] == 0
    same_run = np.diff(trace["run"]) == 0
    assert (trace["python_ns"][1:][same_run] == gaps[same_run]).all()
    assert same_run.any()


def test_a_trace_of_some_length_and_of_none(model: Model) -> None:
    with small(model, n_trace=10) as engine:
        engine.generate(PROMPTS, greedy())
        trace, stats = engine.trace(), engine.stats()
        assert len(trace) == 10
        assert stats.steps > 10
        before = trace.copy()
        engine.generate(PROMPTS[:1], greedy())
        assert (trace == before).all()  # a copy
    with small(model, n_trace=0) as engine:
        engine.generate(PROMPTS[:1], greedy())
        assert engine.trace().shape == (0,)
    with pytest.raises(ArgumentError, match="n_trace"):
        small(model, n_trace=-1)


def test_chrome_json(model: Model, tmp_path: Path) -> None:
    with small(model) as engine:
        streams = [engine.submit(prompt, greedy()) for prompt in PROMPTS]
        for stream in streams:
            stream.result(30)
        trace = engine.trace()
    path = tmp_path / "trace.json"
    to_chrome(trace, path)
    read = json.loads(path.read_text())
    assert set(read) == {"traceEvents", "displayTimeUnit"}
    events = read["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    for event in events:
        assert {"ph", "pid", "tid", "name"} <= set(event)
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] != "M":
            assert event["ts"] >= 0
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(1, 1): "steps", **{(2, s.id): f"request {s.id}" for s in streams}}

    steps = [e for e in events if e["name"] == "step"]
    assert len(steps) == len(trace)
    for name in ("rows", "prefill_rows", "decode_rows", "sampled", "kv_used"):
        assert sum(step["args"][name] for step in steps) == trace[name].sum()
    for phase in PHASES:
        inner = [e for e in events if e["name"] == phase and e["pid"] == 1]
        assert sum(e["dur"] for e in inner) == pytest.approx(trace[f"{phase}_ns"].sum() / 1e3)
        for outer, e in zip(steps, inner, strict=True):
            assert outer["ts"] <= e["ts"] + 1e-3
            assert e["ts"] + e["dur"] <= outer["ts"] + outer["dur"] + 1e-3
    cells = [e["args"]["used"] for e in events if e["ph"] == "C"]
    assert cells == trace["kv_used"].tolist()

    on_tracks = [e for e in events if e["ph"] == "X" and e["pid"] == 2]
    assert len(on_tracks) == (trace["ids"] > 0).sum()
    decodes = Counter(e["tid"] for e in on_tracks if e["name"] == "decode")
    assert decodes == {stream.id: 12 - 1 for stream in streams}
    for stream, prompt in zip(streams, PROMPTS, strict=True):
        chunks = [e["name"] for e in on_tracks if e["tid"] == stream.id and e["name"] != "decode"]
        assert sum(int(name.removeprefix("prefill ")) for name in chunks) == len(prompt) - 1
    reasons = [step["args"].get("reasons", {}) for step in steps]
    for stream in streams:
        (admitted,) = [
            why[f"request {stream.id}"] for why in reasons if f"request {stream.id}" in why
        ]
        assert admitted.startswith("admitted with ")
    for e in on_tracks:
        outer = steps[e["args"]["step"]]
        assert (e["ts"], e["dur"]) == (outer["ts"], pytest.approx(outer["dur"]))


def test_an_empty_trace_is_a_file_too(model: Model, tmp_path: Path) -> None:
    with small(model) as engine:
        to_chrome(engine.trace(), tmp_path / "empty.json")
    events = json.loads((tmp_path / "empty.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M"}


def test_steps_are_timed_by_the_clock_that_requests_have() -> None:
    """Also on a Mac that has slept since it was started: else first tokens of all that come after
    were that much later than their requests."""
    assert abs(CLOCK_OFFSET) < 0.1
