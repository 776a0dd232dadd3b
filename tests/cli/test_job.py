"""The loop of `generate` with an engine of the test's own: order, window, resuming, failures."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pyllamabatch.cli.job import BadRequest, Item, Job
from pyllamabatch.cli.results import FileSink, ResultsProblem, Row, Sink
from pyllamabatch.cli.rows import BadLine, Request, digest, read_rows
from pyllamabatch.errors import EngineClosed

N = 60


class Memory:
    """A sink that keeps everything, and the most rows that ever waited for their turn."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.n_written = 0

    def add(self, index: int, row: Row) -> int:
        assert index not in self.rows
        self.rows[index] = row
        while self.n_written in self.rows:
            self.n_written += 1
        return self.n_written


@dataclass
class Work:
    request: Request
    ended: Callable[[], None]
    over: bool = False
    cancelled: bool = False

    def end(self) -> None:
        self.over = True
        self.ended()

    def cancel(self) -> None:
        if not self.over:
            self.cancelled = True
            self.end()


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

    def start(self, request: Request, ended: Callable[[], None]) -> Work:
        if request.line in self.refuse:
            raise BadRequest("too long")
        self.started.append(request.line)
        if self.interrupt_at == request.line:
            raise KeyboardInterrupt
        work = Work(request, ended)
        self.under_way.append(work)
        if len(self.under_way) >= self.at_once:
            self.end_one()
        return work

    def end_one(self) -> None:
        self.under_way.pop(self.rng.randrange(len(self.under_way))).end()

    def finish(self, request: Request, work: Work) -> Row | None:
        if self.under_way:
            self.end_one()
        if work.cancelled:
            return None
        if request.line == self.fail_at:
            raise EngineClosed("the engine has failed")
        if request.line in self.refuse:
            raise BadRequest("refused at the end")
        return {"text": f"<{request.prompt}>", "tokens": [1], "n_generated": 1}


def lines(n: int = N) -> list[bytes]:
    return [b'{"id": "r%d", "prompt": "%d"}\n' % (i, i) for i in range(1, n + 1)]


def key(item: Item) -> str:
    return digest(item.raw if isinstance(item, BadLine) else item.prompt)


def job_on(engine: FakeEngine, sink: Sink, source: Iterable[bytes], window: int = 8) -> Job[Work]:
    items: Iterator[Item] = read_rows(source, frozenset())
    return Job(items, sink, engine.start, engine.finish, key, window=window)


def drain(engine: FakeEngine, job: Job[Work]) -> None:
    """Run, ending the last requests from another thread as an engine does."""

    def end_all() -> None:
        for _ in list(engine.under_way):
            engine.end_one()

    timer = threading.Timer(0.2, end_all)
    timer.start()
    try:
        job.run()
    finally:
        timer.cancel()


def test_every_line_has_its_row() -> None:
    sink, engine = Memory(), FakeEngine()
    drain(engine, job_on(engine, sink, lines()))
    assert sink.n_written == N
    for index, row in sink.rows.items():
        assert (row["id"], row["line"], row["text"]) == (
            f"r{index + 1}",
            index + 1,
            f"<{index + 1}>",
        )
    assert engine.started == list(range(1, N + 1))


def test_the_window_bounds_what_is_read() -> None:
    n_read = 0

    def counted() -> Iterator[bytes]:
        nonlocal n_read
        for line in lines():
            n_read += 1
            yield line

    sink, engine = Memory(), FakeEngine(at_once=10**6)
    job = job_on(engine, sink, counted(), window=8)
    most = 0

    def start(request: Request, ended: Callable[[], None]) -> Work:
        nonlocal most
        most = max(most, n_read - sink.n_written)
        engine.under_way.append(Work(request, ended))
        if len(engine.under_way) == min(8, N - sink.n_written):
            while engine.under_way:
                engine.under_way.pop().end()  # the newest first: the worst order
        return Work(request, ended)

    job._start, job._finish = start, lambda request, work: {"n_generated": 1}
    job.run()
    assert most == 8
    assert sink.n_written == N


def test_bad_lines_and_refused_requests_have_error_rows() -> None:
    sink, engine = Memory(), FakeEngine(refuse={5, 9})
    source = lines()
    source[2] = b"not json\n"
    problems: list[Row] = []
    job = job_on(engine, sink, source)
    job._on_problem = problems.append
    drain(engine, job)
    errors = {row["line"]: row["error"] for row in sink.rows.values() if "error" in row}
    assert errors.keys() == {3, 5, 9}
    assert errors[5] == "too long"
    assert sorted(row["line"] for row in problems) == [3, 5, 9]
    assert job.n_failed == 3
    assert sink.n_written == N


@pytest.mark.parametrize("stop_at", [1, 2, 17, 59, 60])
def test_interrupted_and_resumed(tmp_path: Path, stop_at: int) -> None:
    out = tmp_path / "out.jsonl"
    with FileSink(out) as sink:
        first = FakeEngine(interrupt_at=stop_at)
        job = job_on(first, sink, lines())
        with pytest.raises(KeyboardInterrupt):
            job.run()
        job.stop()
    part = tmp_path / "out.jsonl.part"
    kept = {
        json.loads(line)["line"]
        for path in (out, part)
        if path.exists()
        for line in path.read_bytes().splitlines()
    }
    assert kept <= set(first.started)

    with FileSink(out) as sink:
        second = FakeEngine()
        job = job_on(second, sink, lines())
        drain(second, job)
    assert kept.isdisjoint(second.started), "a finished line was redone"
    assert kept.union(second.started) == set(range(1, N + 1))
    assert job.n_resumed == len(kept)
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, N + 1))
    assert not part.exists()


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for n_started in (N, 0):
        engine = FakeEngine()
        with FileSink(out) as sink:
            drain(engine, job_on(engine, sink, lines()))
        assert len(engine.started) == n_started


@pytest.mark.parametrize("change", ["text", "id", "inserted", "removed"])
def test_a_changed_input_is_refused(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out.jsonl"
    engine = FakeEngine()
    with FileSink(out) as sink:
        drain(engine, job_on(engine, sink, lines()))
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
    with FileSink(out) as sink, pytest.raises(ResultsProblem, match="'r7'"):
        job_on(FakeEngine(), sink, changed).run()
    assert out.read_bytes() == before


def test_a_longer_output_than_input_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    engine = FakeEngine()
    with FileSink(out) as sink:
        drain(engine, job_on(engine, sink, lines()))
    with FileSink(out) as sink, pytest.raises(ResultsProblem, match="more rows"):
        job_on(FakeEngine(), sink, lines(7)).run()


def test_more_lines_may_be_added(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for n, n_started in ((10, 10), (25, 15)):
        engine = FakeEngine()
        with FileSink(out) as sink:
            drain(engine, job_on(engine, sink, lines(n)))
        assert len(engine.started) == n_started


def test_a_dead_engine_ends_the_run_and_leaves_no_error_rows(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    engine = FakeEngine(fail_at=20)
    with FileSink(out) as sink:
        job = job_on(engine, sink, lines())
        with pytest.raises(EngineClosed):
            drain(engine, job)
        job.stop()
    rows = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) <= 19
    assert not any("error" in row for row in rows)


def test_a_read_error_ends_the_run() -> None:
    def broken() -> Iterator[bytes]:
        yield from lines(3)
        raise OSError("the disk is gone")

    engine = FakeEngine(at_once=1)
    with pytest.raises(OSError, match="the disk is gone"):
        job_on(engine, Memory(), broken()).run()
