"""The arm of `compare` that is on Ray: pytest -m ray tests/cluster."""

from pathlib import Path

import psutil
import pytest

from pyllamabatch.cli import main
from pyllamabatch.compare.replicas import Replicas
from pyllamabatch.report.records import read

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_replicas_do_what_they_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they leave no process: one of Ray's that is left over is no child of ours any more."""
    out = tmp_path / "rows.jsonl"
    processes: list[psutil.Process] = []
    load = Replicas.load

    def load_and_look(arm: Replicas) -> None:
        load(arm)
        processes.extend(map(psutil.Process, arm.pids))

    monkeypatch.setattr(Replicas, "load", load_and_look)
    asked = "compare --arms replicas -n 2 --prompt-tokens 12 --sample-tokens 6 --repeats 1 -t 1"
    assert main([*asked.split(), "--quiet", "--out", str(out)]) == 0
    (row,) = read(out)
    assert (row.arm, row.pl, row.error) == ("replicas", 2, "")
    assert row.detail["completed"] == row.detail["requests"] == 2
    assert row.detail["total_tokens_sampled"] == 2 * (6 - 1)
    assert len(processes) > 3  # the front, Ray's own, two replicas
    _, alive = psutil.wait_procs(processes, 30)
    assert not alive
