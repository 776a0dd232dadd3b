"""Two checkouts side by side: what is run, and how their records become ratios."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.pair import compared, speeds

PACKAGE = "pyllamabatch"
BENCH = """
import json, sys
from pathlib import Path
import pyllamabatch
name, speed, out = sys.argv[1], float(sys.argv[2]), Path(sys.argv[4])
record = {"bench": name, "arm": "engine", "pl": 4, "error": "", "detail": {"waiting": 7.0}}
with out.open("a") as file:
    file.write(json.dumps(record | {"speed_tg": speed * pyllamabatch.FACTOR}) + "\\n")
with (out.parent / "order").open("a") as file:
    file.write(out.stem + " ")
"""


def checkout(folder: Path, package: str, factor: float) -> Path:
    """A repository whose bench measures its argument times `factor`."""
    for part, files in (
        (package, {"__init__.py": f"FACTOR = {factor}", "raw.py": ""}),
        ("bench", {"__main__.py": BENCH}),
    ):
        (folder / part).mkdir(parents=True)
        for name, text in files.items():
            (folder / part / name).write_text(text)
    return folder


def test_the_order_changes_with_every_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = checkout(tmp_path / "old", f"src/{PACKAGE}", 2.0)
    new = checkout(tmp_path / "new", PACKAGE, 3.0)
    words = ["pair", "--before", str(old), "--after", str(new), "--rounds", "3"]
    words += ["--out", str(tmp_path / "out")]
    assert main([*words, "--", "decode", "10"]) == 0
    order = (tmp_path / "out" / "order").read_text().split()
    assert order == ["before", "after", "after", "before", "before", "after"]
    printed = capsys.readouterr().out
    assert "| engine | 4, waiting 7 | 20.0 | 30.0 | 1.500 | 1.500 |" in printed
    assert main([*words, "--at-least", "1.6", "--", "decode", "10"]) == 1
    with pytest.raises(SystemExit, match="no result"):
        main([*words, "--", "decode", "ten"])
    for wrong, says in (
        (["--before", str(tmp_path / "none")], "none: no such folder"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
    ):
        with pytest.raises(SystemExit, match=says):
            main([*words, *wrong, "--", "decode", "10"])
    (new / PACKAGE / "raw.py").unlink()
    with pytest.raises(SystemExit, match="new: imports Traceback"):
        main([*words, "--", "decode", "10"])


def test_figures_are_told_apart_by_arm_and_load(tmp_path: Path) -> None:
    def record(arm: str, speed: float, error: str = "", **detail: float) -> dict[str, Any]:
        given = {"bench": "b", "arm": arm, "pl": 2, "speed_tg": speed}
        return {**given, "detail": detail, "error": error}

    file = tmp_path / "records.jsonl"
    made = [record("x", 1.0), record("x", 3.0, mixed=1.0), record("x", 5.0, other_cpu=0.5)]
    made += [record("x", 0.0, "broken"), record("y", 7.0)]
    file.write_text("\n".join(map(json.dumps, made)))
    found = speeds(file)
    expected = {
        ("b", "x", "2"): [1.0, 5.0],
        ("b", "x", "2, mixed 1"): [3.0],
        ("b", "y", "2"): [7.0],
    }
    assert found == expected
    assert compared({("b", "x", "2"): [1.0, 2.0]}, found, max) == {("b", "x", "2"): 2.5}
