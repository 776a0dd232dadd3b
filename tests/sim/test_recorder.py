"""The steps of a simulated engine: a trace like a live one's, which agrees with the counters."""

from typing import Any

import numpy as np
import pytest

from pyllamabatch.server import live
from pyllamabatch.sim import simulate
from tests.sim.test_simulate import machine, one
from tests.support.speculating import always


@pytest.mark.parametrize("unified", [True, False], ids=["pool", "streams"])
@pytest.mark.parametrize("speculate", [True, False])
def test_the_trace_agrees_with_the_counters(unified: bool, speculate: bool) -> None:
    """Seven requests in four slots, which end at different times; the cells do for some only."""
    acceptance = 0.7 if speculate else None
    lengths = enumerate((150, 20, 110, 30, 40, 25, 110))
    requests = [one(i, 0.05 * i, 40, n, acceptance=acceptance) for i, n in lengths]
    requests.append(one(7, 30.0, 10, 5))
    cells = 260 if unified else 1024
    how: dict[str, Any] = {"unified": unified, "speculate": speculate, "prefix_cache": False}
    spec = machine(n_cells=cells, overhead=0.001, **how)
    policy = (lambda: always(4, 8)) if speculate else "sarathi"
    run = simulate(requests, spec, policy, n_trace=10_000)
    (trace,), counters = run.traces, run.loads[0].counters
    assert len(trace) == counters.steps
    assert trace["prefill_rows"].sum() == counters.prefill_rows
    assert trace["sampled"].sum() == counters.tokens
    assert trace["drafted"].sum() == counters.drafted_tokens
    assert trace["accepted"].sum() == counters.accepted_tokens
    assert (counters.accepted_tokens > 0) == speculate
    rows = trace["rows"] + (trace["filled"] if speculate else 0)
    assert rows.sum() == counters.rows
    assert (trace["filled"].sum() > 0) == (not unified)
    assert sum(map(len, trace["preempted"].tolist())) == counters.preemptions
    assert (counters.preemptions > 0) == unified
    assert trace["kv_used"].max() == run.loads[0].kv_peak
    assert {*np.unique(trace["ids"]).tolist()} == {*range(9)}
    n_calls = len(np.unique(trace["run"]))
    seconds = trace["decode_ns"].sum() * 1e-9
    assert run.loads[0].seconds == pytest.approx(seconds + 0.001 * n_calls)
    assert trace["python_ns"].sum() * 1e-9 == pytest.approx(0.001 * (n_calls - 1))
    end = (trace["t_start_ns"][-1] + trace["decode_ns"][-1]) * 1e-9
    assert end == pytest.approx(max(o.end for o in run.outcomes))
    for step in live.steps_of(trace):
        slots = [slot for slot, *_ in step["lanes"]]
        assert len({*slots}) == len(slots)
        assert bool(step["padded"]) == (step["filled"] > 0)
    assert simulate(requests, spec, policy).traces == ()


def test_a_replica_without_a_step_has_a_trace_without_one() -> None:
    run = simulate([one(1, 0.0, 10, 5)], machine(), n_replicas=2, n_trace=100)
    assert [len(trace) for trace in run.traces] == [5, 0]
    run = simulate([one(1, 0.0, 5000, 5)], machine(), n_trace=100)
    assert [o.rejected for o in run.outcomes] == [True]
    assert [len(trace) for trace in run.traces] == [0]


def test_the_last_steps() -> None:
    run = simulate([one(1, 0.0, 10, 5000)], machine(n_cells=8192), n_trace=100)
    (trace,) = run.traces
    assert len(trace) == 100
    assert trace["kv_used"][-1] == 10 + 5000 - 1
