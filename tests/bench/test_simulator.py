"""The simulator bench measures what it says."""

from __future__ import annotations

from pathlib import Path

from bench import schema
from bench.__main__ import main
from bench.simulator import LOADS, TARGETS, view


def test_a_row_for_each_load(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--quick", "--repeats", "1", "--requests", "40", "--out", str(out)]
    assert main(["simulator", *options]) == 0
    rows = list(schema.read(out))
    assert [row.arm for row in rows] == list(LOADS)
    decode = rows[0]
    # The first token of each comes with its prompt, and at least one and at most 32 with each step.
    assert 2 * 999 <= decode.tg <= 40 * 2000
    assert decode.detail["requests"] == 40
    (target,) = TARGETS
    assert target.measured(rows) == decode.tg / decode.t_tg
    assert target.measured([]) is None
    assert view(rows).count("\n") == 2 + len(LOADS)
