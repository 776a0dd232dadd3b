"""What the demo shows while it runs: a live table, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pyllamabatch.cli.console import live_console
from pyllamabatch.models.tasks import Task

if TYPE_CHECKING:
    from rich.console import Console, ConsoleRenderable

    from pyllamabatch.engine.stream import Stream


class Board(Protocol):
    """Shows the answers as they come. A context manager; the calls come from one thread."""

    def watch(self, streams: Sequence[Stream]) -> None:
        """The streams that now answer the tasks, in their order."""
        ...

    def answered(self, i: int, text: str) -> None:
        """The whole answer of task `i` in the first pass."""
        ...

    def one_by_one(self, n_done: int) -> None: ...

    def __enter__(self) -> Board: ...
    def __exit__(self, *error: object) -> None: ...


def board(tasks: Sequence[Task], *, plain: bool) -> Board:
    console = live_console(plain=plain, stderr=False)
    return PlainBoard(tasks) if console is None else LiveBoard(tasks, console)


def is_right(task: Task, text: str) -> bool:
    return text.strip() == task.answer


def question(task: Task, width: int) -> str:
    """One line of the prompt: its end, where a long one asks its question."""
    text = " ".join(task.prompt.split())
    return text if len(text) <= width else "…" + text[1 - width :]


class PlainBoard:
    """One line for each answer of the first pass."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks

    def watch(self, streams: Sequence[Stream]) -> None:
        print(f"{len(streams)} prompts at once", flush=True)

    def answered(self, i: int, text: str) -> None:
        task = self._tasks[i]
        mark = "right" if is_right(task, text) else f"WRONG, not {task.answer!r}"
        line = f"{i + 1:3} {task.kind:8} {question(task, 44)} -> {text.strip()} ({mark})"
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), flush=True)

    def one_by_one(self, n_done: int) -> None:
        if n_done == 1:
            print("the same prompts one by one", flush=True)

    def __enter__(self) -> PlainBoard:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class LiveBoard:
    """A table with a row for each prompt, redrawn ten times a second by rich's own thread."""

    def __init__(self, tasks: Sequence[Task], console: Console) -> None:
        from rich.live import Live

        self._tasks = tasks
        self._streams: Sequence[Stream] = ()
        self._answers: dict[int, str] = {}
        self._n_alone = 0
        self._began = time.monotonic()
        self._console = console
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=10, screen=False
        )

    def watch(self, streams: Sequence[Stream]) -> None:
        self._streams, self._began = streams, time.monotonic()

    def answered(self, i: int, text: str) -> None:
        self._answers[i] = text

    def one_by_one(self, n_done: int) -> None:
        self._n_alone = n_done

    def _draw(self) -> ConsoleRenderable:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, expand=True, pad_edge=False, title_justify="left")
        table.title = self._title()
        table.add_column("task", width=8, no_wrap=True)
        table.add_column("prompt", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("", width=1)
        table.add_column("answer", ratio=1, no_wrap=True, overflow="ellipsis")
        width = max(10, self._console.width // 2 - 8)
        for i, task in enumerate(self._tasks):
            text, done = self._answer(i)
            mark = Text("")
            if done:
                mark = Text("✓", "green") if is_right(task, text) else Text("✗", "bold red")
            table.add_row(task.kind, Text(question(task, width)), mark, Text(text.strip()))
        return table

    def _title(self) -> str:
        n = len(self._tasks)
        if self._n_alone:
            return f"one by one: {self._n_alone} of {n}"
        title = f"{n} prompts at once"
        if not self._streams or self._answers:
            return title
        n_tokens = sum(len(stream.tokens) for stream in self._streams)
        seconds = max(time.monotonic() - self._began, 1e-3)
        return f"{title}: {n_tokens} tokens, {n_tokens / seconds:.0f} tok/s"

    def _answer(self, i: int) -> tuple[str, bool]:
        """The text of answer `i` so far, and whether it is whole."""
        if i in self._answers:
            return self._answers[i], True
        if not self._streams:
            return "", False
        done = self._streams[i].done  # before its text: what is done has all of it
        return self._streams[i].text, done

    def __enter__(self) -> LiveBoard:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.vertical_overflow = "visible"  # the last picture in full, also if it scrolls
        self._live.stop()
