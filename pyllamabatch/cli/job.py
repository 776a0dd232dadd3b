"""Run many requests with a bounded number under way, and hand their rows to a sink.

A reader thread pulls input lines; the engine's thread says when a stream has ended; everything
else happens in the thread that calls `Job.run`, which sleeps until one of the two has news.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from pyllamabatch.cli.results import FileSink, ResultsProblem, Row, Sink
from pyllamabatch.cli.rows import BadLine, Request
from pyllamabatch.errors import PyllamabatchError

Item = Request | BadLine


class Handle(Protocol):
    """A request under way."""

    def cancel(self) -> object: ...


H = TypeVar("H", bound=Handle)


class BadRequest(Exception):
    """A request that the model or the engine refuses; the message says why."""


class Job(Generic[H]):
    """One run of `generate`, without knowledge of files, flags or the engine's class."""

    def __init__(
        self,
        items: Iterator[Item],
        sink: Sink,
        start: Callable[[Request, Callable[[], None]], H],
        finish: Callable[[Request, H], Row | None],
        key: Callable[[Item], str],
        *,
        window: int,
        on_progress: Callable[[int, int], None] = lambda n_done, n_tokens: None,
        on_problem: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """`start` begins a request; the callable that it gets is to be called once, from any
        thread, when the request has ended. `finish` waits for the end and makes the row, None if
        the request was cancelled. Both raise BadRequest if it is the request that failed, another
        PyllamabatchError if the engine can't go on. `window`: how many lines may be read beyond
        the last one written, at least 1.
        """
        self._items, self._sink = items, sink
        self._start, self._finish, self._key = start, finish, key
        self._on_progress, self._on_problem = on_progress, on_problem
        self._permits = threading.Semaphore(window)
        self._events: queue.SimpleQueue[Item | int | BaseException | None] = queue.SimpleQueue()
        self._under_way: dict[int, tuple[Request, str, H]] = {}
        self._n_read = self._n_written = self._n_tokens = 0
        self._interrupted = self._stopping = False
        self._old = sink if isinstance(sink, FileSink) else None
        self._early: dict[int, Row] = {}
        self._last_old_line = 0
        self.n_resumed = 0  # rows of an earlier run
        self.n_failed = 0  # error rows written by this run

    def run(self) -> None:
        """Until every line of the input has its row. After an exception `stop` may be called."""
        threading.Thread(target=self._read, name="generate-reader", daemon=True).start()
        reading = True
        while reading or self._under_way:
            event = self._events.get()
            if self._interrupted:
                raise KeyboardInterrupt
            if event is None:
                reading = False
            elif isinstance(event, BaseException):
                raise event
            elif isinstance(event, int):
                self._ended(event)
            else:
                self._take(event)
        if self._old is not None and self._old.next_finished() is not None:
            raise ResultsProblem(
                f"{self._old.path}: holds more rows than the input has lines; "
                "is it the output of another input? KvOperation it away, or use --overwrite"
            )

    def interrupt(self) -> None:
        """Make `run` raise KeyboardInterrupt between two rows. For a signal handler."""
        self._interrupted = True
        self._events.put(None)

    def stop(self) -> None:
        """Cancel what is under way and keep what has finished, after `run` was interrupted."""
        self._stopping = True
        for _, _, handle in self._under_way.values():
            handle.cancel()
        for index in sorted(self._under_way):
            self._ended(index)

    # -- the reader thread ------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while not self._stopping:
                self._permits.acquire()
                item = next(self._items, None)
                self._events.put(item)
                if item is None:
                    return
        except BaseException as error:  # a read error ends the run, not only this thread
            self._events.put(error)

    # -- the calling thread -----------------------------------------------------------------

    def _take(self, item: Item) -> None:
        index, self._n_read = self._n_read, self._n_read + 1
        key = self._key(item)
        if self._old is not None and self._is_finished(index, item, key):
            return
        early = self._early.pop(item.line, None)
        if early is not None and early["key"] == key:
            self.n_resumed += 1
            self._add(index, early)
        elif isinstance(item, BadLine):
            self._fail(index, item, key, item.problem)
        else:
            try:
                handle = self._start(item, lambda: self._events.put(index))
            except BadRequest as problem:
                self._fail(index, item, key, str(problem))
            else:
                self._under_way[index] = (item, key, handle)

    def _is_finished(self, index: int, item: Item, key: str) -> bool:
        """Whether an earlier run wrote the row of `item`; raises if the row is another one's."""
        assert self._old is not None
        row = self._old.next_finished()
        if row is None:
            self._early = self._old.early_rows(self._last_old_line)
            self._old = None
            return False
        if row["line"] != item.line or row["id"] != item.id or row["key"] != key:
            raise ResultsProblem(
                f"{self._old.path}: row {index + 1} (id {row['id']!r}) does not belong to line "
                f"{item.line} (id {item.id!r}) of the input: the line, a sampling flag or the "
                "model has changed since. Go back to what it was, use another --out, or "
                "--overwrite to begin again"
            )
        self._last_old_line = item.line
        self.n_resumed += 1
        self._written(index + 1)
        return True

    def _ended(self, index: int) -> None:
        request, key, handle = self._under_way.pop(index)
        try:
            row = self._finish(request, handle)
        except BadRequest as problem:
            self._fail(index, request, key, str(problem))
        except PyllamabatchError:
            if not self._stopping:
                raise
        else:
            if row is not None:
                self._n_tokens += row["n_generated"]
                self._add(index, {"id": request.id, "line": request.line, **row, "key": key})

    def _fail(self, index: int, item: Item, key: str, problem: str) -> None:
        row: Row = {"id": item.id, "line": item.line, "text": "", "tokens": []}
        row |= {"finish_reason": "error", "error": problem, "n_prompt": 0, "n_generated": 0}
        row |= {"ttft_ms": None, "e2el_ms": None, "key": key}
        self.n_failed += 1
        self._on_problem(row)
        self._add(index, row)

    def _add(self, index: int, row: Row) -> None:
        self._written(self._sink.add(index, row))
        self._on_progress(self._n_written, self._n_tokens)

    def _written(self, n_written: int) -> None:
        if n_written > self._n_written:
            self._permits.release(n_written - self._n_written)
            self._n_written = n_written
