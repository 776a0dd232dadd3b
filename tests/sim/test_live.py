"""The simulator does what the engine does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.scheduler import make_policy
from pyllamabatch.sim import draw, load_trace, simulate, summarise
from pyllamabatch.sim.live import COMPARED, comparison, machine_of, run_live


@pytest.mark.parametrize("policy", ["sarathi", "fcfs", "static", "prefill-first"])
@pytest.mark.parametrize("unified", [True, False])
def test_the_same_steps(policy: str, unified: bool) -> None:
    """All requests at once: whatever steps take, an engine and a simulation make the same ones."""
    requests = [
        replace(request, arrival=0.0, id=i + 1)
        for i, request in enumerate(draw("poisson:rate=1,n=12,prompt=5-120,output=1-30", 1))
    ]
    with (
        Model.default() as model,
        Engine(
            model,
            n_seq_max=4,
            n_ctx=4 * 512,
            n_batch=64,
            n_ubatch=32,
            kv_unified=unified,
            policy=make_policy(policy),
            n_threads=1,
            n_threads_batch=1,
        ) as engine,
    ):
        machine = machine_of(engine, 0.0)
        results = engine.generate(
            [request.tokens().tolist() for request in requests],
            [SamplingParams(max_tokens=r.n_output, ignore_eog=True) for r in requests],
        )
        stats = engine.stats()
    assert [r.n_generated for r in results] == [r.n_output for r in requests]
    run = simulate(requests, machine, policy)
    (load,) = run.loads
    assert sum(load.rows.values()) == stats.steps
    assert sum(n * k for n, k in load.rows.items()) == stats.rows
    assert load.prefill_rows == stats.prefill_rows
    assert sum(o.preemptions for o in run.outcomes) == stats.preemptions


def test_a_trace_in_real_time() -> None:
    requests = draw("closed:clients=3,n=9,prompt=5-40,output=1-8,prefix=20", 0)
    with (
        Model.default() as model,
        Engine(model, n_seq_max=4, n_ctx=1024, n_threads=1, n_threads_batch=1) as engine,
    ):
        machine = machine_of(engine, 0.0)
        outcomes = run_live(engine, requests)
    assert [(o.id, o.n_prompt, o.n_output) for o in outcomes] == [
        (r.id, r.n_prompt, r.n_output) for r in requests
    ]
    ends = {o.id: o.end for o in outcomes}
    for request, outcome in zip(requests, outcomes, strict=True):
        assert outcome.arrival < outcome.first <= outcome.end
        if request.after is not None:
            assert outcome.arrival >= ends[request.after]
    live = summarise(outcomes, [], {})
    simulated = simulate(requests, machine).summary()
    head, *lines = comparison(live, {"profile": simulated, "the same": live}).splitlines()
    assert head == "| | live | profile | error | the same | error |"
    assert len(lines) == 1 + len(COMPARED)
    assert all(line.endswith("| +0.0% |") for line in lines[1:])


def test_what_a_request_fails_with_is_raised() -> None:
    requests = load_trace("closed:clients=1,n=2,prompt=5000,output=5")
    with (
        Model.default() as model,
        Engine(model, n_seq_max=2, n_ctx=512, n_threads=1, n_threads_batch=1) as engine,
        pytest.raises(ValueError, match="5000 tokens"),
    ):
        run_live(engine, requests)
