"""Where progress is shown: a live display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

_MISSING = "live display off: rich is not installed (install pyllamabatch[cli])"


def live_console(*, plain: bool = False, stderr: bool = True) -> Console | None:
    """A rich console if there is a terminal to draw on and rich is installed, else None."""
    stream = sys.stderr if stderr else sys.stdout
    if plain or not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        print(_MISSING, file=sys.stderr)
        return None
    console = Console(stderr=stderr)
    return console if console.is_terminal and not console.is_dumb_terminal else None


class Progress(Protocol):
    """How far a run of many requests is. A context manager."""

    def update(self, n_done: int, n_tokens: int) -> None: ...
    def note(self, text: str) -> None:
        """One line about one request, above the progress."""
        ...

    def __enter__(self) -> Progress: ...
    def __exit__(self, *error: object) -> None: ...


def progress(total: int | None, *, quiet: bool = False) -> Progress:
    """Progress on the standard error; `total` is None if nobody knows it yet."""
    console = None if quiet else live_console()
    return PlainProgress(total, quiet=quiet) if console is None else BarProgress(total, console)


class PlainProgress:
    """A line every few seconds."""

    EVERY_S = 5.0

    def __init__(self, total: int | None, *, quiet: bool = False) -> None:
        self._of = "" if total is None else f" of {total}"
        self._quiet = quiet
        self._began = self._shown = time.monotonic()

    def update(self, n_done: int, n_tokens: int) -> None:
        now = time.monotonic()
        if self._quiet or now - self._shown < self.EVERY_S:
            return
        self._shown = now
        rate = n_tokens / (now - self._began)
        print(f"{n_done}{self._of} done, {rate:.1f} tok/s", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class BarProgress:
    """A bar with the number of requests, tokens per second and the time that is left."""

    def __init__(self, total: int | None, console: Console) -> None:
        from rich import progress as rich_progress

        self._began = time.monotonic()
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("generate"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[rate]:.1f} tok/s"),
            rich_progress.TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("generate", total=total, rate=0.0)

    def update(self, n_done: int, n_tokens: int) -> None:
        rate = n_tokens / max(time.monotonic() - self._began, 1e-9)
        self._bar.update(self._task, completed=n_done, rate=rate)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


class RunsDisplay(Protocol):
    """How far a comparison of many runs is. A context manager."""

    def running(self, what: str) -> None: ...
    def done(self, result: str) -> None: ...
    def __enter__(self) -> RunsDisplay: ...
    def __exit__(self, *error: object) -> None: ...


def runs_display(total: int, *, quiet: bool = False) -> RunsDisplay:
    """A line for each run on the standard error, on a terminal with a bar below."""
    console = None if quiet else live_console()
    return PlainRuns(total, quiet=quiet) if console is None else BarRuns(total, console)


class PlainRuns:
    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total = total
        self._n_done = 0
        self._quiet = quiet

    def running(self, what: str) -> None: ...

    def done(self, result: str) -> None:
        self._n_done += 1
        if not self._quiet:
            print(f"{self._n_done:>4}/{self._total}  {result}", file=sys.stderr, flush=True)

    def __enter__(self) -> PlainRuns:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class BarRuns:
    def __init__(self, total: int, console: Console) -> None:
        from rich import progress as rich_progress

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("compare", total=total)

    def running(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def done(self, result: str) -> None:
        self._bar.console.print(result, markup=False, highlight=False, soft_wrap=True)
        self._bar.advance(self._task)

    def __enter__(self) -> BarRuns:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
