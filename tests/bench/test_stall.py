"""The stall bench runs an engine, and its exit status is what its figures say."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import schema
from bench.__main__ import main
from bench.stall import ARRIVES, CHUNKED, PREFILL_FIRST, STREAMS, TARGETS, TOKENS


def test_rows_figures_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--model", "default", "--threads", "1", "--prompt-tokens", "300", "--quick"]
    arms = f"{CHUNKED},{PREFILL_FIRST}"
    status = main(["stall", *arguments, "--arms", arms, "--out", str(out)])
    rows = list(schema.read(out))
    assert [row.arm for row in rows] == [CHUNKED, PREFILL_FIRST]
    for row in rows:
        detail = row.detail
        assert (row.pl, row.tg, row.pp, row.n_threads) == (STREAMS, TOKENS, 300, 1)
        assert 0 < detail["itl_p99_s"] <= detail["itl_max_s"] < row.t_tg
        assert detail["p99_over_median"] == detail["itl_p99_s"] / detail["itl_median_s"]
        assert detail["arrives_after"] == ARRIVES
    figures = [target.measured(rows) for target in TARGETS]
    assert figures == [row.detail["p99_over_median"] for row in rows]
    pairs = zip(TARGETS, rows, strict=True)
    met = [target.met_by(row.detail["p99_over_median"]) for target, row in pairs]
    assert status == int(not all(met))
    assert capsys.readouterr().out.count("MISSED") == met.count(False)
