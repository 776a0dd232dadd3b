"""Text and progress on a terminal, in a pipe, and without rich."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

from pyllamabatch.cli.console import Progress, say, show
from pyllamabatch.report.tables import Table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: Any) -> Terminal:
    """In the test itself: pytest puts its own stream in place after the fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return terminal


def test_a_bar_on_a_terminal(monkeypatch: Any) -> None:
    terminal = use_terminal(monkeypatch)
    with Progress("generate", 10) as progress:
        progress.update(3, "7.5 tok/s")
        progress.note("in.jsonl:7: [id] 'x': bad")
        progress.update(10)
    assert "in.jsonl:7: [id] 'x': bad" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()


def test_a_share_is_shown_in_percent(monkeypatch: Any) -> None:
    terminal = use_terminal(monkeypatch)
    with Progress("loading") as progress:
        progress.update(0.25)
    assert "25%" in terminal.getvalue()


def test_without_rich_a_message_and_plain_lines(monkeypatch: Any) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(Progress, "EVERY_S", 0.0)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with Progress("generate", 10) as progress:
        progress.update(3)
    assert "install pyllamabatch[cli]" in terminal.getvalue()
    assert "generate: 3/10\n" in terminal.getvalue()


def test_plain_lines_in_a_pipe(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(Progress, "EVERY_S", 0.0)
    with Progress("generate", 10) as progress:
        progress.update(3, "7.5 tok/s")
        progress.note("a note")
    assert capsys.readouterr().err == "generate: 3/10 7.5 tok/s\na note\n"


def test_quiet_shows_notes_only(monkeypatch: Any) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(Progress, "EVERY_S", 0.0)
    with Progress("generate", None, quiet=True) as progress:
        progress.update(3)
        progress.note("a note")
    assert terminal.getvalue() == "a note\n"


def test_text_on_a_terminal_breaks_between_words(monkeypatch: Any) -> None:
    terminal = use_terminal(monkeypatch)
    text = "  " + "word-with-dashes and a rather long-winded rest, " * 4
    say(text, terminal)
    lines = terminal.getvalue().splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert [line[:4].isspace() for line in lines] == [False, True, True]
    assert " ".join(terminal.getvalue().split()) == " ".join(text.split())


def test_text_in_a_pipe_stays_as_it_is(capsys: Any) -> None:
    say("word " * 40)
    assert capsys.readouterr().out == "word " * 40 + "\n"


def test_a_table_breaks_in_its_cells(monkeypatch: Any, capsys: Any) -> None:
    heads = ["", *(f"policy-{i}:with=options" for i in range(6))]
    table = Table(heads, [["TTFT, median, ms", *map(str, range(6))]])
    show(table)
    assert capsys.readouterr().out == table.plain() + "\n"
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(sys, "stdout", terminal)
    show(table)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[-6:] == list("012345") for line in lines)
