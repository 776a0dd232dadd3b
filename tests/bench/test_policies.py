"""The benches of the default policy: simulated, and live on the embedded model."""

from pathlib import Path

import numpy as np
import pytest

from bench import policies, width
from bench.__main__ import main
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import shipped_profile
from pyllamabatch.cost.step_cost import NewGraph
from pyllamabatch.report.records import read
from pyllamabatch.step.trace import trace_dtype

M2 = policies.M2


def test_simulated_rows_and_their_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--profiles", M2, "--streams", "8-9", "--loads", "0.8", "--requests", "20"]
    assert main(["policies", *words, "--clients", "4,12", "--out", str(out)]) == 0
    rows = list(read(out))
    assert len(rows) == 5 * len(policies.POLICIES)
    loads = {(policies.load_of(row), row.arm) for row in rows}
    names = ("steady 8", "steady 9", "mixed 0.8", "clients 4", "clients 12")
    assert loads == {(load, arm) for load in names for arm in policies.POLICIES}
    assert policies.pairs(rows, "speed_tg")[M2, "clients 12"] > 1.15
    assert policies.pairs(rows, "speed_tg")[M2, "steady 8"] == 1.0
    ratio = policies.ratio(M2, 9)(rows)
    assert ratio == policies.pairs(rows, "speed_tg")[M2, "steady 9"] > 1.2
    assert policies.ratio(M2, 12)(rows) is None
    worst = policies.worst(rows)
    assert worst is not None
    assert worst <= 1.0
    printed = capsys.readouterr().out
    assert f"| {M2} | 1 | {ratio:.2f} (" in printed
    assert f"9 streams: default over counted: {ratio:.3g} (≥ 1.2: met)" in printed


def test_numbers_and_ranges_of_streams() -> None:
    assert policies.streams_of("1-3,8") == [1, 2, 3, 8]
    with pytest.raises(SystemExit, match="0"):
        policies.streams_of("0-2")


def test_itl_is_between_two_rows_of_the_same_request() -> None:
    trace = np.zeros(4, dtype=trace_dtype(2))
    trace["t_start_ns"] = [0, 1_000_000_000, 2_000_000_000, 4_000_000_000]
    trace["decode_ns"] = 500_000_000
    trace["ids"] = [[1, 2], [1, 0], [1, 2], [3, 2]]
    trace["chunk"] = [[0, 0], [5, 0], [0, 0], [0, 0]]  # in the second step a prompt of 5 rows
    ends = width.ends_of(trace)
    assert ends.tolist() == [0.5, 1.5, 2.5, 4.5]
    assert sorted(width.itl(trace, ends)) == [2.0, 2.0, 2.0]


def test_steps_are_reckoned_by_the_model_as_it_was() -> None:
    cost = CostModel.fit(shipped_profile(M2), n_ubatch=512)
    trace = np.zeros(3, dtype=trace_dtype(3))
    trace["rows"], trace["prefill_rows"] = [2, 40, 38], [0, 38, 38]
    trace["kv_used"] = [102, 180, 47]
    trace["decode_rows"], trace["ids"] = [2, 2, 0], [[1, 2, 0], [1, 2, 3], [0, 0, 3]]
    trace["chunk"][1:, 2] = 38
    trace["reused"] = 1
    expected = sum(
        cost.predict(*shape) for shape in ((2, 0, 100, 2), (40, 38, 140, 3), (38, 38, 9, 1))
    )
    for _ in range(9):
        cost.observe(40, 38, 140, 3, 1.0)
    assert width.reckon(cost, trace) == pytest.approx(expected)
    cost.new_graph = NewGraph(0.5, 0.25)
    trace["reused"] = [0, 1, 1]
    assert width.reckon(cost, trace) == pytest.approx(expected + 0.75)


def test_live_rows_on_the_embedded_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--model", "default", "--threads", "1", "-n", "2", "--mixed", "2", "--tokens", "72"]
    words += ["--prompt-tokens", "8", "--repeats", "2", "--profile", M2, "--out", str(out)]
    assert main(["width", *words]) == 0
    rows = list(read(out))
    arms = ["counted", "device-aware"]
    assert [(r.repeat, r.arm, r.pl, r.detail["mixed"]) for r in rows] == [
        *((0, arm, 2, mixed) for mixed in (0.0, 1.0) for arm in arms),
        *((1, arm, 2, mixed) for mixed in (0.0, 1.0) for arm in arms[::-1]),
    ]
    steady, mixed = rows[0], rows[2]
    assert 2 * 16 < steady.detail["n_tokens"] < 2 * 72  # the window is shorter than their lives
    assert steady.speed_tg == pytest.approx(2 * 72 / steady.t_tg)
    # Answers of 9 to 36 tokens, the same for both arms, others in each repeat.
    first, other = ({r.detail["n_tokens"] for r in rows[k : k + 2]} for k in (2, 6))
    assert len(first) == len(other) == 1
    assert first != other
    n_requests = 2 * width.MIXED_ROUNDS
    assert 9 * n_requests < mixed.detail["n_tokens"] < 36 * n_requests
    assert mixed.speed_tg == pytest.approx(2 * 36 / mixed.t_tg)
    assert 0 < steady.detail["itl_median_s"] <= steady.detail["itl_p99_s"]
    seconds = [row.detail["predicted_s"] for row in rows]
    ratios = seconds[2] / seconds[3], seconds[7] / seconds[6]  # counted over the default
    printed = capsys.readouterr().out
    assert "| 2 streams |" in printed
    assert f"({min(ratios):.3f} to {max(ratios):.3f})" in printed


@pytest.mark.parametrize("loads", [("-n", "2", "--mixed", ""), ("-n", "", "--mixed", "2")])
def test_what_is_not_measured_is_said(tmp_path: Path, loads: tuple[str, ...]) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--model", "default", *loads, "--tokens", "8", "--repeats", "1"]
    assert main(["width", *words, "--out", str(out)]) == 1
    assert "--calibrate" in next(iter(read(out))).error
