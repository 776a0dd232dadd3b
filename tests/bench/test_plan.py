"""The bench of the planner: a real load beside its projection."""

from pathlib import Path

import pytest

from bench import plan
from bench.__main__ import main
from pyllamabatch.report.records import read


def test_a_real_load_is_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = (plan.Layout(1, 512), plan.Layout(4, 1024, "streams", 64, "q8_0"))
    monkeypatch.setattr(plan, "QUICK_LAYOUTS", layouts)
    out = tmp_path / "rows.jsonl"
    assert main(["plan", "--quick", "--model", "default", "--out", str(out)]) == 0
    rows = list(read(out))
    assert [row.arm for row in rows] == [layout.name for layout in layouts]
    for row in rows:
        detail = row.detail
        planned = detail["planned_host"] + detail["planned_device"]
        assert planned > 4 * 2**20  # the weights, at least
        assert detail["real_host"] + detail["real_device"] == pytest.approx(planned, rel=0.02)
    buffers = plan.TARGETS[0]
    assert buffers.measured(rows) == max(abs(row.detail["buffers"]) for row in rows) <= 0.02


def test_a_load_that_fails_leaves_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "QUICK_LAYOUTS", (plan.Layout(1, 512, type_kv="no such"),))
    out = tmp_path / "rows.jsonl"
    assert main(["plan", "--quick", "--model", "default", "--out", str(out)]) == 1
    (row,) = read(out)
    assert "no such" in row.error
    assert "no such" in plan.view([row])
