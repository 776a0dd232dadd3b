"""The JSON lines that `generate` writes: in the order of the input, and safe to resume.

`OUT` only grows, and holds finished rows in the order of the input. A row that finishes before its
turn waits in `OUT.part`: a killed run loses nothing that was finished."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pyllamabatch.errors import ArgumentError

Row = dict[str, Any]

LOCKED = 2**31 - 2  # on Windows, this byte of the file

_ROW_START = b'{"id": '  # `id` is the first field of every row


class ResultFile:
    """Takes rows in any order and writes them in order to `file`. `part`: where early rows wait;
    without it `file` is a stream, which holds nothing to resume.

    Take the rows that are `finished()` first, then `early_rows()`, then `add()`."""

    def __init__(self, name: str, file: BinaryIO, part: BinaryIO | None = None) -> None:
        self.name, self._file, self._part = name, file, part
        self._early: dict[int, bytes] = {}
        self.n_written = 0

    def add(self, index: int, row: Row) -> int:
        """Take the row of the index-th request, from 0. Returns how many rows were written."""
        self._early[index] = data = encode(row)
        n_before = self.n_written
        while self.n_written in self._early:
            _write(self._file, self._early.pop(self.n_written))
            self.n_written += 1
        if self._part is not None:
            if not self._early:
                self._part.truncate(0)
            elif index in self._early:
                _write(self._part, data)
        return self.n_written - n_before

    def problem(self, reason: str) -> ArgumentError:
        """What to raise where the output can't be used."""
        return ArgumentError("--out", self.name, reason)

    def clear(self) -> None:
        """Forget what an earlier run has written."""
        if self._part is not None:
            self._file.truncate(0)
            self._part.truncate(0)

    def finished(self) -> Iterator[Row]:
        """The rows of an earlier run, in order. A torn last line is cut off. ArgumentError for a
        file that `generate` did not write."""
        if self._part is None:
            return
        n_bytes = 0
        self._file.seek(0)
        for line in self._file:
            row = decode(line)
            if not line.endswith(b"\n") and (row is not None or _is_torn(line)):
                break
            if row is None:
                raise self.problem(
                    f"line {self.n_written + 1} was not written by generate; "
                    "move the file away, or use --overwrite"
                )
            n_bytes += len(line)
            self.n_written += 1
            yield row
        self._file.truncate(n_bytes)

    def early_rows(self) -> dict[int, Row]:
        """Rows that an earlier run finished out of turn, by line. Each is to be added again.

        There are never more of them than that run had requests under way."""
        if self._part is None:
            return {}
        self._part.seek(0)
        lines = self._part.read().split(b"\n")
        if lines[-1]:  # a torn line must not run into the next one
            _write(self._part, b"\n")
        return {row["line"]: row for row in map(decode, lines) if row is not None}


@contextmanager
def result_file(path: Path) -> Iterator[ResultFile]:
    """Results in a file, which may already hold the first of them. ArgumentError if another run
    writes to it."""
    part_path = path.with_name(path.name + ".part")
    with open(path, "a+b") as file, open(part_path, "a+b") as part:
        results = ResultFile(str(path), file, part)
        try:
            _lock(file)
        except OSError:
            raise results.problem("another run is writing to this file") from None
        try:
            yield results
        finally:
            if part_path.stat().st_size == 0:
                with suppress(PermissionError):  # on Windows an open file stays
                    part_path.unlink()


def _lock(file: BinaryIO) -> None:
    """Until it is closed. OSError where another process has it."""
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        file.seek(LOCKED)  # others could not read a byte that is there
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def encode(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def decode(line: bytes) -> Row | None:
    """The row in `line`, or None if `generate` did not write it or it is not whole."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"id", "line", "key"} <= row.keys() else None


def _is_torn(line: bytes) -> bool:
    """Whether `line` can be the start of a row, cut short by a kill."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(_ROW_START[: len(line)])
    return False


def _write(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.flush()
