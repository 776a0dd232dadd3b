"""The bench that validates: its rows, its tables, and the part of the page that is made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import schema, validate
from bench.__main__ import main
from bench.docs import replace_part
from pyllamabatch.cost.profile import Profile, Shape, shipped_profile
from pyllamabatch.sim.validate import AT_SPEED, COMPARED


def test_rows_tables_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "profile.json"
    shipped_profile("nvidia-h200-gemma-3-1b-q4_k_m").save(profile)
    monkeypatch.setattr("pyllamabatch.sim.validate._PROBE_SECONDS", 0.1)
    words = ["validate", "--model", "default", "--threads", "1", "--profile", str(profile)]
    words += ["-s", "4", "--n-ctx", "2048", "--prompt", "5-20", "--output", "2-4", "--quick"]
    words += ["--live", "0.2", "--layouts", "unified,streams", "--out", str(tmp_path)]
    assert main(words) == 0
    (path,) = tmp_path.glob("validate-default-*.jsonl")
    rows = list(schema.read(path))
    for unified in (True, False):
        mine = {row.arm: row for row in rows if row.kv_unified == unified}
        assert {"cost model", "live", "profile", AT_SPEED, "refined"} < set(mine)
        live, simulated = mine["live"].detail, mine[AT_SPEED].detail
        for name in COMPARED:
            error = simulated[name] / live[name] - 1
            assert simulated[f"error {name}"] == pytest.approx(error)
        assert mine["cost model"].detail["held_out_median"] < 0.05
        assert mine["live"].tg == pytest.approx(live["tokens_per_s"] * mine["live"].t_tg, abs=1)
        assert sum(r.detail["share"] for r in mine.values() if "share" in r.detail) == (
            pytest.approx(1)
        )
    errors = [r.detail["error tpot_mean"] for r in rows if r.arm == AT_SPEED]
    assert validate.error_of("tpot_mean")(rows) == max(map(abs, errors))
    text = validate.view(rows)
    assert text.count("| TTFT, median, ms |") == 2
    # of a layout that was measured again only the latest run; an arm less is a column less
    again = [replace(r, run_id="again") for r in rows if r.kv_unified and r.arm != "refined"]
    newest = validate.view([*rows, *again])
    assert newest.count("| TTFT, median, ms |") == 2
    assert newest.count("refined") == 1

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- validation -->\nold\n<!-- end of validation -->\nbehind\n")
    monkeypatch.setattr(validate, "DOCS", page)
    assert main(["validate", "--docs", "--out", str(tmp_path)]) == 0
    made = page.read_text()
    assert made.startswith("before\n")
    assert made.endswith("behind\n")
    assert "old" not in made
    assert text.strip() in made


def test_a_profile_is_measured_and_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [Shape(rows=n, depth=8) for n in (1, 2, 3, 4)]
    shapes += [Shape(12, 10, 1, 8), Shape(16, 16, 1), Shape(20, 20, 1)]
    monkeypatch.setattr("pyllamabatch.cost.calibrate.plan_shapes", lambda *_: shapes)
    monkeypatch.setattr("pyllamabatch.cost.calibrate.N_CTX", 2048)
    monkeypatch.setattr("pyllamabatch.cost.calibrate.busy_cores", lambda: 0.0)
    monkeypatch.setattr("pyllamabatch.sim.validate._PROBE_SECONDS", 0.1)
    monkeypatch.setattr(validate, "SHIPPED", tmp_path / "shipped")
    words = ["validate", "--model", "default", "--threads", "1", "--calibrate", "5", "--quick"]
    words += ["-s", "2", "--n-ctx", "1024", "--prompt", "5-20", "--output", "2-4"]
    assert main([*words, "--live", "0.1", "--ship", "mine", "--out", str(tmp_path)]) == 0
    shipped = Profile.load(tmp_path / "shipped" / "mine.json")
    assert {s.rows for s in shipped.samples} == {1, 2, 3, 4, 12, 16, 20}
    (kept,) = (tmp_path / "profiles").glob("*.json")
    assert Profile.load(kept) == shipped


def test_a_page_without_the_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- a -->\n")
    with pytest.raises(ValueError, match="end of a"):
        replace_part(page, "a", "text")


def test_the_page_has_its_place() -> None:
    text = validate.DOCS.read_text(encoding="utf-8")
    assert text.count("<!-- validation -->\n") == text.count("<!-- end of validation -->\n") == 1
