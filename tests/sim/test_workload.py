"""Workloads that are drawn."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.kv.radix_tree import n_common
from pyllamabatch.sim import TraceRequest, draw, load_trace
from pyllamabatch.sim.workload import draw_lengths


def test_the_same_seed_draws_the_same() -> None:
    spec = "gamma:rate=3,cv=4,n=50,prompt=20-90,output=30~0.5,prefix=10,prefixes=2"
    assert draw(spec, 1) == draw(spec, 1)
    assert draw(spec, 1) != draw(spec, 2)


@pytest.mark.parametrize(
    ("spec", "cv"), [("poisson:rate=5", 1.0), ("gamma:rate=5,cv=3", 3.0), ("gamma:rate=5", 2.0)]
)
def test_arrivals_have_their_rate_and_their_burstiness(spec: str, cv: float) -> None:
    times = np.array([r.arrival for r in draw(f"{spec},n=100000", 4)])
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_a_closed_loop() -> None:
    found = draw("closed:clients=3,n=8,think=2", 0)
    assert [r.after for r in found] == [None, None, None, 0, 1, 2, 3, 4]
    assert [r.arrival for r in found[:3]] == [0.0, 0.0, 0.0]
    assert all(r.arrival > 0 for r in found[3:])


def test_lengths() -> None:
    rng = np.random.default_rng(0)
    assert set(draw_lengths("7", rng, 9)) == {7}
    assert set(draw_lengths("3-5", rng, 200)) == {3, 4, 5}
    drawn = draw_lengths("400~0.7", rng, 100_000)
    assert np.median(drawn) == pytest.approx(400, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(0.7, rel=0.02)


def test_some_begin_in_the_same_way() -> None:
    found = draw("poisson:rate=1,n=40,prompt=50,prefix=30,prefixes=2", 0)
    common = {n_common(a.tokens(), b.tokens()) for a in found for b in found if a is not b}
    assert common == {0, 30}
    (short,) = draw("poisson:rate=1,n=1,prompt=5,prefix=30", 0)
    assert short.n_prompt == 5


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("poisson", "needs rate"),
        ("poison:rate=1", "one of poisson, gamma, closed"),
        ("poisson:rate=x", "a number"),
        ("poisson:rate=0", "rate"),
        ("poisson:rate=1,speed=2", "no option 'speed'"),
        ("poisson:rate=1,seed=2", "no option 'seed'"),
        ("poisson:rate=1,n=0", "n=0"),
        ("poisson:rate=1,prompt=0", "prompt='0'"),
        ("poisson:rate=1,output=9-3", "output='9-3'"),
        ("poisson:rate=1,prompt=many", "prompt='many'"),
        ("poisson:rate=1,prompt=1-99999999999999999999", "prompt='1-9"),
        ("poisson:rate=1,prefix=-1", "prefix"),
        ("poisson:rate=1,prefix=5,prefixes=0", "prefixes"),
        ("gamma:rate=1,cv=0", "cv"),
        ("closed:clients=0", "clients"),
        ("closed:clients=2,think=-1", "think"),
    ],
)
def test_what_is_wrong_is_said(spec: str, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        draw(spec, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"arrival": float("nan")}, {"arrival": float("inf")}, {"arrival": -1.0}, {"n_prompt": 0},
        {"n_output": 0}, {"n_prompt": 5.0}, {"content": ((0, 20),)}, {"max_tokens": 4},
        {"id": -1}, {"id": "a"}, {"max_tokens": -1}, {"deadline": -1.0},
        {"itl_target": float("nan")}, {"acceptance": 2.0},
    ],
)  # fmt: skip
def test_what_is_no_request(wrong: dict[str, Any]) -> None:
    """An arrival that is no number was simulated for ever."""
    (name,) = wrong
    with pytest.raises(ArgumentError, match=f"^{name}="):
        replace(TraceRequest(1, 0.0, 5, 9, ((0, 5),), 1), **wrong)


def test_a_drawn_trace_has_its_rate_already() -> None:
    assert len(load_trace("closed:clients=2,n=9", n=4)) == 4
    with pytest.raises(ArgumentError, match="rate"):
        load_trace("closed:clients=2", rate=3.0)
    with pytest.raises(ArgumentError, match="requests"):
        load_trace("closed:clients=2", n=0)
