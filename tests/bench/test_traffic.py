"""The traffic bench: the same work for every arm, and times of every token."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import arrivals, traffic
from bench.case import Case, Measured
from bench.new_graphs import WHY_NEW, why_new
from bench.serving import ServerProcess, WrongAnswer
from pyllamabatch.step.trace import trace_dtype
from tests.bench.conftest import Run

FAKE = """
import argparse, json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
parser = argparse.ArgumentParser()
parser.add_argument("lost", type=int)
parser.add_argument("--port", type=int)
options = parser.parse_args()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["stream"] is True
        self.send_response(200)
        self.end_headers()
        n = asked["n_predict"] - options.lost
        for _ in range(n - 2):  # two are held back
            self.say({"tokens": [7], "content": "a"})
        self.say({"stop": True, "tokens_predicted": n})

    def say(self, values):
        self.wfile.write(b"data: " + json.dumps(values).encode() + b"\\n\\n")

    def log_message(self, *words): pass

ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
"""


def test_every_repeat_is_the_same_work(case: Case) -> None:
    one = object.__new__(traffic.HttpTraffic)  # serves nothing
    one.case, one.n_requests = replace(case, pl=4, tg=3 * 128), 3
    jobs = [one.jobs(300, which) for which in range(3)]
    for each in jobs:
        sizes = [(len(prompt), tokens) for prompt, tokens in each]
        assert len(sizes) == 4 * 3
        assert sum(tokens for _, tokens in sizes) == 4 * 3 * 128
        assert {min(n for n, _ in sizes), max(n for n, _ in sizes)} == set(traffic.PROMPT)
    assert [len(p) for p, _ in jobs[0]] != [len(p) for p, _ in jobs[1]]


def test_the_engine_as_it_comes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", "default", "--clients", "2", "--requests", "1", "--repeats", "1")
    status, records = run("traffic", *words, "--arms", "engine,engine-pool", "--busy", "1")
    assert status == 0
    assert [(r.arm, r.kv_unified, r.pl, r.tg) for r in records] == [
        ("engine", False, 2, 128),
        ("engine-pool", True, 2, 128),
    ]
    for record in records:
        detail = record.detail
        assert 0 < detail["ttft_p50_s"] <= detail["ttft_p99_s"] < record.t_tg
        assert 0 < detail["itl_p50_s"] <= detail["itl_p99_s"] < record.t_tg
        assert record.speed_tg == pytest.approx(2 * 128 / record.t_tg)
        kinds = [detail[f"{kind}_steps"] for kind in ("prompt", "reused", "new")]
        assert sum(kinds) == detail["steps"] > 0
        assert 0 < kinds[0] <= 2 + 2 * record.kv_unified
        new = [detail[f"new_{name}"] for name in WHY_NEW if name != "prompt"]
        assert sum(new) == kinds[2] < kinds[1]
        assert 2 * 100 < detail["decode_rows"] <= 2 * 128  # but those beside prompts
    assert "1 busy processes beside" in capsys.readouterr().out


def test_requests_that_come_by_themselves(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tool(case: Case) -> Measured:
        assert (case.pp, case.tg, case.pl) == (256, 128, 2)
        return Measured(0.0, 0.25)

    monkeypatch.setattr(arrivals, "run_all_in", tool)
    words = ("--model", "default", "--clients", "2", "--requests", "2", "--repeats", "1")
    status, records = run("traffic", *words, "--arms", "engine", "--loads", "0.5,2")
    assert status == 0
    assert [(r.detail["load"], r.detail["rate"]) for r in records] == [(0.5, 4.0), (2.0, 16.0)]
    assert all(r.detail["ttft_p50_s"] > 0 for r in records)
    printed = capsys.readouterr().out
    assert "Poisson, 0.5 of all-in:" in printed
    assert "over llama-server" not in printed  # the targets are about closed loops


def test_arrivals_are_the_same_for_every_arm(case: Case) -> None:
    (load,) = arrivals.loads_of(case, "", 1)
    assert load.detail == {"busy": 1.0}
    load = replace(load, rate=50.0)
    times = load.arrivals(400, 0)
    assert times == sorted(times) == load.arrivals(400, 0) != load.arrivals(400, 1)
    assert times[-1] == pytest.approx(400 / 50, rel=0.2)
    with pytest.raises(SystemExit, match="shares above 0"):
        list(arrivals.loads_of(case, "0.5,half", 0))


def test_the_server_as_it_comes(run: Run) -> None:
    words = ("--model", "default", "--clients", "2", "--requests", "1", "--repeats", "1")
    status, (record,) = run("traffic", *words, "--arms", "serve")
    assert (status, record.error) == (0, "")
    assert 0 < record.detail["itl_p99_s"] < record.t_tg  # several tokens come at once


def test_the_end_of_the_list_has_no_say_in_the_full_speed() -> None:
    answers = [(10.0, [11.0, 12.0, 13.0]), (10.0, [11.0, 15.0]), (14.0, [16.0, 30.0])]
    assert traffic.full_speed(answers, 10.0) == 4 / (14.0 - 10.0)


@pytest.mark.parametrize("lost", [0, 3])
def test_streamed_answers_are_counted(case: Case, tmp_path: Path, lost: int) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    server = ServerProcess([sys.executable, str(script), str(lost)], tmp_path / "fake.log")
    serving = traffic.HttpTraffic(replace(case, tg=128), 300, server, 20.0)
    try:
        if lost:
            with pytest.raises(WrongAnswer, match="tokens came"):
                serving.run(0)
        else:
            assert serving.run(0).t_tg > 0
    finally:
        serving.close()


def test_why_a_graph_is_new() -> None:
    """Slots of three sequences, rows of prompts and of padding, by step."""
    steps: list[tuple[list[int], int, int, int, int, str]] = [
        # slots, prompt rows, filled, on_device, reused, why
        ([0], 7, 0, 0, 0, "prompt"),
        ([0], 0, 0, 0, 0, "samplers"),  # the first one, with which nothing can be compared
        ([0], 0, 0, 0, 1, ""),
        ([0, 1], 0, 0, 0, 0, "rows"),
        ([0, 2], 0, 0, 0, 0, "slots"),
        ([0, 2], 0, 0, 1, 0, "samplers"),
        ([1], 9, 0, 0, 0, "prompt"),
        ([0, 2], 0, 0, 1, 0, "cells"),
        ([0], 0, 1, 1, 1, ""),  # another slot's row is padding
        ([1], 0, 1, 1, 0, "cells"),
    ]
    trace = np.zeros(len(steps) + 1, trace_dtype(3))
    for row, (slots, n_prompt, filled, on_device, reused, _) in zip(trace, steps, strict=False):
        row["ids"][slots] = 1 + np.array(slots)
        row["prefill_rows"], row["filled"], row["on_device"] = n_prompt, filled, on_device
        row["decode_rows"], row["reused"] = len(slots) if not n_prompt else 0, reused
    trace["code"][-1] = -3  # it was not computed
    assert why_new(trace).tolist() == [*(step[-1] for step in steps), ""]
    assert why_new(trace[:0]).tolist() == []
    assert why_new(trace[:1]).tolist() == ["prompt"]
