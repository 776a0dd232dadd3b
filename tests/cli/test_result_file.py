"""The output file of `generate`: order, and taking it up again after any kind of end."""

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyllamabatch.cli.result_file import LOCKED, ResultFile, Row, decode, encode, result_file
from pyllamabatch.errors import ArgumentError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl.part"


def row(line: int) -> Row:
    return {"id": f"r{line}", "line": line, "text": f"añswer {line}", "key": f"k{line}"}


def add(results: ResultFile, *indices: int) -> list[int]:
    """How many rows are written after each."""
    found = []
    for index in indices:
        before = results.n_written
        assert results.add(index, row(index + 1)) == results.n_written - before
        found.append(results.n_written)
    return found


def finished(results: ResultFile) -> list[int]:
    return [found["line"] for found in results.finished()]


def lines_of(text: bytes) -> list[int]:
    return [json.loads(line)["line"] for line in text.splitlines()]


def test_a_file_is_locked_with_what_windows_has(
    out: Path, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte far behind the rows; and an empty part file that is open can't be taken away."""
    locked: list[tuple[int, int]] = []

    def locking(descriptor: int, mode: int, n_bytes: int) -> None:
        at = os.lseek(descriptor, 0, os.SEEK_CUR), n_bytes
        if at in locked:
            raise PermissionError
        locked.append(at)

    def unlink(path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    windows = SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    with result_file(out) as results:
        assert add(results, 1, 0) == [0, 2]
        with pytest.raises(ArgumentError, match="another run"), result_file(out):
            pass
    assert locked == [(LOCKED, 1)]
    assert lines_of(out.read_bytes()) == [1, 2]
    assert part.read_bytes() == b""


def test_rows_go_out_in_order(out: Path, part: Path) -> None:
    stream = io.BytesIO()
    assert add(ResultFile("stdout", stream), 1, 0, 3, 2) == [0, 2, 2, 4]
    assert lines_of(stream.getvalue()) == [1, 2, 3, 4]
    with result_file(out) as results:
        assert finished(results) == []
        assert add(results, 2, 1) == [0, 0]
        assert lines_of(part.read_bytes()) == [3, 2]
        assert add(results, 0, 3) == [3, 4]
    assert lines_of(out.read_bytes()) == [1, 2, 3, 4]
    assert not part.exists()


def test_early_rows_survive_a_kill(out: Path, part: Path) -> None:
    with result_file(out) as killed:
        add(killed, 0, 2, 4)
        left = out.read_bytes(), part.read_bytes()
    out.write_bytes(left[0])  # what a SIGKILL leaves is what was on disk
    part.write_bytes(left[1])
    with result_file(out) as results:
        assert finished(results) == [1]
        assert results.early_rows() == {3: row(3), 5: row(5)}
        assert add(results, 2, 4, 1, 3)[-1] == 5
    assert lines_of(out.read_bytes()) == [1, 2, 3, 4, 5]
    assert not part.exists()


@pytest.mark.parametrize("cut", range(1, len(encode(row(2)))))
def test_a_torn_last_line_is_cut_off(out: Path, cut: int) -> None:
    out.write_bytes(encode(row(1)) + encode(row(2))[:cut])
    with result_file(out) as results:
        assert finished(results) == [1]
        add(results, 1, 2)
    assert lines_of(out.read_bytes()) == [1, 2, 3]


def test_a_torn_line_among_the_early_rows_is_dropped(out: Path, part: Path) -> None:
    out.write_bytes(encode(row(1)))
    part.write_bytes(encode(row(3)) + encode(row(4))[:9])
    with result_file(out) as results:
        assert finished(results) == [1]
        assert results.early_rows() == {3: row(3)}
        add(results, 4)
        last = part.read_bytes().splitlines()[-1]
        assert decode(last) == row(5), "the torn line must not swallow the next one"


@pytest.mark.parametrize(
    "content",
    [
        b"some notes of mine\n", b'{"id": 1, "prompt": "an input file"}\n',
        b'{"id": 1, "prompt": "an input file"}', b"[]", b"\x00\xff",
        encode(row(1)) + b'{"id": 2, "text": "torn in the mi\n' + encode(row(3)),
    ],
)  # fmt: skip
def test_a_foreign_file_is_left_alone_until_it_is_overwritten(
    out: Path, part: Path, content: bytes
) -> None:
    out.write_bytes(content)
    with result_file(out) as results, pytest.raises(ArgumentError, match="--overwrite"):
        finished(results)
    assert out.read_bytes() == content
    part.write_bytes(encode(row(7)))
    with result_file(out) as results:
        results.clear()
        assert finished(results) == []
        assert results.early_rows() == {}
        add(results, 0)
    assert lines_of(out.read_bytes()) == [1]


def test_two_runs_on_one_file(out: Path) -> None:
    with result_file(out), pytest.raises(ArgumentError, match="another run"):
        result_file(out).__enter__()
