"""`pyllamabatch demo`: right answers, and the exit status that says so."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from pyllamabatch.cli import demo, demo_board, main
from pyllamabatch.models.tasks import Task


def test_plain_lines_without_a_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pyllamabatch", "demo", "--prompts", "9"],
        capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert len(re.findall(r"\((right|WRONG.*)\)$", done.stdout, re.MULTILINE)) == 9
    assert re.search(r"^9 at once: \d+ tokens in .* tok/s, \d of 9 right$", done.stdout, re.M)
    assert re.search(r"^one by one: \d+ tokens in .* tok/s, \d of 9 right$", done.stdout, re.M)
    assert "times as fast" in done.stdout


def test_wrong_answers_end_with_1(monkeypatch: Any, capsys: Any) -> None:
    tasks = [replace(task, answer="something else") for task in demo.pick(4, seed=0)]
    monkeypatch.setattr(demo, "pick", lambda n, seed: tasks)
    assert main(["demo", "--prompts", "4", "--plain"]) == 1
    assert "0 of 4 right" in capsys.readouterr().out


def test_the_prompts_differ_and_stay_the_same() -> None:
    tasks = demo.pick(32, seed=0)
    assert len({task.prompt for task in tasks}) == 32
    assert {task.kind for task in tasks} == set(demo.KINDS)
    assert tasks == demo.pick(32, seed=0)
    assert tasks != demo.pick(32, seed=1)


@pytest.mark.parametrize("n", ["0", "129", "many"])
def test_bad_numbers_of_prompts(n: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--prompts", n])
    assert ended.value.code == 2
    assert "--prompts" in capsys.readouterr().err


class HalfWay:
    """A stream that has given some text so far."""

    text, tokens, done = "hel", [1, 2, 3], False


class Done:
    text, tokens, done = "y", [1], True


def test_the_live_table() -> None:
    from rich.console import Console

    tasks = [Task("copy", "Copy: hello", "hello"), Task("copy", "x" * 300 + " the end?", "y")]
    console = Console(file=io.StringIO(), force_terminal=True, width=90, height=40)
    board = demo_board.LiveBoard(tasks, console)

    def drawn() -> str:
        with console.capture() as capture:
            console.print(board._draw())
        return re.sub(r"\x1b\[[0-9;]*m", "", capture.get())

    assert "2 prompts at once" in drawn()
    board.watch([HalfWay(), Done()])  # type: ignore[list-item]
    text = drawn()
    assert "hel" in text
    assert "4 tokens" in text
    assert text.count("✓") == 1
    board.answered(0, " hello\n")
    board.answered(1, "z")
    text = drawn()
    assert text.count("✓") == text.count("✗") == 1
    assert "the end?" in text
    assert max(map(len, text.splitlines())) <= 90
    board.one_by_one(1)
    assert "one by one: 1 of 2" in drawn()
