"""The output file of `generate`: order, and taking it up again after any kind of end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pyllamabatch.cli.results import FileSink, ResultsProblem, StreamSink, decode, encode


def row(line: int) -> dict[str, object]:
    return {"id": f"r{line}", "line": line, "text": f"añswer {line}", "key": f"k{line}"}


def finished(sink: FileSink) -> list[int]:
    lines = []
    while (found := sink.next_finished()) is not None:
        lines.append(found["line"])
    return lines


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["line"] for line in path.read_bytes().splitlines()]


def test_rows_go_out_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with FileSink(out) as sink:
        assert finished(sink) == []
        assert sink.add(2, row(3)) == 0
        assert sink.add(1, row(2)) == 0
        assert sink.part_path.exists()
        assert sink.add(0, row(1)) == 3
        assert sink.add(3, row(4)) == 4
    assert lines_of(out) == [1, 2, 3, 4]
    assert not sink.part_path.exists()


def test_stream_rows_go_out_in_order() -> None:
    stream = io.BytesIO()
    sink = StreamSink(stream)
    assert [sink.add(index, row(index + 1)) for index in (1, 0, 3, 2)] == [0, 2, 2, 4]
    assert [json.loads(line)["line"] for line in stream.getvalue().splitlines()] == [1, 2, 3, 4]


def test_early_rows_survive_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    killed = FileSink(out)  # never told to finish: what a SIGKILL leaves is what is on disk
    killed.add(0, row(1))
    killed.add(2, row(3))
    killed.add(4, row(5))
    killed._file.close()  # the lock goes with the process
    with FileSink(out) as sink:
        assert finished(sink) == [1]
        early = sink.early_rows(after_line=1)
        assert early == {3: row(3), 5: row(5)}
        for index, line in ((2, 3), (4, 5), (1, 2), (3, 4)):
            n_written = sink.add(index, row(line))
        assert n_written == 5
    assert lines_of(out) == [1, 2, 3, 4, 5]
    assert not sink.part_path.exists()


@pytest.mark.parametrize("cut", range(1, len(encode(row(2)))))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(encode(row(1)) + encode(row(2))[:cut])
    whole_but_for_the_newline = cut == len(encode(row(2))) - 1
    with FileSink(out) as sink:
        done = finished(sink)
        assert done == ([1, 2] if whole_but_for_the_newline else [1])
        for index in range(len(done), 3):
            sink.add(index, row(index + 1))
    assert lines_of(out) == [1, 2, 3]


def test_a_torn_line_among_the_early_rows_is_dropped(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(encode(row(1)))
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(encode(row(3)) + encode(row(4))[:9])
    with FileSink(out) as sink:
        assert finished(sink) == [1]
        assert sink.early_rows(after_line=1) == {3: row(3)}
        sink.add(4, row(5))
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
    with FileSink(out) as sink, pytest.raises(ResultsProblem, match="--overwrite"):
        finished(sink)
    assert out.read_bytes() == content


def test_overwrite_begins_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"some notes of mine\n")
    (tmp_path / "out.jsonl.part").write_bytes(encode(row(7)))
    with FileSink(out) as sink:
        sink.clear()
        assert finished(sink) == []
        assert sink.early_rows(after_line=0) == {}
        sink.add(0, row(1))
    assert lines_of(out) == [1]


def test_two_runs_on_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no advisory locks on this system")
    out = tmp_path / "out.jsonl"
    with FileSink(out), pytest.raises(ResultsProblem, match="another run"):
        FileSink(out)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ResultsProblem, match="No such file"):
        FileSink(tmp_path / "nowhere" / "out.jsonl")


def test_nothing_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with FileSink(tmp_path / "out.jsonl") as sink:
        assert finished(sink) == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty.jsonl").touch()
    with FileSink(tmp_path / "empty.jsonl"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["empty.jsonl"]
