"""Progress on a terminal, in a pipe, and without rich."""

from __future__ import annotations

import io
import sys
from typing import Any

from pyllamabatch.cli import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: Any) -> Terminal:
    """In the test itself: pytest puts its own stream in place after the fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    return terminal


def test_a_bar_on_a_terminal(monkeypatch: Any) -> None:
    terminal = use_terminal(monkeypatch)
    with console.progress(10) as bar:
        assert isinstance(bar, console.BarProgress)
        bar.update(3, 30)
        bar.note("in.jsonl:7: [id] 'x': bad")
        bar.update(10, 100)
    assert "in.jsonl:7: [id] 'x': bad" in terminal.getvalue()
    assert "10/10" in terminal.getvalue()


def test_without_rich_a_message_and_plain_lines(monkeypatch: Any) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with console.progress(10) as bar:
        assert isinstance(bar, console.PlainProgress)
    assert "install pyllamabatch[cli]" in terminal.getvalue()


def test_plain_lines_in_a_pipe(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(console.PlainProgress, "EVERY_S", 0.0)
    with console.progress(10) as bar:
        assert isinstance(bar, console.PlainProgress)
        bar.update(3, 30)
        bar.note("a note")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("3 of 10 done, ")
    assert lines[1] == "a note"


def test_quiet_shows_notes_only(monkeypatch: Any) -> None:
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(console.PlainProgress, "EVERY_S", 0.0)
    with console.progress(None, quiet=True) as bar:
        bar.update(3, 30)
        bar.note("a note")
    assert terminal.getvalue() == "a note\n"
