"""The JSON lines that `generate` writes: in the order of the input, and safe to resume.

`OUT` only grows, and holds finished rows in the order of the input. A row that finishes before its
turn waits in `OUT.part`: a killed run loses nothing that was finished.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pyllamabatch.errors import ArgumentError

Row = dict[str, Any]

_ROW_START = b'{"id": '  # `id` is the first field of every row


class Results:
    """Takes rows in any order and writes them in order to `file`. `part`: where early rows wait."""

    def __init__(self, name: str, file: BinaryIO, part: BinaryIO | None = None) -> None:
        self.name, self._file, self._part = name, file, part
        self._early: dict[int, bytes] = {}
        self.n_written = 0

    def add(self, index: int, row: Row) -> None:
        """Take the row of the index-th request, from 0."""
        data = encode(row)
        if index != self.n_written:
            self._early[index] = data
            if self._part is not None:
                _write(self._part, data)
            return
        ready: bytes | None = data
        while ready is not None:
            _write(self._file, ready)
            self.n_written += 1
            ready = self._early.pop(self.n_written, None)
        if self._part is not None and not self._early:
            self._part.truncate(0)

    def problem(self, reason: str) -> ArgumentError:
        """What to raise where the output can't be used."""
        return ArgumentError("--out", self.name, reason)

    def finished(self) -> Iterator[Row]:
        """The rows of an earlier run, in order: none of a stream."""
        yield from ()

    def early_rows(self) -> dict[int, Row]:
        """Rows that an earlier run finished out of turn, by line. Each is to be added again."""
        return {}


class ResultFile(Results):
    """Results in a file, which may already hold the first of them. A context manager.

    Take the rows that are `finished()` first, then `early_rows()`, then `add()`. Raises
    ArgumentError if another run writes to the same file, or if `generate` did not write it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.part_path = path, path.with_name(path.name + ".part")
        self._is_new = not path.exists()
        file = open(path, "ab")  # noqa: SIM115 (closed by __exit__)
        super().__init__(str(path), file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise self.problem("another run is writing to this file") from None
        self._part = open(self.part_path, "ab")  # noqa: SIM115

    def clear(self) -> None:
        """Forget what the file holds."""
        self._file.truncate(0)
        self.part_path.write_bytes(b"")

    def finished(self) -> Iterator[Row]:
        """The rows of an earlier run, in order. A torn last line is cut off."""
        n_bytes = 0
        with open(self.path, "rb") as file:
            for line in file:
                row = decode(line)
                if row is None:
                    if line.endswith(b"\n") or not _is_torn(line):
                        raise self.problem(
                            f"line {self.n_written + 1} was not written by generate; "
                            "move the file away, or use --overwrite"
                        )
                    self._file.truncate(n_bytes)
                    return
                n_bytes += len(line)
                self.n_written += 1
                yield row
                if not line.endswith(b"\n"):  # whole but for its end of line
                    _write(self._file, b"\n")
                    return

    def early_rows(self) -> dict[int, Row]:
        """Rows that an earlier run finished out of turn, by line. Each is to be added again.

        There are never more of them than that run had requests under way.
        """
        lines = self.part_path.read_bytes().split(b"\n")
        if lines[-1] and self._part is not None:  # a torn line must not run into the next one
            _write(self._part, b"\n")
        return {row["line"]: row for row in map(decode, lines) if row is not None}

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files. Those that are empty and were made here go away."""
        assert self._part is not None
        if os.fstat(self._part.fileno()).st_size == 0:
            self.part_path.unlink(missing_ok=True)
        if self._is_new and os.fstat(self._file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self._part.close()
        self._file.close()


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
