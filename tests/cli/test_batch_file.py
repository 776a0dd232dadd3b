"""The loop of `generate` with an engine of the test's own: order, window, resuming, failures."""

import io
import json
import queue
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.cli.batch_file import BatchFile
from pyllamabatch.cli.input_lines import InputLine, digest, read_lines
from pyllamabatch.cli.result_file import ResultFile, Row, result_file
from pyllamabatch.engine.results import Result
from pyllamabatch.errors import ArgumentError, EngineClosed

N = 60


def result_of(line: InputLine) -> Result:
    return Result(0, f"<{line.prompt}>", [1], "stop", 1, 1, 0.1, 0.2)


@dataclass
class FakeEngine:
    """Its streams are futures, of which four at a time end in random order."""

    started: list[int] = field(default_factory=list)
    refuse: set[int] = field(default_factory=set)
    fail_at: int | None = None
    interrupt_at: int | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4))

    def submit(self, line: InputLine) -> Any:
        if line.number in self.refuse:
            raise ArgumentError("tokens", line.prompt, "too long")
        self.started.append(line.number)
        if self.interrupt_at == line.number:
            raise KeyboardInterrupt
        return self.pool.submit(self.answer, line)

    def answer(self, line: InputLine) -> Result:
        time.sleep(0.001 * random.Random(line.number).random())
        if line.number == self.fail_at:
            raise EngineClosed("the engine has failed")
        return result_of(line)


def lines(n: int = N) -> list[bytes]:
    return [b'{"id": "r%d", "prompt": "%d"}\n' % (i, i) for i in range(1, n + 1)]


def batch_on(results: ResultFile, source: Iterable[bytes], **options: Any) -> BatchFile:
    def key(line: InputLine) -> str:
        return digest(str(line.raw), line.prompt)

    batch = BatchFile(read_lines(source), results, key, **{"window": 8, **options})
    batch.resume()
    return batch


def answered(out: Path, source: list[bytes]) -> FakeEngine:
    """An engine that has answered the source into the file."""
    engine = FakeEngine()
    with result_file(out) as results:
        batch_on(results, source).run(engine.submit)
    return engine


def numbers_in(*paths: Path) -> list[int]:
    return [
        json.loads(line)["line"]
        for path in paths
        if path.exists()
        for line in path.read_bytes().splitlines()
    ]


def test_every_line_has_its_row_and_the_bad_ones_an_error() -> None:
    stream, engine = io.BytesIO(), FakeEngine(refuse={5, 9})
    source = lines()
    source[2] = b"not json\n"
    rows: list[Row] = []
    batch_on(ResultFile("stdout", stream), source, on_row=rows.append).run(engine.submit)
    written = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert sorted(rows, key=lambda row: row["line"]) == written
    errors = {row["line"]: row["error"] for row in rows if "error" in row}
    assert errors.keys() == {3, 5, 9}
    assert "too long" in errors[5]
    assert engine.started == [n for n in range(1, N + 1) if n not in errors]
    for number, row in enumerate(written, 1):
        assert (row["id"], row["line"]) == (3 if number == 3 else f"r{number}", number)
        assert row["text"] == ("" if number in errors else f"<{number}>")


def test_the_window_bounds_what_is_read() -> None:
    """In the worst order: of eight that are open the newest ends first."""
    results, streams = ResultFile("stdout", io.BytesIO()), list[tuple[InputLine, Any]]()
    n_read = most = 0

    def counted() -> Iterator[bytes]:
        nonlocal n_read
        for line in lines():
            n_read += 1
            yield line

    def submit(line: InputLine) -> Any:
        nonlocal most
        most = max(most, n_read - results.n_written)
        streams.append((line, Future()))
        made = streams[-1][1]
        if len(streams) == min(8, N - results.n_written):
            while streams:
                ended, stream = streams.pop()
                stream.set_result(result_of(ended))
        return made

    batch_on(results, counted()).run(submit)
    assert (most, results.n_written) == (8, N)


@pytest.mark.parametrize("stop_at", [1, 2, 17, 59, 60])
def test_interrupted_and_resumed(tmp_path: Path, stop_at: int) -> None:
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    first, second = FakeEngine(interrupt_at=stop_at), FakeEngine()
    with result_file(out) as results, pytest.raises(KeyboardInterrupt):
        batch_on(results, lines()).run(first.submit)
    finished = set(numbers_in(out, part))
    assert finished <= set(first.started)
    with result_file(out) as results:
        batch = batch_on(results, lines())
        batch.run(second.submit)
    assert finished.isdisjoint(second.started), "a finished line was redone"
    assert finished.union(second.started) == set(range(1, N + 1))
    assert batch.n_resumed == len(finished)
    assert numbers_in(out) == list(range(1, N + 1))
    assert not part.exists()


def test_a_finished_run_has_nothing_to_do_until_lines_are_added(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert [len(answered(out, lines(n)).started) for n in (10, 10, 25)] == [10, 0, 15]


CHANGES: dict[str, Any] = {
    "text": lambda old: [*old[:6], b'{"id": "r7", "prompt": "another"}', *old[7:]],
    "id": lambda old: [*old[:6], b'{"id": "other", "prompt": "7"}', *old[7:]],
    "inserted": lambda old: [*old[:6], b'{"id": "new", "prompt": "new"}', *old[6:]],
    "removed": lambda old: old[:6] + old[7:],
    "cut": lambda old: old[:7],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_input_is_refused(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out.jsonl"
    answered(out, lines())
    before = out.read_bytes()
    says = "more rows" if change == "cut" else "'r7'"
    with result_file(out) as results, pytest.raises(ArgumentError, match=says):
        batch_on(results, CHANGES[change](lines()))
    assert out.read_bytes() == before


def test_a_dead_engine_ends_the_run_and_leaves_no_error_rows(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with result_file(out) as results, pytest.raises(EngineClosed):
        batch_on(results, lines()).run(FakeEngine(fail_at=20).submit)
    found = numbers_in(out)
    assert found == list(range(1, len(found) + 1))
    assert len(found) <= 19
    assert b'"error"' not in out.read_bytes()


def test_a_read_error_ends_the_run() -> None:
    def broken() -> Iterator[bytes]:
        yield from lines(3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        batch_on(ResultFile("stdout", io.BytesIO()), broken()).run(FakeEngine().submit)


def test_a_signal_that_does_not_interrupt_the_wait_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that comes just before it: here another thread gets it. The handler is the main
    thread's, which waits for a line that does not come."""
    waits, over = threading.Event(), threading.Event()

    class Events(queue.SimpleQueue[Any]):
        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            waits.set()
            return super().get(block, timeout)

    def open_pipe() -> Iterator[bytes]:
        waits.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        over.wait()
        yield b""

    monkeypatch.setattr("queue.SimpleQueue", Events)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            batch_on(ResultFile("stdout", io.BytesIO()), open_pipe()).run(FakeEngine().submit)
    finally:
        over.set()
        signal.signal(signal.SIGUSR1, before)
