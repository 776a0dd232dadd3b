"""Answer a file of requests with a bounded number under way, and resume what a run left.

A reader thread pulls input lines. The engine's thread says when a stream has ended. All else
happens in the thread that calls `BatchFile.run`, which sleeps until one of the two has news."""

import math
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

from pyllamabatch.cli.input_lines import InputLine
from pyllamabatch.cli.result_file import ResultFile, Row
from pyllamabatch.engine.results import Result
from pyllamabatch.engine.stream import Stream
from pyllamabatch.errors import EngineClosed, FatalDecodeError, PyllamabatchError

ENGINE_FAILED = (EngineClosed, FatalDecodeError)  # every other error is that of one request

TURN_S = 0.5

T = TypeVar("T")
Event = tuple[int, InputLine, Stream | None]
"""A line was read, or, with a stream, it has ended. The first is its place among the lines."""


class BatchFile:
    """One run of `generate`. It knows no files, no flags and no model. Call `resume()`, then
    `run()`."""

    def __init__(
        self,
        lines: Iterator[InputLine],
        results: ResultFile,
        key: Callable[[InputLine], str],
        *,
        window: int,
        on_row: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """key: a digest of what a line asks. window: lines that may be read beyond the last row
        that is written, at least 1. on_row gets every row that is new."""
        self._lines, self._results, self._key = lines, results, key
        self._room = threading.Semaphore(window)
        self._on_row = on_row
        self._events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()
        self._early: dict[int, Row] = {}
        self.n_resumed = 0  # rows of an earlier run
        self.n_failed = 0  # of these, lines that could not be run

    def resume(self) -> None:
        """Pass over the lines whose rows are written. ArgumentError for rows of other lines."""
        for row in self._results.finished():
            line = next(self._lines, None)
            if line is None:
                raise self._results.problem(
                    "has more rows than the input has lines: is it the output of another input? "
                    "Move it away, or use --overwrite"
                )
            if (row["line"], row["id"], row["key"]) != (line.number, line.id, self._key(line)):
                raise self._results.problem(
                    f"row {self.n_resumed + 1} (id {row['id']!r}) does not belong to "
                    f"line {line.number} (id {line.id!r}) of the input: the line, a sampling flag "
                    "or the model has changed since. Go back to what it was, use another --out, "
                    "or --overwrite to start again"
                )
            self._resumed(row)
        self._early = self._results.early_rows()

    def run(self, submit: Callable[[InputLine], Stream]) -> None:
        """Until every line has its row. `submit` raises a PyllamabatchError or TypeError for a
        request that can't run. Raises what ends the run: a read error, the engine's failure."""
        threading.Thread(target=self._read, name="generate-reader", daemon=True).start()
        reading, n_open = True, 0
        while reading or n_open:
            event = self._next_event()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                reading = False
                continue
            index, line, stream = event
            if stream is not None:
                n_open -= 1
                self._answer(index, line, _attempt(stream.result))
            elif not self._took_early(index, line):
                n_open += self._start(index, line, submit)

    def _next_event(self) -> Event | BaseException | None:
        """Waits in turns: a signal that comes just before a wait does not interrupt it."""
        while True:
            with suppress(queue.Empty):
                return self._events.get(timeout=TURN_S)

    def _read(self) -> None:
        """The reader thread."""
        try:
            index = self._results.n_written
            while self._room.acquire() and (line := next(self._lines, None)) is not None:
                self._events.put((index, line, None))
                index += 1
            self._events.put(None)
        except BaseException as error:  # a read error ends the run, not only this thread
            self._events.put(error)

    def _took_early(self, index: int, line: InputLine) -> bool:
        """Whether an earlier run has finished the line out of turn."""
        row = self._early.pop(line.number, None)
        if row is None or row["key"] != self._key(line):
            return False
        self._resumed(row)
        self._add(index, row)
        return True

    def _resumed(self, row: Row) -> None:
        self.n_resumed += 1
        self.n_failed += "error" in row

    def _start(self, index: int, line: InputLine, submit: Callable[[InputLine], Stream]) -> bool:
        """Whether its request is under way."""
        found = line.problem if line.problem else _attempt(lambda: submit(line))
        if isinstance(found, str):
            self._answer(index, line, found)
            return False
        found.add_done_callback(lambda stream: self._events.put((index, line, stream)))
        return True

    def _answer(self, index: int, line: InputLine, found: Result | str) -> None:
        fields = problem_fields(found) if isinstance(found, str) else result_fields(found)
        row = {"id": line.id, "line": line.number, **fields, "key": self._key(line)}
        self._add(index, row)
        self._on_row(row)

    def _add(self, index: int, row: Row) -> None:
        for _ in range(self._results.add(index, row)):
            self._room.release()


def _attempt(call: Callable[[], T]) -> T | str:
    """What it returns, or what is wrong with this request."""
    try:
        return call()
    except ENGINE_FAILED:
        raise
    except (PyllamabatchError, TypeError) as problem:
        return str(problem)


def problem_fields(problem: str) -> Row:
    return {
        "text": "", "tokens": [], "finish_reason": "error", "error": problem,
        "n_prompt": 0, "n_generated": 0, "n_drafts": 0, "n_drafted": 0, "n_accepted": 0,
        "ttft_ms": None, "e2el_ms": None,
    }  # fmt: skip


def result_fields(result: Result) -> Row:
    """What a row says of an answer."""
    row: Row = {
        "text": result.text,
        "tokens": [int(token) for token in result.tokens],
        "finish_reason": result.finish_reason,
        "n_prompt": result.n_prompt,
        "n_generated": result.n_generated,
        "n_drafts": result.n_drafts,
        "n_drafted": result.n_drafted,
        "n_accepted": result.n_accepted,
        "ttft_ms": None if result.ttft_s is None else round(1e3 * result.ttft_s, 3),
        "e2el_ms": round(1e3 * result.e2el_s, 3),
    }
    if result.logprobs is not None:
        row["logprobs"] = [_finite(value) for value in result.logprobs]
    if result.top_logprobs is not None:
        row["top_logprobs"] = [
            {str(token): _finite(value) for token, value in top.items()}
            for top in result.top_logprobs
        ]
    return row


def _finite(value: float) -> float | None:
    """JSON has no infinity: an excluded token's log-probability is null."""
    return value if math.isfinite(value) else None
