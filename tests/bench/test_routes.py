"""A fleet with common prefixes, but for the fleet itself: pytest -m ray tests/cluster."""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench import beside_others, chats, routes
from bench.__main__ import main
from bench.case import Case
from bench.routes import AFFINITY, LIVE, SIMULATED, TURN_BY_TURN
from bench.tools import ToolError
from pyllamabatch.cost.profile import Profile, shipped_profile
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.sim import EngineSpec
from tests.support.made_up_costs import Linear
from tests.support.made_up_rows import row
from tests.support.served import serving

ENGINE: dict[str, Any] = {
    "n_threads": 1,
    "n_threads_batch": 1,
    "n_seq_max": 4,
    "n_ctx": 1024,
    "kv_unified": True,
}


def test_clients_ask_what_is_simulated(
    embedded_model: Model,
) -> None:
    asked, sizes = chats.order(3, 2), chats.Sizes(40, 16, 2)
    requests = chats.trace(asked, sizes)
    with serving(embedded_model) as served, httpx.Client(base_url=served.url) as client:
        chats.talk(client, asked, 3, sizes)
        stats = served.engine.stats()
    assert stats.submitted == len(requests) == sizes.n_requests
    assert stats.known_tokens == sizes.n_prompts
    assert stats.known_tokens == sum(request.n_prompt for request in requests)
    assert stats.tokens == sum(request.n_output for request in requests)


def test_affinity_keeps_what_turns_throw_away(case: Case) -> None:
    cost = Linear(10e-3, 0.4e-3)
    n_cells = chats.Sizes().n_cells
    spec = EngineSpec.of(cost, n_seq_max=chats.N_SLOTS, n_cells=n_cells)
    options = argparse.Namespace(replicas=2, prefix=800, answer=16, rounds=1)
    turns, affinity = (
        routes.simulated(spec, [0.01, 0.02], options, router, case)
        for router in (TURN_BY_TURN, AFFINITY)
    )
    assert affinity.detail["hit_rate"] > 1.5 * turns.detail["hit_rate"]
    assert affinity.t_tg < turns.t_tg
    assert affinity.settings == {"n_kv_max": n_cells}
    assert affinity.detail["way_s"] == pytest.approx(0.015)
    assert affinity.detail["other_cpu"] == 0  # whatever else runs


def test_what_is_between_calls_is_not_within_them(embedded_model: Model) -> None:
    with Engine(embedded_model, **ENGINE) as engine:
        found = routes.between_calls(engine)
        table = engine.trace()
    n_calls = len(set(table["run"].tolist()))
    assert n_calls > 8
    assert 0 < found * (n_calls - 1) <= table["python_ns"].sum() / 1e9


def test_a_wrong_arm_costs_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "spec_on", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="live-2-random"):
        main(["routes", "--model", "default", "--arms", "live-2-random"])


def test_a_neighbour_that_ends_makes_no_profile(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[subprocess.Popen[str]] = []

    def brief(*_: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "print('begins')"]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    def calibrate(*_: object, **__: object) -> Profile:
        started[-1].wait(60)
        return shipped_profile("nvidia-h200-gemma-3-1b-q4_k_m")

    monkeypatch.setenv("PYLLAMABATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(beside_others, "keeping_busy", brief)
    monkeypatch.setattr(beside_others, "calibrate", calibrate)
    with pytest.raises(ToolError, match="ended meanwhile"):
        beside_others.calibrated(embedded_model, 0, 1.0, 1, **ENGINE)


@pytest.mark.parametrize("n", [0, 2])
def test_a_neighbour_ends_with_the_process_that_started_it(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Also where that has ended before it begins."""
    rounds: list[int] = []

    def generate(*_: object) -> None:
        rounds.append(len(rounds))
        assert len(rounds) < 5

    monkeypatch.setattr(Engine, "generate", generate)
    monkeypatch.setattr(os, "getppid", lambda: 7 if len(rounds) < n else 1)
    beside_others.keep_busy(embedded_model.path, 0, 7, **ENGINE)
    assert len(rounds) == n


def test_a_replica_has_the_layers_on_the_gpu_that_its_record_says(case: Case) -> None:
    options = argparse.Namespace(replicas=3, machine="", prefix=800, answer=16, rounds=1)
    words = routes.serve(options, AFFINITY, replace(case, n_gpu_layers=7))
    assert words[words.index("-ngl") + 1] == "7"
    assert "-ngl" not in routes.serve(options, AFFINITY, replace(case, n_gpu_layers=-1))


def test_figures_compare_live_and_simulated() -> None:
    n_cells = chats.Sizes().n_cells
    rows = [
        replace(row(routes.Variant(kind, router).name, 8, speed, hit_rate=rate), n_kv_max=n_cells)
        for kind, router, rate, speed in (
            (LIVE, TURN_BY_TURN, 0.4, 100.0),
            (LIVE, AFFINITY, 0.8, 200.0),
            (SIMULATED, TURN_BY_TURN, 0.42, 98.0),
            (SIMULATED, AFFINITY, 0.76, 220.0),
        )
    ]
    values = [target.measured(rows) for target in routes.TARGETS]
    assert values == pytest.approx([2.0, 0.98, 1.1, 2.0, -4.0])
    missed = [target.missed_by(rows) for target in routes.TARGETS]
    assert missed == [False, False, True, False, True]
    assert [target.measured(rows[:1]) for target in routes.TARGETS] == [None] * 5
    shorter = [replace(one, n_kv_max=99) for one in rows]  # which has other hits
    assert [target.measured(shorter) for target in routes.TARGETS] == [None, *values[1:]]
    for one, four in zip(rows, routes.variants(4), strict=True):
        assert one.arm != four.name
