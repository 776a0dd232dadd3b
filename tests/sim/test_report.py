"""Reports."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from pyllamabatch.errors import UnsupportedOperation
from pyllamabatch.sim import draw, plots, report, simulate
from tests.sim.test_simulate import machine

REQUESTS = draw("poisson:rate=9,n=60,prompt=20-80,output=1-30", 0)
RUNS = [simulate(REQUESTS, machine(), policy) for policy in ("fcfs", "sarathi")]
SUMMARIES = {run.policy: run.summary({"ttft": 0.1}) for run in RUNS}


def test_markdown_has_a_column_for_each_run() -> None:
    title, _, head, rule, *rows = report.markdown(SUMMARIES, "a trace").splitlines()
    assert title == "# a trace"
    assert head.split("|")[2:4] == [" fcfs ", " sarathi "]
    assert all(row.count("|") == rule.count("|") == 4 for row in rows)
    assert f"| requests/s | {SUMMARIES['fcfs']['requests_per_s']:.2f} |" in "\n".join(rows)
    assert any("goodput" in row for row in rows)


def test_figures_that_one_run_has_not_are_dashes() -> None:
    cells = report.table({"a": {"requests": 0, "rejected": 2}, "b": {"requests": 3, "busy": 0.5}})
    assert ["rejected, too long", "2", "–"] in cells.lines
    assert ["time computing", "–", "50.0%"] in cells.lines


def test_jsonl_has_every_request() -> None:
    lines = [json.loads(line) for line in report.jsonl(RUNS, SUMMARIES, {"seed": 0})]
    assert lines[0] == {"kind": "settings", "schema": report.SCHEMA, "seed": 0}
    requests = [line for line in lines if line["kind"] == "request"]
    assert {(line["policy"], line["id"]) for line in requests} == {
        (run.policy, r.id) for run in RUNS for r in REQUESTS
    }
    summaries = {line["policy"]: line for line in lines if line["kind"] == "summary"}
    assert summaries["fcfs"]["ttft_p99"] == SUMMARIES["fcfs"]["ttft_p99"]


def test_a_page_needs_nothing_else_and_is_the_same_every_time() -> None:
    def make() -> str:
        runs = [simulate(REQUESTS, machine(), run.policy) for run in RUNS]
        return report.page(SUMMARIES, "<a> & b", {"trace": "x<y"}, plots.draw(runs))

    text = make()
    assert text == make()
    assert text.count("<svg") == 2
    assert "&lt;a&gt; &amp; b" in text
    assert "x&lt;y" in text
    assert "src=" not in text
    assert "<?xml" not in text


def test_plots_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: dict[str, Any] = {"matplotlib": None, "matplotlib.figure": None}
    for name, value in hidden.items():
        monkeypatch.setitem(sys.modules, name, value)
    with pytest.raises(UnsupportedOperation, match="pip install"):
        plots.draw(RUNS)
