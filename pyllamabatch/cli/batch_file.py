"""Answer a file of requests with a bounded number under way, and resume what a run left.

A reader thread pulls input lines. The engine's thread says when a stream has ended. All else
happens in the thread that calls `BatchFile.run`, which sleeps until one of the two has news.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from pyllamabatch.cli.input_lines import InputLine
from pyllamabatch.cli.result_file import Results, Row
from pyllamabatch.engine.stream import Result, Stream
from pyllamabatch.errors import EngineClosed, FatalDecodeError, PyllamabatchError

ENGINE_FAILED = (EngineClosed, FatalDecodeError)  # every other error is that of one request


class BatchFile:
    """One run of `generate`. It knows no files, no flags and no model.

    Call `resume()` once, then `run()`; after an exception of `run`, `stop()`.
    """

    def __init__(
        self,
        lines: Iterator[InputLine],
        results: Results,
        key: Callable[[InputLine], str],
        *,
        window: int,
        on_progress: Callable[[int, int], None] = lambda n_done, n_tokens: None,
        on_problem: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """key: a digest of what a line asks. window: lines that may be read beyond the last row
        that is written, at least 1. on_progress gets the rows written and the tokens generated."""
        self._lines, self._results, self._key = lines, results, key
        self._window = threading.Semaphore(window)
        self._events: queue.SimpleQueue[InputLine | int | BaseException | None]
        self._events = queue.SimpleQueue()
        self._under_way: dict[int, tuple[InputLine, Stream]] = {}
        self._on_progress, self._on_problem = on_progress, on_problem
        self._early: dict[int, Row] = {}
        self._n_tokens = 0
        self.n_resumed = 0  # rows of an earlier run
        self.n_failed = 0  # error rows of this run

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
            self.n_resumed += 1
        self._early = self._results.early_rows()
        self._on_progress(self.n_resumed, 0)

    def run(self, submit: Callable[[InputLine], Stream]) -> None:
        """Until every line has its row. `submit` raises a PyllamabatchError or TypeError for a
        request that can't run. Raises what ended the run: KeyboardInterrupt after `interrupt`."""
        threading.Thread(target=self._read, name="generate-reader", daemon=True).start()
        index, reading = self._results.n_written, True
        while reading or self._under_way:
            event = self._events.get()
            if event is None:
                reading = False
            elif isinstance(event, BaseException):
                raise event
            elif isinstance(event, int):
                self._end(event)
            else:
                self._take(index, event, submit)
                index += 1

    def interrupt(self) -> None:
        """Make `run` raise KeyboardInterrupt between two rows. For a signal handler."""
        self._events.put(KeyboardInterrupt())

    def stop(self) -> None:
        """Cancel what is under way and write what has finished, after `run` has raised."""
        for _, stream in self._under_way.values():
            stream.cancel()
        for index in sorted(self._under_way):
            with suppress(*ENGINE_FAILED):  # no row: the line is answered by the next run
                self._end(index)

    def _read(self) -> None:
        """The reader thread."""
        try:
            while True:
                self._window.acquire()
                line = next(self._lines, None)
                self._events.put(line)
                if line is None:
                    return
        except BaseException as error:  # a read error ends the run, not only this thread
            self._events.put(error)

    def _take(self, index: int, line: InputLine, submit: Callable[[InputLine], Stream]) -> None:
        early = self._early.pop(line.number, None)
        if early is not None and early["key"] == self._key(line):
            self.n_resumed += 1
            self._add(index, early)
        elif line.problem:
            self._fail(index, line, line.problem)
        else:
            try:
                stream = submit(line)
            except ENGINE_FAILED:
                raise
            except (PyllamabatchError, TypeError) as problem:
                self._fail(index, line, str(problem))
            else:
                self._under_way[index] = line, stream
                stream.add_done_callback(lambda _: self._events.put(index))

    def _end(self, index: int) -> None:
        line, stream = self._under_way.pop(index)
        try:
            result = stream.result()
        except ENGINE_FAILED:
            raise
        except PyllamabatchError as problem:
            self._fail(index, line, str(problem))
            return
        if result.finish_reason != "cancelled":
            self._n_tokens += result.n_generated
            self._add(index, self._row(line, **fields_of(result)))

    def _fail(self, index: int, line: InputLine, problem: str) -> None:
        row = self._row(
            line, text="", tokens=[], finish_reason="error", error=problem,
            n_prompt=0, n_generated=0, ttft_ms=None, e2el_ms=None,
        )  # fmt: skip
        self.n_failed += 1
        self._on_problem(row)
        self._add(index, row)

    def _row(self, line: InputLine, **fields: Any) -> Row:
        return {"id": line.id, "line": line.number, **fields, "key": self._key(line)}

    def _add(self, index: int, row: Row) -> None:
        before = self._results.n_written
        self._results.add(index, row)
        n_new = self._results.n_written - before
        if n_new:
            self._window.release(n_new)
        self._on_progress(self._results.n_written, self._n_tokens)


def fields_of(result: Result) -> Row:
    """What a row says of an answer."""
    row: Row = {
        "text": result.text,
        "tokens": [int(token) for token in result.tokens],
        "finish_reason": result.finish_reason,
        "n_prompt": result.n_prompt,
        "n_generated": result.n_generated,
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
