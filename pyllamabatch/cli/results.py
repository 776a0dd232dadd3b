"""The JSON lines that `generate` writes: in input order, and safe to take up again.

`OUT` only ever grows at its end and holds finished lines in the order of the input. A line that
finishes before its turn waits in `OUT.part`; so a killed run loses nothing that was finished.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Protocol

try:
    import fcntl
except ImportError:  # no advisory locks on this system: two runs on one file are not told apart
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]

_ROW_START = b'{"id": '  # `id` is the first field of every row


class ResultsProblem(Exception):
    """The output file can't be used; the message says what to do."""


class Sink(Protocol):
    """Where rows go: `add` takes them in any order, the sink writes them in order."""

    def add(self, index: int, row: Row) -> int:
        """Take the row of the index-th request (from 0); returns how many rows are now written."""
        ...


class StreamSink:
    """Rows in order to a stream, for instance the standard output. Can't be resumed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._early: dict[int, Row] = {}
        self._n_written = 0

    def add(self, index: int, row: Row) -> int:
        self._early[index] = row
        while (ready := self._early.pop(self._n_written, None)) is not None:
            self._stream.write(encode(ready))
            self._n_written += 1
        self._stream.flush()
        return self._n_written


class FileSink:
    """Rows in order to a file that may already hold the first of them.

    First take the finished rows with `next_finished()` until it returns None, then `add()`.
    Raises ResultsProblem if another run writes to the same file, or if the file is not ours.
    """

    def __init__(self, path: Path) -> None:
        self._made = not path.exists()
        self.path = path
        self.part_path = path.with_name(path.name + ".part")
        self._early: dict[int, Row] = {}
        self._n_written = 0
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by close())
        except OSError as error:
            raise ResultsProblem(f"{path}: {error.strerror}") from None
        try:
            self._lock()
            self._part = open(self.part_path, "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            self._file.close()
            raise ResultsProblem(f"{self.part_path}: {error.strerror}") from None
        except ResultsProblem:
            self._file.close()
            raise
        self._reader = open(path, "rb")  # noqa: SIM115
        self._read_to = 0

    def _lock(self) -> None:
        if fcntl is None or not self.path.is_file():  # a device such as /dev/null needs no lock
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResultsProblem(f"{self.path}: another run is writing to this file") from None

    def clear(self) -> None:
        """Forget what an earlier run, or anybody else, wrote."""
        self._file.truncate(0)
        self._part.truncate(0)

    def next_finished(self) -> Row | None:
        """The next row of an earlier run, or None at the end (a torn last line is cut off)."""
        line = self._reader.readline()
        if not line:
            return None
        row = decode(line)
        if row is None:
            if line.endswith(b"\n") or not _torn(line):
                raise ResultsProblem(
                    f"{self.path}: line {self._n_written + 1} was not written by generate; "
                    "move the file away, or use --overwrite"
                )
            self._file.truncate(self._read_to)
            return None
        if not line.endswith(b"\n"):  # whole but for its end of line
            _write(self._file, b"\n")
            line += self._reader.readline()
        self._read_to += len(line)
        self._n_written += 1
        return row

    def early_rows(self, after_line: int) -> dict[int, Row]:
        """Rows by input line that an earlier run finished out of turn, beyond `after_line`.

        Never more of them than that run had requests under way. Each is to be added again.
        """
        rows: dict[int, Row] = {}
        line = b"\n"
        with open(self.part_path, "rb") as part:
            for line in part:
                row = decode(line)
                if row is not None and row["line"] > after_line:
                    rows[row["line"]] = row
        if not line.endswith(b"\n"):
            _write(self._part, b"\n")
        return rows

    def add(self, index: int, row: Row) -> int:
        if index != self._n_written:
            self._early[index] = row
            _write(self._part, encode(row))
            return self._n_written
        _write(self._file, encode(row))
        self._n_written += 1
        while (ready := self._early.pop(self._n_written, None)) is not None:
            _write(self._file, encode(ready))
            self._n_written += 1
        if not self._early:
            self._part.truncate(0)
        return self._n_written

    def close(self) -> None:
        """Close the files; what we made and did not fill goes away."""
        if self._file.closed:
            return
        if os.fstat(self._part.fileno()).st_size == 0:
            self.part_path.unlink(missing_ok=True)
        if self._made and os.fstat(self._file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self._reader.close()
        self._part.close()
        self._file.close()

    def __enter__(self) -> FileSink:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def encode(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def decode(line: bytes) -> Row | None:
    """The row in `line`, or None if it is not one of ours or is not whole."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if isinstance(row, dict) and {"id", "line", "key"} <= row.keys():
        return row
    return None


def _torn(line: bytes) -> bool:
    """Whether `line` can be the beginning of one of our rows, cut short by a kill."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(_ROW_START[: len(line)])
    return False


def _write(file: Any, data: bytes) -> None:
    """All of `data` to an unbuffered file: one system call unless the disk is nearly full."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
