"""`bench traffic --machine`: policies in a profile's time, beside the simulator."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench import profile_machine, traffic
from bench.__main__ import main
from bench.policies import COUNTED
from pyllamabatch.scheduler.policies import DEFAULT
from tests.bench.conftest import Run
from tests.support.machines import fast_profile


def test_policies_run_live_on_a_machine(run: Run, tmp_path: Path) -> None:
    profile = fast_profile(tmp_path)
    loads = ("--streams", "3", "--clients", "2", "--requests", "2", "--repeats", "1")
    arms = [COUNTED, DEFAULT, profile_machine.ENGINE]
    policies = ("--policies", ";".join(arms), "--kv", "unified")
    status, records = run("traffic", "--machine", str(profile), *loads, *policies)
    assert status == 0
    assert [(r.arm, r.pl, r.detail["steady"]) for r in records] == [
        (arm, n, steady) for n, steady in ((3, 1.0), (2, 0.0)) for arm in arms
    ]
    for record in records:
        detail = record.detail
        assert record.kv_unified == (record.arm != profile_machine.ENGINE)
        assert record.gpu_info == "no GPU, the profile of Apple M2 Ultra"
        assert record.model_type.startswith("no model")
        assert detail["over_simulated"] == pytest.approx(
            record.speed_tg / detail["simulated_tokens_per_s"]
        )
        assert 0 < detail["host_share"] < 1
        assert 0 < detail["itl_p50_s"] <= detail["itl_p99_s"]
    speed = f"{records[0].speed_tg:.1f}"
    for other_cpu, host_share, counts in ((0.0, 0.5, True), (1.5, 0.5, False), (1.5, 0.01, True)):
        seen = {"other_cpu": other_cpu, "host_share": host_share}
        table = traffic.view([replace(r, detail=r.detail | seen) for r in records])
        assert (f"fast.json: 3 steady | {speed} (" in table) == counts
        assert (speed in table) == counts


def test_an_unknown_machine_is_an_error_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["traffic", "--machine", "m0", "--streams", "2"]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("bench: machine='m0': must be a file or one of ")
    assert "\n" not in said


def test_its_targets_compare_calm_runs() -> None:
    target = next(t for t in profile_machine.TARGETS if "9 streams in a pool: default" in t.text)
    assert target.measured([]) is None
