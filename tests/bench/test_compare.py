"""The bench of the four ways to serve N users: plans, targets, views, and a small real run."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import compare, harness
from bench.__main__ import main
from bench.benches import load
from bench.summary import latest, markdown, runs_of
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import Profile
from pyllamabatch.report.meters import OtherCores
from pyllamabatch.report.records import Record, read
from tests.support.made_up_rows import row


def on_h200(arm: str, n: int, speed: float, bench: str = "compare") -> Record:
    return replace(row(arm, n, speed, bench=bench, gpu="NVIDIA H200"), model_type="gemma3 1B Q4_K")


def test_targets_are_of_the_burst_alone() -> None:
    rows = [on_h200("single", 1, 400)]
    for n, ratio in ((2, 1.5), (16, 2.0)):
        rows += [on_h200("contexts", n, 500), on_h200("engine", n, 500 * ratio)]
    rows += [on_h200("contexts", 4, 9, "compare-ds4"), on_h200("engine", 4, 90, "compare-ds4")]
    targets = [target for target in compare.TARGETS if target.where == compare.ON_H200]
    found = {target.text.split(",")[0]: target for target in targets}
    measured = {text: target.measured(rows) for text, target in found.items()}
    assert measured["N = 2: engine over contexts"] == pytest.approx(1.5)
    assert measured["N = 2: engine over one user alone"] == pytest.approx(750 / 400)
    assert measured["N = 16: engine over contexts"] == pytest.approx(2.0)
    assert measured["N = 4: engine over contexts"] is None
    assert [text for text, t in found.items() if (m := measured[text]) and t.met_by(m)] == [
        "N = 2: engine over contexts"
    ]
    assert found["N = 2: engine over contexts"].measured([row("engine", 2, 9)]) is None


def test_the_profile_of_cotabbys_mac_has_its_ratios() -> None:
    """Contexts compute a row at a time, one after the other; a shared context a row of each."""
    profile = Profile.load(
        Path(compare.__file__).parent / "profiles/m-series-gemma-3-1b-q4_k_m.json"
    )
    cost = CostModel.fit(profile, unified=False)

    def speed(n: int) -> float:
        return n / cost.predict(n, 0, 356 * n, n)

    for n, ratio in compare.SHARED_OVER_CONTEXTS.items():
        assert speed(n) / speed(1) == pytest.approx(ratio, rel=0.03)
    assert speed(4) / speed(1) == pytest.approx(266 / 132, rel=0.03)


def test_the_report_has_the_table_of_each_protocol_and_the_advice_once() -> None:
    rows = [row("contexts", 2, 50), row("engine", 2, 90)]
    rows += [row(arm, 2, 40, bench="compare-ds4") for arm in ("contexts", "engine")]
    text = markdown(latest(runs_of(rows)), {}, {"compare": load("compare")}, runs_of(rows))
    assert text.count("| N | arm |") == 2
    assert text.count("- 2 users: engine, 90 tok/s") == 1
    assert text.count("- Overall, with") == 1
    assert "does not have" not in text


def test_runs_that_others_disturb_are_made_again_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = iter([0.5, 0.5, 0.01])
    waited: list[float] = []
    monkeypatch.setattr(compare, "wait_for_quiet", waited.append)
    monkeypatch.setattr(OtherCores, "used", lambda _: next(used))
    words = ["--quick", "--model", "default", "-N", "2", "--arms", "contexts", "--threads", "1"]
    out = tmp_path / "rows.jsonl"
    assert main(["compare", *words, "--undisturbed", "0.1", "--out", str(out)]) == 0
    (only,) = read(out)
    assert (only.detail["other_cpu"], only.detail["disturbed_runs"]) == (0.01, 2)
    assert waited == [0.1] * 3


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--quick", "--model", "default", "-N", "2", "--arms", "contexts,engine"]
    assert main(["compare", *words, "--threads", "1", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    rows = list(read(file))
    assert [(r.bench, r.arm, r.pl) for r in rows] == [
        ("compare", "contexts", 2),
        ("compare", "engine", 2),
    ]
    assert all(r.speed_tg > 0 and r.tg == 15 and not r.error for r in rows)
    assert {r.versions["commit"] for r in rows} == {harness.commit()}
    assert file.name.startswith("compare-default-")
    if sys.platform == "linux":
        assert all(r.detail["rss_bytes"] > 0 for r in rows)
    assert main(["compare", *words, "--budget", "0", "--out", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "none").exists()
    out = capsys.readouterr().out
    assert "| 2 | engine |" in out
    assert "- 2 users: " in out
