"""The tool that validates the simulator: its records and its tables."""

import json
from pathlib import Path

import pytest

from pyllamabatch.cost.profile import Profile, shipped_profile
from tests.support.calibration import calm_and_small
from tools import validate_simulator
from tools.validation import AT_SPEED, BOUNDS, COMPARED

COMMON = ["-t", "1", "--live", "0.2", "--segments", "2"]
SMALL = ["--trace", "poisson:rate=1,prompt=5-20,output=2-4", *COMMON]


def test_records_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, out = tmp_path / "profile.json", tmp_path / "out.jsonl"
    shipped_profile("nvidia-h200-gemma-3-1b-q4_k_m").save(profile)
    monkeypatch.setattr("tools.validation._PROBE_SECONDS", 0.1)
    words = ["--profile", str(profile), "-s", "4", "-c", "2048", "--out", str(out)]
    assert validate_simulator.main([*SMALL, *words]) in (0, 1)
    text = capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["layout"] for record in records] == ["unified", "streams"]
    for record in records:
        assert set(record["simulated"]) == {"profile", AT_SPEED, "refined"}
        assert record["held_out"]["median"] < 0.05
        assert all(len(record["segments"][name]) == 2 for name in COMPARED)
        assert sum(kind["share"] for kind in record["steps"].values()) == pytest.approx(1)
        exact = {**record, "simulated": {AT_SPEED: record["live"]}}
        assert validate_simulator.missed(exact) == []
        off = {name: figure * 1.3 for name, figure in record["live"].items()}
        far = {**record, "simulated": {AT_SPEED: off}}
        assert validate_simulator.missed(far) == list(BOUNDS)
        assert "| refined | error |" in validate_simulator.view(record)
        assert "refined" not in validate_simulator.view(exact)
    assert text.count("| TTFT, median, ms |") == 2
    assert text.count("\n| with prompts | ") == 2
    validate_simulator.main(["--view", "--out", str(out)])
    assert capsys.readouterr().out == text


def test_a_profile_is_measured_and_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm_and_small(monkeypatch)
    monkeypatch.setattr("tools.validation._PROBE_SECONDS", 0.1)
    monkeypatch.setattr(validate_simulator, "SHIPPED", tmp_path / "shipped")
    words = [*SMALL, "-s", "2", "-c", "1024", "--calibrate", "600", "--ship", "mine"]
    words += ["--layouts", "unified", "--out", str(tmp_path / "out.jsonl")]
    assert validate_simulator.main(words) in (0, 1)
    shipped = Profile.load(tmp_path / "shipped" / "mine.json")
    assert {s.rows for s in shipped.samples} == {1, 2, 3, 4, 8, 12, 16, 20}
    (saved,) = (tmp_path / "profiles").glob("*.json")
    assert Profile.load(saved) == shipped
