"""Figures of many requests."""

from dataclasses import replace

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.scheduler import Counters
from pyllamabatch.sim import Histogram, Load, Outcome, parse_slo, summarise

A = Outcome(1, 0.0, 10, 5, admitted=1.0, first=2.0, end=6.0, preemption=0.5, longest_itl=3.0)
B = Outcome(2, 1.0, 20, 1, admitted=1.0, first=4.0, end=4.0)


def test_times_and_targets_of_a_request() -> None:
    assert (A.ttft, A.tpot, A.e2el) == (2.0, 1.0, 6.0)
    assert (A.queueing, A.preemption, A.execution) == (1.0, 0.5, 4.5)
    assert B.tpot is None
    assert not replace(B, deadline=True).keeps({"e2el": 9.0})
    assert A.keeps({"ttft": 2.0, "tpot": 1.0, "itl": 3.0, "e2el": 6.0})
    for name, limit in (("ttft", 1.9), ("tpot", 0.9), ("itl", 2.9), ("e2el", 5.9)):
        assert not A.keeps({name: limit})
    assert B.keeps({"tpot": 0.1, "itl": 0.1})
    assert parse_slo("ttft=0.5, itl=50ms,e2el=2s") == {"ttft": 0.5, "itl": 0.05, "e2el": 2.0}
    assert parse_slo("") == {}
    for text in ("ttft", "ttft=0", "ttft=-1", "speed=3", "itl=fast", "ttft=1,,itl=2", "ttft=nan"):
        with pytest.raises(ArgumentError, match="slo"):
            parse_slo(text)


def test_a_summary() -> None:
    counters = Counters(steps=4, rows=16, known_tokens=30, prefix_tokens=15)
    load = Load(50, seconds=4.0, kv_peak=25, counters=counters)
    load.itl.add(np.array([1.0, 3.0]), 2)
    rejected = Outcome(3, 0.0, 10**6, 5, rejected=True)
    found = summarise([A, B, rejected], [load], {"ttft": 2.5})
    assert found["goodput_per_s"] == pytest.approx(1 / 6)
    assert found["busy"] == pytest.approx(4 / 6)
    exact = {
        "requests": 2, "rejected": 1, "duration": 6.0, "tokens_per_s": 1.0, "slo_share": 0.5,
        "ttft_mean": 2.5, "ttft_p50": 2.5, "tpot_p99": 1.0, "itl_mean": 2.0, "rows_mean": 4.0,
        "kv_peak": 0.5, "prefix_share": 0.5, "overloaded": False,
    }  # fmt: skip
    assert {name: found[name] for name in exact} == exact
    assert summarise([rejected], [load], {}) == {
        "requests": 0, "rejected": 1, "deadlines": 0, "preemptions": 0,
    }  # fmt: skip


def test_percentiles_of_bins_are_within_their_width() -> None:
    values = np.random.default_rng(0).lognormal(-4, 1, 200_000)
    histogram, other = Histogram(), Histogram()
    for part in np.array_split(values[:150_000], 1000):
        histogram.add(part)
    other.add(values[150_000:])
    histogram.merge(other)
    assert histogram.n == len(values)
    assert histogram.mean == pytest.approx(values.mean())
    for p in (1, 50, 90, 99, 99.9):
        assert histogram.percentile(p) == pytest.approx(np.percentile(values, p), rel=0.005)


def test_bins_take_any_time() -> None:
    histogram = Histogram()
    assert (histogram.mean, histogram.percentile(50)) == (0.0, 0.0)
    histogram.add(np.array([0.0, 1e-9, 1e9]), 3)
    assert histogram.n == 9
    assert histogram.percentile(1) == pytest.approx(1e-6, rel=0.01)
    assert histogram.percentile(99) == pytest.approx(86400, rel=0.01)
