"""The loop of `generate` with an engine of the test's own: order, window, resuming, failures."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.cli.batch_file import BatchFile
from pyllamabatch.cli.input_lines import InputLine, digest, read_lines
from pyllamabatch.cli.result_file import ResultFile, Results, Row
from pyllamabatch.engine.stream import Result
from pyllamabatch.errors import ArgumentError, EngineClosed

N = 60


class Memory(Results):
    """Results that stay in memory."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.n_written = 0

    def add(self, index: int, row: Row) -> None:
        assert index not in self.rows
        self.rows[index] = row
        while self.n_written in self.rows:
            self.n_written += 1


@dataclass
class Work:
    """A stream that ends when the test says so."""

    engine: FakeEngine
    line: InputLine
    finish_reason: str = ""
    ended: Callable[[Any], None] = lambda _: None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self.ended = callback
        self.engine.added(self)

    def end(self, finish_reason: str = "stop") -> None:
        if not self.finish_reason:
            self.finish_reason = finish_reason
            self.ended(self)

    def cancel(self) -> None:
        self.end("cancelled")

    def result(self) -> Result:
        self.engine.end_one()
        if self.line.number == self.engine.fail_at:
            raise EngineClosed("the engine has failed")
        text = f"<{self.line.prompt}>"
        return Result(0, text, [1], self.finish_reason, 1, 1, 0.1, 0.2)  # type: ignore[arg-type]


@dataclass
class FakeEngine:
    """Ends what is under way in random order, `at_once` at a time, in the caller's thread."""

    at_once: int = 4
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    under_way: list[Work] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    refuse: set[int] = field(default_factory=set)
    fail_at: int | None = None
    interrupt_at: int | None = None

    def submit(self, line: InputLine) -> Any:
        if line.number in self.refuse:
            raise ArgumentError("tokens", line.prompt, "too long")
        self.started.append(line.number)
        if self.interrupt_at == line.number:
            raise KeyboardInterrupt
        return Work(self, line)

    def added(self, work: Work) -> None:
        self.under_way.append(work)
        if len(self.under_way) >= self.at_once:
            self.end_one()

    def end_one(self) -> None:
        if self.under_way:
            self.under_way.pop(self.rng.randrange(len(self.under_way))).end()


def lines(n: int = N) -> list[bytes]:
    return [b'{"id": "r%d", "prompt": "%d"}\n' % (i, i) for i in range(1, n + 1)]


def batch_on(results: Results, source: Iterable[bytes], window: int = 8) -> BatchFile:
    def key(line: InputLine) -> str:
        return digest(str(line.raw), line.prompt)

    batch = BatchFile(read_lines(source), results, key, window=window)
    batch.resume()
    return batch


def answer(engine: FakeEngine, batch: BatchFile) -> None:
    """Run, ending the last requests from another thread as an engine does."""

    def end_all() -> None:
        while engine.under_way:
            engine.end_one()

    timer = threading.Timer(0.2, end_all)
    timer.start()
    try:
        batch.run(engine.submit)
    finally:
        timer.cancel()


def answered(out: Path, source: list[bytes]) -> FakeEngine:
    """An engine that has answered the source into the file."""
    engine = FakeEngine()
    with ResultFile(out) as results:
        answer(engine, batch_on(results, source))
    return engine


def test_every_line_has_its_row() -> None:
    results, engine = Memory(), FakeEngine()
    answer(engine, batch_on(results, lines()))
    assert results.n_written == N
    for index, row in results.rows.items():
        number = index + 1
        assert (row["id"], row["line"], row["text"]) == (f"r{number}", number, f"<{number}>")
    assert engine.started == list(range(1, N + 1))


def test_the_window_bounds_what_is_read() -> None:
    n_read = 0

    def counted() -> Iterator[bytes]:
        nonlocal n_read
        for line in lines():
            n_read += 1
            yield line

    results, most = Memory(), 0

    class NewestFirst(FakeEngine):
        """The worst order."""

        def added(self, work: Work) -> None:
            nonlocal most
            most = max(most, n_read - results.n_written)
            self.under_way.append(work)
            if len(self.under_way) == min(8, N - results.n_written):
                while self.under_way:
                    self.under_way.pop().end()

        def end_one(self) -> None:
            pass

    batch_on(results, counted(), window=8).run(NewestFirst().submit)
    assert most == 8
    assert results.n_written == N


def test_bad_lines_and_refused_requests_have_error_rows() -> None:
    results, engine = Memory(), FakeEngine(refuse={5, 9})
    source = lines()
    source[2] = b"not json\n"
    batch = batch_on(results, source)
    problems: list[Row] = []
    batch._on_problem = problems.append
    answer(engine, batch)
    errors = {row["line"]: row["error"] for row in results.rows.values() if "error" in row}
    assert errors.keys() == {3, 5, 9}
    assert "too long" in errors[5]
    assert sorted(row["line"] for row in problems) == [3, 5, 9]
    assert batch.n_failed == 3
    assert results.n_written == N


@pytest.mark.parametrize("stop_at", [1, 2, 17, 59, 60])
def test_interrupted_and_resumed(tmp_path: Path, stop_at: int) -> None:
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with ResultFile(out) as results:
        first = FakeEngine(interrupt_at=stop_at)
        batch = batch_on(results, lines())
        with pytest.raises(KeyboardInterrupt):
            batch.run(first.submit)
        batch.stop()
    finished = {
        json.loads(line)["line"]
        for path in (out, part)
        if path.exists()
        for line in path.read_bytes().splitlines()
    }
    assert finished <= set(first.started)

    with ResultFile(out) as results:
        second = FakeEngine()
        batch = batch_on(results, lines())
        answer(second, batch)
    assert finished.isdisjoint(second.started), "a finished line was redone"
    assert finished.union(second.started) == set(range(1, N + 1))
    assert batch.n_resumed == len(finished)
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, N + 1))
    assert not part.exists()


def test_an_interrupt_ends_the_run_between_two_rows() -> None:
    results, engine = Memory(), FakeEngine()
    batch = batch_on(results, lines())
    batch.interrupt()
    with pytest.raises(KeyboardInterrupt):
        batch.run(engine.submit)
    batch.stop()
    assert results.n_written < N


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert [len(answered(out, lines()).started) for _ in range(2)] == [N, 0]


@pytest.mark.parametrize("change", ["text", "id", "inserted", "removed"])
def test_a_changed_input_is_refused(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out.jsonl"
    answered(out, lines())
    before = out.read_bytes()
    changed = lines()
    if change == "text":
        changed[6] = b'{"id": "r7", "prompt": "another"}'
    elif change == "id":
        changed[6] = b'{"id": "other", "prompt": "7"}'
    elif change == "inserted":
        changed.insert(6, b'{"id": "new", "prompt": "new"}')
    else:
        del changed[6]
    with ResultFile(out) as results, pytest.raises(ArgumentError, match="'r7'"):
        batch_on(results, changed)
    assert out.read_bytes() == before


def test_a_longer_output_than_input_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    answered(out, lines())
    with ResultFile(out) as results, pytest.raises(ArgumentError, match="more rows"):
        batch_on(results, lines(7))


def test_more_lines_may_be_added(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert [len(answered(out, lines(n)).started) for n in (10, 25)] == [10, 15]


def test_a_dead_engine_ends_the_run_and_leaves_no_error_rows(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    engine = FakeEngine(fail_at=20)
    with ResultFile(out) as results:
        batch = batch_on(results, lines())
        with pytest.raises(EngineClosed):
            answer(engine, batch)
        batch.stop()
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) <= 19
    assert not any("error" in row for row in rows)


def test_a_read_error_ends_the_run() -> None:
    def broken() -> Iterator[bytes]:
        yield from lines(3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        batch_on(Memory(), broken()).run(FakeEngine(at_once=1).submit)
