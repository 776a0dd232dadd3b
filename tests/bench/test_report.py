"""The report: which rows it takes, what it says of targets, and that it is always the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import plots, schema, suite
from bench.__main__ import BENCHES, load, main, shown
from bench.case import Arm, Case, Measured, case_row
from bench.models import BenchModel
from bench.summary import Shown, latest, markdown, plain
from bench.targets import Target, speed_ratio

FACTS = {
    "backends": "CPU",
    "gpu_info": "",
    "build_number": 11549,
    "build_commit": "b11549",
    "build_options": "",
    "versions": {"commit": "abc"},
    "model_type": "qwen2",
    "model_size": 1,
    "model_n_params": 1,
    "load_average": 0.5,
}


def row(
    arm: str, t_tg: float, *, pl: int = 1, run: str = "1", unified: bool = False, error: str = ""
) -> schema.Row:
    model = BenchModel(Path("m.gguf"), "m", 7)
    case = Case(model, pp=32, tg=16, pl=pl, n_threads=2, sampling="default", seed=1)
    case = dataclasses.replace(case, kv_unified=unified)
    measured = Measured(0.0, t_tg, detail={"wait_s": t_tg / 2})
    if error:
        measured = Measured.failed(error)
    facts = FACTS | {"test_time": f"2026-01-0{run}T00:00:00+00:00"}
    return case_row("decode", Arm(arm, "", True, lambda c: measured), case, measured, facts, run, 0)


def test_of_each_number_of_sequences_the_latest_run_counts() -> None:
    rows = [row("old", 1.0, pl=1), row("old", 1.0, pl=4)]
    rows += [row("new", 2.0, pl=4, run="2"), row("base", 2.0, pl=4, run="2")]
    rows += [row("other", 2.0, pl=4, run="3", unified=True)]
    groups = latest(rows[::-1])
    assert [sorted({made.arm for made in group}) for group in groups.values()] == [
        ["base", "new", "old"],
        ["other"],
    ]
    assert [made.pl for made in next(iter(groups.values())) if made.arm == "old"] == [1]
    assert ["streams" in setting.settings for setting in groups] == [True, False]


def test_clients_are_another_load_than_as_many_streams() -> None:
    mixed = row("clients", 1.0, pl=4)
    mixed.detail["mixed"] = 1.0
    ((one, two),) = latest([mixed, row("streams", 1.0, pl=4, run="2")]).values()
    assert {one.arm, two.arm} == {"clients", "streams"}


def test_targets_are_met_missed_or_not_measured() -> None:
    targets = tuple(
        Target(f"at {pl}", speed_ratio("ours", "base", pl), at_least=2.0) for pl in (1, 4, 16)
    )
    rows = [row("base", 4.0), row("ours", 2.0), row("base", 4.0, pl=4), row("ours", 3.0, pl=4)]
    shown = {"decode": Shown("about", targets, plain)}
    text = markdown(latest(rows), {}, shown)
    assert "| at 1 | ≥ 2 | 2 | met |" in text
    assert "| at 4 | ≥ 2 | 1.33 | **missed** |" in text
    assert "| at 16 | ≥ 2 | not measured | | |" in text
    assert "commit abc, llama.cpp b11549, seed 1" in text
    assert "that this code does not have: decode" in markdown(latest(rows), {}, {})


def test_a_bench_without_a_view_shows_medians_and_details() -> None:
    text = plain([row("ours", 2.0), row("ours", 4.0), row("lost", 1.0, error="broken")])
    assert "| arm | sequences | tokens/s | wait_s |" in text
    assert "| ours | 1 | 6.0 | 1.5 |" in text
    assert text.endswith("lost: no result: broken")


def test_the_report_of_the_committed_rows_is_the_same_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert main(["report", "--out", str(tmp_path / name)]) == 0
    files = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("one", "two")]
    assert len(files[0]) == len(files[1]) > 1
    for one, two in zip(*files, strict=True):
        assert one.read_bytes() == two.read_bytes()
    page = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    plots = {path.name for path in files[0] if path.suffix == ".svg"}
    assert all(f"(plots/{name})" in page for name in plots)
    for name in BENCHES:
        assert f"## {name}\n" in page
        assert all(target.text in page for target in load(name).TARGETS)


def test_plots_that_are_not_made_again_go(tmp_path: Path) -> None:
    schema.append(tmp_path / "rows.jsonl", [row("ours", 1.0), row("ours", 1.0, pl=2)])
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "old.svg").write_text("")
    assert main(["report", str(tmp_path)]) == 0
    (plot,) = (tmp_path / "plots").iterdir()
    assert plot.read_text(encoding="utf-8").count("ours") == 1
    assert main(["report", "--no-plots", str(tmp_path / "rows.jsonl")]) == 0
    assert "![" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="no such file"):
        main(["report", str(tmp_path / "absent")])


def test_every_bench_can_be_run_by_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, tuple[str, ...]]] = []

    def run(name: str, arguments: tuple[str, ...], folder: Path, seconds: float) -> int:
        assert folder == tmp_path
        assert 0 < seconds <= suite.QUICK_LIMIT_S
        calls.append((name, arguments))
        return int(name == BENCHES[0])

    monkeypatch.setattr(suite, "tool", lambda name: Path(name))
    monkeypatch.setattr(suite, "resolve", lambda name: None)
    monkeypatch.setattr(suite, "_run", run)
    assert main(["all", "--quick", "--out", str(tmp_path)]) == 1
    assert [name for name, _ in calls] == list(BENCHES)
    assert dict(calls) == {name: load(name).QUICK for name in BENCHES}
    assert f"not complete: {BENCHES[0]}" in capsys.readouterr().out


def test_a_bench_that_outlasts_the_suite_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The child ends by SIGTERM, so within seconds and with a status."""
    arguments = ("--vocab", "6400", "--repeats", "1000000")
    assert suite._run("sampler", arguments, tmp_path, 1.0) != 0
    assert "is over" in capsys.readouterr().out


def test_the_benches_show_their_own_rows() -> None:
    for name in BENCHES:
        assert shown(load(name)).about
    assert shown(load("decode")).view([row("engine", 1.0)]).startswith("| B |")
    assert shown(load("serve")).view([row("engine", 1.0)]).startswith("| clients |")


def test_a_bench_may_name_its_rows_otherwise_and_draw_them_itself(tmp_path: Path) -> None:
    """One invocation may have rows of two names: two settings, one heading."""
    rows = [row("ours", 1.0), row("ours", 1.0, pl=2)]
    rows += [dataclasses.replace(made, bench="other") for made in rows]
    groups = latest(rows)
    assert [setting.bench for setting in groups] == ["decode", "other"]
    drawn: list[tuple[str, int]] = []

    def draw(mine: Sequence[schema.Row], path: Path) -> None:
        drawn.append((mine[0].bench, len(mine)))
        path.write_text("<svg>", encoding="utf-8")

    drawings = plots.draw_all(groups, {"other": draw}, tmp_path)
    assert [setting.bench for setting in drawings] == ["other"]
    assert drawn == [("other", 2)]
    shown = {"decode": Shown("about", (), plain, draw, ("decode", "other"))}
    text = markdown(groups, drawings, shown)
    assert text.count("## decode") == 1
    assert text.count("### m: ") == 2
    assert "(plots/other-m-" in text
    assert "does not have" not in text
