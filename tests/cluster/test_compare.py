"""The arm of `compare` that is on Ray: pytest -m ray tests/cluster."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from pyllamabatch.cli import main
from pyllamabatch.report.records import read

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_replicas_do_what_they_are_asked(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    before = psutil.Process().children(recursive=True)
    asked = "compare --arms replicas -n 2 --prompt-tokens 12 --sample-tokens 6 --repeats 1 -t 1"
    assert main([*asked.split(), "--quiet", "--out", str(out)]) == 0
    (row,) = read(out)
    assert (row.arm, row.pl, row.error) == ("replicas", 2, "")
    assert row.detail["completed"] == row.detail["requests"] == 2
    assert row.detail["total_tokens_sampled"] == 2 * (6 - 1)
    assert set(psutil.Process().children(recursive=True)) <= set(before)
