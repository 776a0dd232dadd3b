"""The prefix bench counts what was computed, and its figures come from its rows."""

from __future__ import annotations

import pytest

from bench import schema
from bench.__main__ import main
from bench.prefix import ALONE, SHARED, TARGETS, WARM, view

SIZES = ["--requests", "3", "--common", "40", "--own", "4", "--tokens", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[schema.Row]:
    out = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    assert main(["prefix", "--model", "default", "--repeats", "1", *SIZES, "--out", str(out)]) == 0
    return list(schema.read(out))


def test_what_was_computed(rows: list[schema.Row]) -> None:
    by_arm = {row.arm: row.detail for row in rows}
    assert {arm: detail["prefill_rows"] for arm, detail in by_arm.items()} == {
        ALONE: 3 * 44,
        SHARED: 40 + 3 * 4,
        WARM: 3 * 4,
    }
    assert {arm: detail["computed"] for arm, detail in by_arm.items()} == {
        ALONE: 3,
        SHARED: 1,
        WARM: 0,
    }
    assert by_arm[ALONE]["hit_rate"] == 0
    assert by_arm[SHARED]["hit_rate"] == pytest.approx(2 * 40 / (3 * 44))
    assert by_arm[WARM]["hit_rate"] == pytest.approx(3 * 40 / (3 * 44))
    assert all(row.kv_unified and row.pl == 3 and row.t_pp > 0 for row in rows)


def test_the_figures(rows: list[schema.Row]) -> None:
    computed, ratio = (target.measured(rows) for target in TARGETS)
    assert computed == 1
    by_arm = {row.arm: row.detail for row in rows}
    assert ratio == by_arm[ALONE]["ttft_mean_s"] / by_arm[SHARED]["ttft_mean_s"]
    assert [target.measured([]) for target in TARGETS] == [None, None]


def test_the_table_has_a_line_for_each_arm(rows: list[schema.Row]) -> None:
    table = view(rows)
    assert all(f"| {arm} |" in table for arm in (ALONE, SHARED, WARM))
    assert "1.00 times" in table
