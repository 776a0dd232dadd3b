"""The simulator does what the engine does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.cost.kernels import Kernels, Regime
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import Key, Profile, Sample
from pyllamabatch.cost.step_cost import NewGraph
from pyllamabatch.errors import ArgumentError
from pyllamabatch.scheduler import Plan, SequenceView, StepView, fcfs, make_policy
from pyllamabatch.sim import EngineSpec, at_load, draw, load_trace, simulate, summarise
from tests.support.made_up_costs import Linear
from tools.live import run_live, spec_of
from tools.validation import Validator, split


def engine_on(model: Model, **options: Any) -> Engine:
    sizes: dict[str, Any] = {"n_seq_max": 4, "n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1}
    return Engine(model, **{**sizes, **options})


@pytest.mark.parametrize("policy", ["sarathi:budget=48", "fcfs", "static", "prefill-first"])
@pytest.mark.parametrize("unified", [True, False])
def test_the_same_steps(embedded_model: Model, policy: str, unified: bool) -> None:
    """All requests at once: whatever steps take, an engine and a simulation make the same ones."""
    requests = [
        replace(request, arrival=0.0, id=i + 1)
        for i, request in enumerate(draw("poisson:rate=1,n=12,prompt=5-120,output=1-30", 1))
    ]
    sizes: dict[str, Any] = {"n_ctx": 4 * 512, "n_batch": 64, "n_ubatch": 32}
    with engine_on(
        embedded_model, **sizes, kv_unified=unified, policy=make_policy(policy)
    ) as engine:
        machine = spec_of(engine, 0.0)
        results = engine.generate(
            [request.tokens().tolist() for request in requests],
            [SamplingParams(max_tokens=r.n_output, ignore_eog=True) for r in requests],
        )
        stats = engine.stats()
    assert [r.n_generated for r in results] == [r.n_output for r in requests]
    run = simulate(requests, machine, policy)
    counters = run.loads[0].counters
    assert (counters.steps, counters.rows) == (stats.steps, stats.rows)
    assert counters.prefill_rows == stats.prefill_rows
    assert sum(o.preemptions for o in run.outcomes) == stats.preemptions


@pytest.mark.parametrize(
    "options",
    [
        {"kv_unified": True, "preemption": "swap"},
        {"kv_unified": True, "preemption": "recompute"},
        {"batch_invariant": True, "n_ctx": 4 * 256, "policy": "mlfq"},
    ],
    ids=["swap", "recompute", "invariant"],
)
def test_the_same_steps_where_some_are_preempted(
    embedded_model: Model, options: dict[str, Any]
) -> None:
    requests = [
        replace(request, arrival=0.0, id=i + 1)
        for i, request in enumerate(draw("poisson:rate=1,n=8,prompt=5-120,output=30-90", 0))
    ]
    more: dict[str, Any] = {"n_ctx": 256, "n_batch": 128, "prefix_cache": False, "speculate": None}
    cost = Linear(0.01, 0.001, new_graph=NewGraph(10.0))  # longer than any that is measured
    more |= {"policy": "fcfs", "cost": cost, **options}
    with engine_on(embedded_model, **more) as engine:
        machine = spec_of(engine, 0.0)
        engine.generate(
            [request.tokens().tolist() for request in requests],
            [SamplingParams(max_tokens=r.n_output, ignore_eog=True) for r in requests],
        )
        counters, live = engine._core.scheduler.counters, engine.trace()
    assert counters.preemptions > 2
    assert (counters.loaded_tokens > 0) == (options.get("preemption") != "recompute")
    run = simulate(requests, machine, more["policy"], n_trace=len(live))
    assert run.loads[0].counters == counters
    (steps,) = run.traces
    ids = np.where(steps["ids"] > 0, steps["ids"] - 1, 0)  # a request's id + 1
    assert np.array_equal(ids, live["ids"])
    for name in ("rows", "prefill_rows", "sampled", "chunk"):
        assert np.array_equal(steps[name], live[name]), name


def test_a_trace_in_real_time(embedded_model: Model) -> None:
    requests = draw("closed:clients=3,n=9,prompt=5-40,output=1-8,prefix=20", 0)
    with engine_on(embedded_model) as engine:
        machine = spec_of(engine, 0.0)
        outcomes = run_live(engine, requests)
    assert [(o.id, o.n_prompt, o.n_output) for o in outcomes] == [
        (r.id, r.n_prompt, r.n_output) for r in requests
    ]
    ends = {o.id: o.end for o in outcomes}
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.arrival < outcome.first <= outcome.end
        if request.after is not None:
            assert outcome.arrival >= ends[request.after]
    assert summarise(outcomes, [], {})["requests"] == 9
    assert simulate(requests, machine).summary()["requests"] == 9


def test_a_live_request_has_what_the_trace_says_of_it(embedded_model: Model) -> None:
    """The second one has no slot before its deadline, which comes at once, and the third one begins
    with the answer that it has not got."""
    first, second = draw("poisson:rate=1,n=2,prompt=20,output=5", 0)
    more: dict[str, Any] = {"arrival": 0.0, "tenant": "red", "ttft_target": 0.5, "itl_target": 0.1}
    third = replace(
        second, id=9, arrival=0.0, n_prompt=5, content=((second.answer, 5),), after=second.id
    )
    requests = [replace(first, priority=1, **more), replace(second, deadline=0.0, **more), third]
    seen: dict[int, SequenceView] = {}

    class Looking:
        def plan(self, view: StepView) -> Plan:
            seen.update({seq.priority: seq for seq in view.running})
            return fcfs().plan(view)

    with engine_on(embedded_model, n_seq_max=1, policy=Looking(), speculate=None) as engine:
        done, late, after = run_live(engine, requests)
    assert (done.n_output, done.deadline, done.tenant) == (5, False, "red")
    assert (late.n_output, late.ttft, late.deadline) == (0, None, True)
    assert (after.n_prompt, after.n_output) == (5, 5)
    one = seen[1]
    assert (one.tenant, one.ttft_target, one.itl_target) == ("red", 0.5, 0.1)


def test_a_validation(embedded_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a cost model that says twice what steps take: the probes find it out. The steps are made,
    but take what a device is said to take: this one's pace depends on who else uses it."""
    monkeypatch.setattr("tools.validation._PROBE_SECONDS", 0.1)
    monkeypatch.setattr("tools.validation.seconds_of", lambda table: seconds(1.0, table["rows"]))
    requests = draw("poisson:rate=40,n=8,prompt=5-40,output=2-8", 0)
    with engine_on(embedded_model, prefix_cache=False, cost=slow(2.0)) as engine:
        validator = Validator(engine, "sarathi")
        found = validator.run(split(requests, 2), lambda text: None)
    assert found.live["requests"] == 8
    assert {f["requests"] for f in found.simulated.values()} == {8}
    assert all(len(errors) == 2 for errors in found.errors.values())
    assert len(found.speeds) == 3
    for speed in found.speeds:
        assert (*speed.decode, speed.prompt) == pytest.approx((0.5, 0.5), rel=0.02)
    assert (found.steps.rows >= found.steps.prompt).all()
    assert found.steps.prompt.sum() == sum(r.n_prompt - 1 for r in requests)
    assert (found.steps.new[found.steps.prompt > 0] > 0).any()


def seconds(factor: float, rows: Any) -> Any:
    """Of a step: 1 ms, and 0.1 ms a row, times `factor`."""
    return factor * (1e-3 + 1e-4 * rows)


def slow(factor: float) -> CostModel:
    samples = [
        Sample(n, prefill, 0, n - prefill or 1, True, seconds(factor, n))
        for n in range(1, 65)
        for prefill in (0, n)
    ]
    kernels = Kernels((Regime(1),))
    return CostModel.fit(Profile(Key("made up", "CPU", ""), kernels, tuple(samples), 512))


def test_segments_and_loads() -> None:
    requests = draw("poisson:rate=3,n=10,prompt=20,output=4", 0)
    parts = split(requests, 3)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert [part[0].arrival for part in parts] == [0.0] * 3
    gaps = np.diff([r.arrival for r in requests])
    assert np.allclose(np.diff([r.arrival for r in parts[1]]), gaps[4:7])
    talks = draw("closed:clients=2,n=6,prompt=5,output=2", 0)
    assert split(talks, 3) == [talks]

    machine = EngineSpec.of(slow(1.0), n_seq_max=2, overhead=0.0)
    capacity = simulate([replace(r, arrival=0.0) for r in requests], machine).summary()[
        "requests_per_s"
    ]
    half = at_load(requests, machine, "sarathi", 0.5)
    assert 9 / half[-1].arrival == pytest.approx(0.5 * capacity)
    twice = at_load(requests, machine, "sarathi", 0.5, n_replicas=2)
    assert twice[-1].arrival < 0.7 * half[-1].arrival
    too_long = [replace(r, n_prompt=10**6, content=((0, 10**6),)) for r in requests]
    for load, trace in ((0.0, requests), (0.5, talks), (0.5, too_long)):
        with pytest.raises(ArgumentError, match="load"):
            at_load(trace, machine, "sarathi", load)


def test_what_a_request_fails_with_is_raised(embedded_model: Model) -> None:
    requests = load_trace("closed:clients=1,n=2,prompt=5000,output=5")
    with (
        engine_on(embedded_model, n_ctx=512) as engine,
        pytest.raises(ValueError, match="5000 tokens"),
    ):
        run_live(engine, requests)
