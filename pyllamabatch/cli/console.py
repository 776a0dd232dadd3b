"""What a person sees: text that breaks between words, and progress.

A terminal gets a live display where rich is installed. A pipe gets plain lines."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from pyllamabatch.report.tables import Table

_MISSING = "live display off: rich is not installed (install pyllamabatch[cli])"
SHARE = 1.0  # the total of a progress that is a share


def say(text: str, stream: TextIO | None = None) -> None:
    """Print text. On a terminal its lines break between words, and go on indented."""
    stream = stream or sys.stdout
    lines = text.split("\n")
    if stream.isatty():
        width = shutil.get_terminal_size().columns
        lines = [part for line in lines for part in _wrapped(line, width)]
    print("\n".join(lines), file=stream, flush=True)


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
        replace_whitespace=False, drop_whitespace=True,
    ) or [""]  # fmt: skip


def show(table: Table) -> None:
    """Print a table. Where a terminal is too narrow for it, cells break, not lines."""
    console = live_console(stderr=False)
    if console is None:
        print(table.plain(), flush=True)
        return
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=None, pad_edge=False)
    for i, head in enumerate(table.heads):
        words = i in table.text
        shown.add_column(Text(head), justify="left" if words else "right", overflow="fold")
    for line in table.lines:
        shown.add_row(*(Text(str(cell)) for cell in line))
    console.print(shown)


def live_console(*, plain: bool = False, stderr: bool = True, hint: bool = True) -> Console | None:
    """A rich console where there is a terminal to draw on and rich is installed, else None.
    hint: say that rich is missing."""
    stream = sys.stderr if stderr else sys.stdout
    if plain or not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        if hint:
            say(_MISSING, sys.stderr)
        return None
    console = Console(stderr=stderr)
    return console if console.is_terminal and not console.is_dumb_terminal else None


class ProgressBar:
    """How far a command is, on the standard error: a bar, or a line every few seconds.

    with ProgressBar("generate", 40) as progress:
        progress.update(3, "120.5 tok/s")
        progress.note("in.jsonl:7: not JSON")
    """

    EVERY_S = 5.0

    def __init__(
        self, title: str, total: float | None = SHARE, *, quiet: bool = False, keep: bool = True
    ) -> None:
        """total: what `update` counts up to, None where it is not known. quiet: notes only.
        keep: leave the bar on the terminal at the end."""
        self._title, self._total, self._quiet = title, total, quiet
        self._shown = time.monotonic()
        console = None if quiet else live_console(hint=keep)  # once a command
        self._bar = None
        if console is not None:
            from rich import progress as rich

            self._bar = rich.Progress(
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.TextColumn("{task.fields[count]}"),
                rich.TextColumn("{task.fields[text]}"),
                rich.TimeRemainingColumn(),
                console=console,
                transient=not keep,
            )
            self._task = self._bar.add_task(title, total=total, count=self._count(0), text="")

    def update(self, done: float, text: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, count=self._count(done), text=text)
        elif not self._quiet and time.monotonic() - self._shown >= self.EVERY_S:
            self._shown = time.monotonic()
            say(f"{self._title}: {self._count(done)} {text}".rstrip(), sys.stderr)

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is None:
            say(text, sys.stderr)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def _count(self, done: float) -> str:
        if self._total == SHARE:
            return f"{done:.0%}"
        return f"{done}" if self._total is None else f"{done}/{self._total}"

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
