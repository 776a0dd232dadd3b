"""`pyllamabatch demo`: right answers, and the exit status that says so."""

import io
import re
from dataclasses import replace
from typing import Any

import pytest

from pyllamabatch.cli import demo, main
from pyllamabatch.models import DefaultPrompt, default_prompts
from tests.support.child import python


def test_plain_lines_without_a_terminal() -> None:
    done = python("-m", "pyllamabatch", "demo", "--prompts", "9", "-t", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert len(re.findall(r"\((right|WRONG.*)\)$", done.stdout, re.MULTILINE)) == 9
    line = r"\d+ tokens in .* tok/s, \d of 9 right; \d+ steps, .* rows a step$"
    assert re.search(rf"^9 at once: {line}", done.stdout, re.M)
    assert re.search(rf"^one by one: {line}", done.stdout, re.M)
    assert "times as fast" in done.stdout
    assert re.search(r"^  rows in a step +1 +2 +4 +8 +16 +32$", done.stdout, re.M)


def test_wrong_answers_end_with_1(monkeypatch: Any, capsys: Any) -> None:
    wrong = [replace(task, answer="something else") for task in default_prompts()]
    monkeypatch.setattr(demo, "default_prompts", lambda: wrong)
    assert main(["demo", "--prompts", "4", "--plain", "-t", "1"]) == 1
    assert "0 of 4 right" in capsys.readouterr().out


@pytest.mark.parametrize("n", ["0", "33", "many"])
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

    tasks = [
        DefaultPrompt("copy", "Copy: hello", "hello"),
        DefaultPrompt("copy", "x" * 300 + " the end?", "y"),
    ]
    console = Console(file=io.StringIO(), force_terminal=True, width=90, height=40)
    board = demo.Board(tasks, console)

    def drawn() -> str:
        with console.capture() as capture:
            console.print(board.table())
        return re.sub(r"\x1b\[[0-9;]*m", "", capture.get())

    assert "2 prompts at once" in drawn()
    board.streams = [HalfWay(), Done()]  # type: ignore[list-item]
    text = drawn()
    assert "hel" in text
    assert "4 tokens" in text
    assert text.count("✓") == 1
    board.streams = [Done(), Done()]  # type: ignore[list-item]
    text = drawn()
    assert text.count("✓") == text.count("✗") == 1
    assert "the end?" in text
    assert max(map(len, text.splitlines())) <= 90
    board.n_alone = 1
    assert "one by one: 1 of 2" in drawn()
