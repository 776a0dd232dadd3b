"""Reports."""

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import UnsupportedOperation
from pyllamabatch.sim import TraceRequest, draw, report, simulate
from tests.sim.test_simulate import machine

REQUESTS = draw("poisson:rate=9,n=60,prompt=20-80,output=1-30", 0)
RUNS = [simulate(REQUESTS, machine(), policy) for policy in ("fcfs", "sarathi")]
SUMMARIES = {run.policy: run.summary({"ttft": 0.1}) for run in RUNS}


def test_markdown_has_a_column_for_each_run() -> None:
    title, _, head, rule, *rest = report.markdown(SUMMARIES, "a trace").splitlines()
    lines = rest[: rest.index("")]
    assert title == "# a trace"
    assert head.split("|")[2:4] == [" fcfs ", " sarathi "]
    assert all(line.count("|") == rule.count("|") == 4 for line in lines)
    assert len(lines) <= 10
    assert lines[0] == "| overloaded | no | no |"
    assert f"| goodput, requests/s | {SUMMARIES['fcfs']['goodput_per_s']:.2f} |" in "\n".join(lines)


def test_figures_that_one_run_has_not_are_dashes() -> None:
    found = report.table({"a": {"rejected": 2}, "b": {"rejected": 0, "ttft_p50": 0.5}})
    assert ["rejected, too long", "2", "0"] in found.lines
    assert ["TTFT p50, ms", "—", "500.00"] in found.lines
    assert not any("preemptions" in row for row in found.lines)


def test_it_says_who_wins() -> None:
    words = report.verdict({
        "a": {"tokens_per_s": 100.0, "ttft_p99": 0.2, "itl_p99": 0.1},
        "b": {"tokens_per_s": 150.0, "ttft_p99": 0.1, "itl_p99": 0.1},
        "c": {"tokens_per_s": 120.0, "ttft_p99": 0.3},
    })  # fmt: skip
    assert words == [
        "output tokens/s: b wins with 150; next is c with 120.",
        "TTFT p99, ms: b wins with 100.00; next is a with 200.00.",
        "ITL p99, ms: no winner, a and b are within 2%.",
    ]
    assert report.verdict({"fcfs": SUMMARIES["fcfs"]}) == []


def test_it_says_that_an_engine_is_overloaded() -> None:
    """At twenty times the rate the queue grows; in a closed loop it never does."""
    fast = [replace(r, arrival=r.arrival / 20) for r in REQUESTS]
    loop = draw("closed:clients=12,n=80,prompt=20,output=9", 0)
    found = [simulate(requests, machine()).summary() for requests in (fast, REQUESTS, loop)]
    assert [figures["overloaded"] for figures in found] == [True, False, False]
    assert report.table({"a": found[0]}).lines[0] == ["overloaded", "yes"]


def test_jsonl_has_every_request() -> None:
    lines = [json.loads(line) for line in report.jsonl(RUNS, SUMMARIES, {"seed": 0})]
    assert lines[0] == {"kind": "settings", "schema": report.SCHEMA, "seed": 0}
    requests = [line for line in lines if line["kind"] == "request"]
    assert {(line["policy"], line["id"]) for line in requests} == {
        (run.policy, r.id) for run in RUNS for r in REQUESTS
    }
    summaries = {line["policy"]: line for line in lines if line["kind"] == "summary"}
    assert summaries["fcfs"]["ttft_p99"] == SUMMARIES["fcfs"]["ttft_p99"]


def test_requests_of_arrays() -> None:
    """What NumPy and pandas give is none of JSON's numbers."""
    columns: list[Any] = [np.arange(3), np.array([5, 9, 7]), np.array([0, 0.5, 1.5], np.float32)]
    requests = [
        TraceRequest(id, time, n, n, ((2 * id, n),), 2 * id + 1)
        for id, n, time in zip(*columns, strict=True)
    ]
    run = simulate(requests, machine(), "fcfs")
    *_, last = report.jsonl([run], {run.policy: run.summary()}, {})
    assert [json.loads(last)[name] for name in ("id", "n_prompt", "n_output")] == [2, 7, 7]


def test_a_page_needs_nothing_else_and_is_the_same_every_time() -> None:
    def make() -> str:
        runs = [simulate(REQUESTS, machine(), run.policy) for run in RUNS]
        return report.page(runs, SUMMARIES, "<a> & b", {"trace": "x<y"})

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
        report.plots(RUNS)
