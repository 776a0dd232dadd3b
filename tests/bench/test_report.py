"""The report: which records it takes, what it says of targets, and that it is always the same."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import decode, serve, suite
from bench.__main__ import main
from bench.benches import BENCHES, load, view_of
from bench.summary import draw_all, latest, markdown, runs_of
from bench.targets import Target, speed_ratio
from bench.views import plain
from pyllamabatch.report.records import Record, append
from tests.support import made_up_rows


def row(
    arm: str, speed: float, pl: int = 1, run: int = 1, error: str = "", **detail: Any
) -> Record:
    made = made_up_rows.row(arm, pl, speed, bench="decode", error=error, **detail)
    time = f"2026-01-0{run}T00:00:00+00:00"
    return replace(made, run_id=str(run), test_time=time, versions={"commit": f"code {run}"})


def bench(**parts: Any) -> Any:
    return SimpleNamespace(__doc__="About it.", **{"TARGETS": (), **parts})


def report(rows: Sequence[Record], benches: dict[str, Any]) -> str:
    runs = runs_of(rows)
    return markdown(latest(runs), {}, benches, runs)


def test_of_each_number_of_sequences_the_latest_run_counts() -> None:
    rows = [row("old", 1.0, pl=1), row("old", 1.0, pl=4)]
    rows += [row("new", 2.0, pl=4, run=2), row("base", 2.0, pl=4, run=2)]
    rows += [replace(row("other", 2.0, pl=4, run=3), kv_unified=True)]
    groups = latest(runs_of(rows[::-1]))
    assert [sorted({made.arm for made in group}) for group in groups.values()] == [
        ["base", "new", "old"],
        ["other"],
    ]
    assert [made.pl for made in next(iter(groups.values())) if made.arm == "old"] == [1]
    assert ["streams" in setting.settings for setting in groups] == [True, False]


def test_clients_are_another_load_than_as_many_streams() -> None:
    rows = [row("clients", 1.0, pl=4, mixed=1.0), row("streams", 1.0, pl=4, run=2)]
    ((one, two),) = latest(runs_of(rows)).values()
    assert {one.arm, two.arm} == {"clients", "streams"}


def test_busy_processes_and_other_arrivals_are_other_loads() -> None:
    rows = [row("engine", 1.0), row("engine", 2.0, run=2, busy=1.0)]
    rows += [row("engine", 3.0, run=3, load=0.8)]
    (group,) = latest(runs_of(rows)).values()
    assert [made.test_time[8:10] for made in group] == ["01", "02", "03"]


def test_a_target_is_measured_by_the_latest_run_that_has_its_arms() -> None:
    target = Target("over base", speed_ratio("ours", "base", 1), at_least=2.0)
    rows = [row("ours", 4.0), row("base", 4.0)]
    rows += [row("ours", 9.0, run=2), row("base", 3.0, run=2)]
    rows += [row("ours", 5.0, run=3), row("other", 1.0, run=3)]
    assert "| over base | ≥ 2 | 3 | met |" in report(rows, {"decode": bench(TARGETS=(target,))})


def test_runs_of_the_same_code_are_one() -> None:
    """Processes of their own, one after the other, some with more arms: all pairs count."""
    target = Target("over base", speed_ratio("ours", "base", 1))
    rows = [row("ours", 9.0), row("base", 1.0)]  # of code before
    for run, speed in ((2, 3.0), (3, 4.0), (4, 8.0)):
        ours, base = row("ours", speed, run=run), row("base", 1.0, run=run)
        rows += [replace(one, versions={"commit": "new"}) for one in (ours, base)]
    text = report(rows, {"decode": bench(TARGETS=(target,))})
    assert re.search(r"\| over base \| .* \| 4 \| met \|", text)
    assert "commit new" in text
    assert "medians of 3." in text
    rows.append(replace(row("other", 1.0, run=4), versions={"commit": "new"}))
    text = report(rows, {"decode": bench(TARGETS=(target,))})
    assert re.search(r"\| over base \| .* \| 4 \| met \|", text)
    text = report([*rows, row("ours", 5.0, run=5)], {"decode": bench(TARGETS=(target,))})
    assert re.search(r"\| over base \| .* \| 4 \| met \|", text)


def test_another_sampling_is_another_table() -> None:
    """A later run of one of them alone counts for this one. What samples nothing is beside all."""
    rows = [replace(row("ours", v), sampling=s) for v, s in ((1.0, "greedy"), (2.0, "default"))]
    rows.append(replace(row("ours", 3.0, run=2), sampling="greedy"))
    groups = latest(runs_of(rows))
    assert [[made.speed_tg for made in mine] for mine in groups.values()] == [[2.0], [3.0]]
    target = Target("ours over itself", speed_ratio("ours", "ours", 1))
    text = report(rows, {"decode": bench(TARGETS=(target,))})
    assert re.findall(r"\| ours over itself \| .* \| m-Q4_K_M, .*sampling (\w+) \|", text) == [
        "default",
        "greedy",
    ]
    (group,) = latest(runs_of([*rows[:1], replace(row("base", 9.0), sampling="none")])).values()
    assert {made.arm for made in group} == {"ours", "base"}


def test_a_later_run_of_fewer_loads_does_not_judge_the_others() -> None:
    """A figure of any load, the smallest: a run that has one load has no word on the rest."""

    def smallest(records: Sequence[Record]) -> float | None:
        return min((r.speed_tg for r in records if r.arm == "ours"), default=None)

    bound = {"decode": bench(TARGETS=(Target("smallest", smallest, at_least=2.0),))}
    rows = [row("ours", 4.0), row("ours", 1.0, pl=4), row("ours", 3.0, run=2)]
    assert "| smallest | ≥ 2 | 1 | **missed** |" in report(rows, bound)
    rows += [row("ours", 5.0, run=3), row("ours", 6.0, pl=4, run=3)]
    assert "| smallest | ≥ 2 | 5 | met |" in report(rows, bound)


def test_targets_are_met_missed_or_not_measured() -> None:
    targets = tuple(
        Target(f"at {pl}", speed_ratio("ours", "base", pl), at_least=2.0) for pl in (1, 4, 16)
    )
    rows = [row("base", 4.0), row("ours", 8.0), row("base", 3.0, pl=4), row("ours", 4.0, pl=4)]
    text = report(rows, {"decode": bench(TARGETS=targets)})
    assert "| at 1 | ≥ 2 | 2 | met |" in text
    assert "| at 4 | ≥ 2 | 1.33 | **missed** |" in text
    assert "| at 16 | ≥ 2 | not measured |" in text
    assert "commit code 1, llama.cpp b11549, seed 1" in text
    assert "that this code does not have: decode" in report(rows, {})


def test_a_bench_without_a_view_shows_medians_and_details() -> None:
    rows = [row("ours", 4.0, wait_s=1.0), row("ours", 8.0, wait_s=2.0)]
    text = plain([*rows, row("lost", 0.0, error="broken")])
    assert "| arm | sequences | tokens/s | completed | total_tokens_sampled | wait_s |" in text
    assert "| ours | 1 | 6.0 | 1 | 100 | 1.5 |" in text
    assert text.endswith("|\n\n- lost: no result: broken")


@pytest.mark.parametrize("name", ["decode", "policies", "sampler", "scheduler", "width"])
def test_a_bench_whose_arms_all_failed_says_why(name: str) -> None:
    assert "lost: no result: broken" in view_of(load(name))([row("lost", 0.0, error="broken")])


def test_a_page_that_no_report_has_made_stays(tmp_path: Path) -> None:
    append(tmp_path / "rows.jsonl", [row("ours", 1.0)])
    page = tmp_path / "README.md"
    page.write_text("# A project\n")
    with pytest.raises(SystemExit, match="is no report: name another folder with --out"):
        main(["report", str(tmp_path / "rows.jsonl")])
    assert page.read_text() == "# A project\n"
    assert not (tmp_path / "plots").exists()


def test_the_report_of_the_committed_records(tmp_path: Path) -> None:
    assert main(["report", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    plots = {path.name for path in tmp_path.rglob("*.svg")}
    assert len(plots) > 1
    assert all(f"(plots/{name})" in page for name in plots)
    for name in BENCHES:
        assert f"## {name}\n" in page
        assert all(t.text.replace("|", "\\|") in page for t in load(name).TARGETS)


def test_plots_that_are_not_made_again_go(tmp_path: Path) -> None:
    append(tmp_path / "rows.jsonl", [row("ours", 1.0), row("ours", 1.0, pl=2)])
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "old.svg").write_text("")
    assert main(["report", str(tmp_path)]) == 0
    (plot,) = (tmp_path / "plots").iterdir()
    assert plot.read_text(encoding="utf-8").count("ours") == 1
    files = (plot, tmp_path / "README.md")
    before = [file.read_bytes() for file in files]
    assert main(["report", str(tmp_path)]) == 0
    assert [file.read_bytes() for file in files] == before  # the same twice
    assert main(["report", "--no-plots", str(tmp_path / "rows.jsonl")]) == 0
    assert "![" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="no such file"):
        main(["report", str(tmp_path / "absent")])


def test_every_bench_can_be_run_by_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []

    def run(words: list[str], seconds: float) -> int:
        assert 0 < seconds <= suite.QUICK_LIMIT_S
        calls.append(words)
        return int(words[0] == BENCHES[0])

    monkeypatch.setattr(suite, "tool", lambda name: Path(name))
    monkeypatch.setattr(suite, "resolve", lambda name: None)
    monkeypatch.setattr(suite, "_run", run)
    assert main(["all", "--quick", "--out", str(tmp_path)]) == 1
    assert calls == [[name, "--quick", "--out", str(tmp_path)] for name in BENCHES]
    assert f"not complete: {BENCHES[0]}" in capsys.readouterr().out


def test_a_bench_that_outlasts_the_suite_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child ends by SIGTERM, so within seconds and with a status."""
    words = ["sampler", "--vocab", "6400", "--repeats", "1000000", "--out", str(tmp_path)]
    assert suite._run(words, 1.0) != 0
    assert "is over" in capsys.readouterr().out


def test_the_benches_show_their_own_records() -> None:
    assert decode.view([row("engine", 1.0)]).startswith("| B |")
    assert serve.view([row("engine", 1.0)]).startswith("| clients |")


def test_a_bench_may_name_its_records_otherwise_and_draw_them_itself(tmp_path: Path) -> None:
    """One invocation may have records of two names: two settings, one heading."""
    rows = [row("ours", 1.0), row("ours", 1.0, pl=2)]
    rows += [replace(made, bench="other") for made in rows]
    groups = latest(runs_of(rows))
    assert [setting.bench for setting in groups] == ["decode", "other"]
    drawn: list[tuple[str, int]] = []

    def draw(mine: Sequence[Record], path: Path) -> None:
        drawn.append((mine[0].bench, len(mine)))
        path.write_text("<svg>", encoding="utf-8")

    drawings = draw_all(groups, {"other": draw}, tmp_path)
    assert [setting.bench for setting in drawings] == ["other"]
    assert drawn == [("other", 2)]
    text = markdown(groups, drawings, {"decode": bench(NAMES=("decode", "other"))}, runs_of(rows))
    assert text.count("## decode") == 1
    assert text.count("### m-Q4_K_M: ") == 2
    assert "(plots/other-m-" in text
    assert "does not have" not in text
