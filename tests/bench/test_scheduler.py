"""The scheduler bench measures what it says, and computes its figures from its rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import schema
from bench.__main__ import main
from bench.scheduler import AT_ONCE, SCENARIOS, TARGETS, per_step, prepare
from pyllamabatch.scheduler import policy_names


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[schema.Row]:
    out = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    sizes = ["--running", "3,5", "--waiting", "7", "--policies", "sarathi,mlfq"]
    assert main(["scheduler", "--quick", "--repeats", "1", *sizes, "--out", str(out)]) == 0
    return list(schema.read(out))


def test_a_row_for_each_policy_scenario_and_size(rows: list[schema.Row]) -> None:
    assert [(row.arm, row.pl) for row in rows] == [
        (f"{policy}: {scenario}", n)
        for policy in ("sarathi", "mlfq")
        for scenario in SCENARIOS
        for n in (3, 5)
    ]
    for row in rows:
        assert row.detail["waiting"] == 7
        assert row.t_tg > 0
        assert row.tg >= 50


def test_a_figure_is_that_of_the_slowest_policy(rows: list[schema.Row]) -> None:
    join = [row for row in rows if row.arm.endswith("join") and row.pl == 5]
    assert per_step(rows, "join", 5, 7) == max(row.t_tg / row.tg for row in join)
    assert per_step(rows, "join", 6, 7) == 0
    assert all(target.measured(rows) is None for target in TARGETS)
    moved = [
        replace(row, pl=256 if row.pl == 5 else 32, detail={"waiting": 1000.0}) for row in rows
    ]
    figures = {target.text: target.measured(moved) for target in TARGETS}
    seconds = per_step(rows, "join", 5, 7)
    assert figures["join: us a step, 256 running, 1000 waiting, slowest policy"] == seconds * 1e6
    growth = figures["join: time of a step with 256 running over that with 32"]
    assert growth == seconds / per_step(rows, "join", 3, 7)
    assert figures["run: decode steps a second, 32 running"] == 1 / per_step(rows, "run", 3, 7)


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_step_does_what_its_scenario_says(policy: str, scenario: str) -> None:
    scheduler, step = prepare(policy, scenario, 4, 9)
    for _ in range(3):
        step()
    before = replace(scheduler.counters)
    made = sum(step() for _ in range(5))
    counters = scheduler.counters
    assert counters.steps - before.steps == made == (5 * AT_ONCE if scenario == "run" else 5)
    assert counters.preemptions == 0
    assert counters.admissions - before.admissions == (5 if scenario == "join" else 0)
    assert (counters.prefill_rows > before.prefill_rows) == (scenario in ("join", "chunk"))
    assert scheduler.n_waiting == 9
    assert scheduler.n_running == 4
