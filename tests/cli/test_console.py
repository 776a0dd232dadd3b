"""Text and progress on a terminal, in a pipe, and without rich."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.cli.console import ProgressBar, say, show
from pyllamabatch.report.tables import Table
from tests.support.child import ended


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch, name: str = "stderr") -> Terminal:
    """In the test itself: pytest puts its own stream in place after the fixtures."""
    terminal = Terminal()
    monkeypatch.setattr(sys, name, terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return terminal


def run(total: float | None = 10, *, quiet: bool = False) -> None:
    with ProgressBar("generate", total, quiet=quiet) as progress:
        progress.update(3, "7.5 tok/s")
        progress.note("in.jsonl:7: [id] 'x': bad")


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = use_terminal(monkeypatch)
    run()
    assert "in.jsonl:7: [id] 'x': bad" in terminal.getvalue()
    assert "3/10" in terminal.getvalue()
    with ProgressBar("loading") as progress:
        progress.update(0.25)
    assert "25%" in terminal.getvalue()


def test_without_a_bar_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(ProgressBar, "EVERY_S", 0.0)
    plain = "generate: 3/10 7.5 tok/s\nin.jsonl:7: [id] 'x': bad\n"
    run()
    assert capsys.readouterr().err == plain, "in a pipe"
    terminal = use_terminal(monkeypatch)
    run(None, quiet=True)
    assert terminal.getvalue() == "in.jsonl:7: [id] 'x': bad\n"
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with ProgressBar("loading", keep=False):  # the command has another one
        pass
    run()
    assert terminal.getvalue().count("install pyllamabatch[cli]") == 1
    assert terminal.getvalue().endswith(plain)


def test_without_any_output() -> None:
    """As where a shell has closed it, or on Windows a program has no console."""
    closed = "import sys; sys.stdout = sys.stderr = None"
    said = "from pyllamabatch.cli import main; sys.exit(main(['info', '--no-model']))"
    done = ended([sys.executable, "-c", f"{closed}; {said}"])
    assert (done.returncode, done.stderr) == (0, "")


def test_text_breaks_between_words_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text = "  " + "word-with-dashes and a rather long-winded rest, " * 4
    say(text)
    assert capsys.readouterr().out == text + "\n"
    terminal = use_terminal(monkeypatch)
    say(text, terminal)
    lines = terminal.getvalue().splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert [line[:4].isspace() for line in lines] == [False, True, True]
    assert " ".join(terminal.getvalue().split()) == " ".join(text.split())


def test_a_table_breaks_in_its_cells(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    heads = ["", *(f"policy-{i}:with=options" for i in range(6))]
    table = Table(heads, [["TTFT, median, ms", *map(str, range(6))]])
    show(table)
    assert capsys.readouterr().out == table.plain() + "\n"
    terminal = use_terminal(monkeypatch, "stdout")
    show(table)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[-6:] == list("012345") for line in lines)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pyllamabatch gen", ["generate "]),
        ("pyllamabatch generate --overw", ["--overwrite "]),
        ("pyllamabatch compare --protocol burst --kv ", ["streams", "unified"]),
    ],
)
def test_a_shell_completes_commands_and_flags(tmp_path: Path, line: str, words: list[str]) -> None:
    told = tmp_path / "told"
    asked: dict[str, Any] = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(told), "_ARGCOMPLETE_IFS": "\n"}
    done = ended([sys.executable, "-m", "pyllamabatch"], **asked)
    assert done.returncode == 0, done.stderr
    assert told.read_text(encoding="utf-8").split("\n") == words
