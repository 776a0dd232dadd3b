"""A small soak, as `python -m bench soak` runs a large one: nobody gets a wrong token, no request
and no token is lost or counted twice."""

from __future__ import annotations

import pytest

from bench import soak
from bench.arms import InProcess
from bench.case import Case
from bench.models import resolve


def test_many_clients_and_some_cancels() -> None:
    model = resolve("default")
    case = Case(
        model=model, pp=12, tg=16, pl=24, n_threads=1, sampling="greedy", seed=5, kv_unified=True
    )
    measured = soak.soak(InProcess(model, -1), case, 300, 0.1, None)
    detail = measured.detail
    assert detail["requests"] == 300
    assert detail["cancelled"] > 0
    assert (detail["wrong"], detail["unbalanced"], detail["kv_used"]) == (0, 0, 0)


def test_the_slope_of_memory() -> None:
    growing = soak.slope([(n, 10_000_000 + 1024 * n) for n in range(0, 1000, 100)])
    assert growing == pytest.approx(1000.0)
    assert abs(soak.slope([(n, 5_000_000) for n in range(0, 1000, 100)])) < 1e-6
    assert soak.slope([(1, 5)]) == 0.0
