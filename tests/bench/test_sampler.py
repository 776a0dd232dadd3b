"""The sampler bench writes rows that can be read, and computes its figures from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import schema
from bench.__main__ import main


def test_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--chain", "--vocab", "6400", "--arms", "greedy,default"]
    assert main(["sampler", *arguments, "--out", str(out)]) == 0
    rows = list(schema.read(out))
    assert [row.arm for row in rows] == [
        "greedy, 1 thread",
        "greedy, chain, 1 thread",
        "default, 1 thread",
        "default, chain, 1 thread",
    ]
    for row in rows:
        assert row.detail["over_scan"] == pytest.approx(row.t_tg / row.detail["scan_s"])
        assert (row.pl, row.tg, row.n_threads) == (1, 1, 1)
    text = capsys.readouterr().out
    assert f"| {rows[0].detail['over_scan']:.2f} | 1.5 |" in text


def test_many_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--quick", "--rows", "5", "--vocab", "6400", "--threads", "1,3"]
    assert main(["sampler", *arguments, "--arms", "temperature", "--out", str(out)]) == 0
    one, three = schema.read(out)
    assert (one.n_threads, three.n_threads) == (1, 3)
    assert f"| {one.t_tg / three.t_tg:.2f} |" in capsys.readouterr().out


def test_what_it_refuses(tmp_path: Path) -> None:
    for arguments in (["--vocab", "100"], ["--arms", "quick"], ["--rows", "0"]):
        with pytest.raises(SystemExit, match="--arms"):
            main(["sampler", *arguments, "--out", str(tmp_path / "rows.jsonl")])
