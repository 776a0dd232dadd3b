"""The output file of `generate`: order, and taking it up again after any kind of end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pyllamabatch.cli.result_file import ResultFile, Results, Row, decode, encode
from pyllamabatch.errors import ArgumentError


def row(line: int) -> Row:
    return {"id": f"r{line}", "line": line, "text": f"añswer {line}", "key": f"k{line}"}


def finished(results: ResultFile) -> list[int]:
    return [found["line"] for found in results.finished()]


def add(results: Results, index: int, row: Row) -> int:
    results.add(index, row)
    return results.n_written


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["line"] for line in path.read_bytes().splitlines()]


def test_rows_go_out_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ResultFile(out) as results:
        assert finished(results) == []
        assert add(results, 2, row(3)) == 0
        assert add(results, 1, row(2)) == 0
        assert results.part_path.exists()
        assert add(results, 0, row(1)) == 3
        assert add(results, 3, row(4)) == 4
    assert lines_of(out) == [1, 2, 3, 4]
    assert not results.part_path.exists()


def test_stream_rows_go_out_in_order() -> None:
    stream = io.BytesIO()
    results = Results("stdout", stream)
    assert [add(results, index, row(index + 1)) for index in (1, 0, 3, 2)] == [0, 2, 2, 4]
    assert [json.loads(line)["line"] for line in stream.getvalue().splitlines()] == [1, 2, 3, 4]


def test_early_rows_survive_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    killed = ResultFile(out)  # never closed: what a SIGKILL leaves is what is on disk
    add(killed, 0, row(1))
    add(killed, 2, row(3))
    add(killed, 4, row(5))
    killed._file.close()  # the lock goes with the process
    with ResultFile(out) as results:
        assert finished(results) == [1]
        early = results.early_rows()
        assert early == {3: row(3), 5: row(5)}
        for index, line in ((2, 3), (4, 5), (1, 2), (3, 4)):
            n_written = add(results, index, row(line))
        assert n_written == 5
    assert lines_of(out) == [1, 2, 3, 4, 5]
    assert not results.part_path.exists()


@pytest.mark.parametrize("cut", range(1, len(encode(row(2)))))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(encode(row(1)) + encode(row(2))[:cut])
    whole_but_for_the_newline = cut == len(encode(row(2))) - 1
    with ResultFile(out) as results:
        done = finished(results)
        assert done == ([1, 2] if whole_but_for_the_newline else [1])
        for index in range(len(done), 3):
            add(results, index, row(index + 1))
    assert lines_of(out) == [1, 2, 3]


def test_a_torn_line_among_the_early_rows_is_dropped(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(encode(row(1)))
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(encode(row(3)) + encode(row(4))[:9])
    with ResultFile(out) as results:
        assert finished(results) == [1]
        assert results.early_rows() == {3: row(3)}
        add(results, 4, row(5))
        lines = part.read_bytes().splitlines()
        assert decode(lines[-1]) == row(5), "the torn line must not swallow the next one"


@pytest.mark.parametrize(
    "content",
    [
        b"some notes of mine\n",
        b'{"id": 1, "prompt": "an input file"}\n',
        b'{"id": 1, "prompt": "an input file"}',
        b"[]",
        b"\x00\xff",
        encode(row(1)) + b'{"id": 2, "text": "torn in the mi\n' + encode(row(3)),
    ],
)
def test_a_foreign_file_is_left_alone(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with ResultFile(out) as results, pytest.raises(ArgumentError, match="--overwrite"):
        finished(results)
    assert out.read_bytes() == content


def test_overwrite_begins_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"some notes of mine\n")
    (tmp_path / "out.jsonl.part").write_bytes(encode(row(7)))
    with ResultFile(out) as results:
        results.clear()
        assert finished(results) == []
        assert results.early_rows() == {}
        add(results, 0, row(1))
    assert lines_of(out) == [1]


def test_two_runs_on_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ResultFile(out), pytest.raises(ArgumentError, match="another run"):
        ResultFile(out)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        ResultFile(tmp_path / "nowhere" / "out.jsonl")


def test_nothing_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with ResultFile(tmp_path / "out.jsonl") as results:
        assert finished(results) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.jsonl").touch()
    with ResultFile(tmp_path / "empty.jsonl"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]
