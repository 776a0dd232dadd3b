"""Followers: what is new of many streams, given in one pass of the event loop for each step.

A token whose text stands alone goes straight from the page to a `TextWriter`'s sink. All else is a
`Chunk` of the stream."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Protocol

from .detokenizer import Texts
from .relays import Relay
from .results import Chunk
from .stream import Column, Stream

Take = Callable[[Chunk], Awaitable[None] | None]
"""Gets what is new. What it returns is awaited before it gets more."""


class TextSink(Protocol):
    """The way of a stream's texts out, past its `write`. All of a loop are of one class."""

    @classmethod
    @abstractmethod
    def table(cls) -> SinkTable:
        """For those of one loop."""

    @property
    @abstractmethod
    def is_free(self) -> bool:
        """What it takes now comes behind all that was written."""

    @abstractmethod
    def write(self, rest: bytes) -> Awaitable[None] | None:
        """What it did not take of a text, with what is around that."""

    @abstractmethod
    def when_lost(self, call: Callable[[], None] | None) -> None:
        """Calls this once, before what takes its texts is gone."""


class SinkTable(Protocol):
    """Followers whose sinks take what is new of a step, all at once."""

    @abstractmethod
    def put(self, one: Follower, column: Column) -> None:
        """Its next token is there. Sets `row` and `column`."""

    @abstractmethod
    def drop(self, one: Follower) -> None:
        """Brings its `index` and `took_s` up to date, and sets `column` to None."""

    @abstractmethod
    def send(self, now: float, observe: Callable[[float, int], None]) -> Iterable[Follower]:
        """Those that have more: of their token their sink did not take all, or they have other
        news. They may be dropped meanwhile. `observe`: see `Followers`."""

    @abstractmethod
    def rest(self, one: Follower) -> bytes | None:
        """What is left of its token; or None: it has other news. Of one that `send` has given."""


@dataclass(frozen=True, slots=True)
class TextWriter:
    """A `Take` that wants the text only: `write` gets `before`, the text as `encode` gives it, and
    `after`. `encode` gives the same for a text as for its parts one after the other. `sink()`:
    what does the same as `write`."""

    before: bytes
    after: bytes
    encode: Callable[[str], bytes]
    write: Callable[[bytes], Awaitable[None] | None]
    sink: Callable[[], TextSink] | None = None

    def __call__(self, chunk: Chunk) -> Awaitable[None] | None:
        return self.write(self.before + self.encode(chunk.text) + self.after)


class Follower:
    """One stream, of which `take` has had `index` tokens. `ended` is done behind the last of it, or
    has the exception of `take`. While it is in the table, that knows how far it is."""

    __slots__ = (
        "blocked", "column", "ended", "index", "row", "sink", "stream", "take", "texts", "took_s",
    )  # fmt: skip

    def __init__(self, stream: Stream, take: Take) -> None:
        self.stream = stream
        self.take = take
        self.index = 0
        self.took_s = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.blocked: asyncio.Future[None] | None = None
        self.column: Column | None = None  # that it came into the table with,
        self.row = -1  # and where it is there
        self.sink: TextSink | None = None
        self.texts: Texts | None = None

    def has_news(self) -> bool:
        """There may be more than it has had."""
        stream = self.stream
        return stream._page is not None or len(stream._tokens) != self.index or stream.done

    def find(self) -> Column | None:
        """Its next token, where its sink may take that."""
        take = self.take
        if not isinstance(take, TextWriter) or take.sink is None:
            return None
        column = self.stream._column(self.index)
        if column is None:
            return None
        if self.sink is None:
            self.sink, self.texts = take.sink(), self.stream._texts(take.encode)
        return column if self.sink.is_free else None


class Followers:
    """Those of one event loop. `observe(seconds, n)`: so long after the last news of a stream there
    are more; of `n` streams, or each of `n` tokens that came together."""

    def __init__(self, relay: Relay, observe: Callable[[float, int], None]) -> None:
        self._observe = observe
        self._open: dict[Follower, None] = {}  # those that are not in the table
        self._table: SinkTable | None = None
        self._wake = relay.call_of(self._pass)
        self._told = False  # the loop is about to look

    async def follow(self, stream: Stream, take: Take) -> None:
        """Returns when `take` has had all that comes, also where the end is an error. Raises what
        `take` raises. Leaving before the end cancels the request."""
        one = Follower(stream, take)
        self._open[one] = None
        stream._follow(self._tell)
        try:
            self._read(one, perf_counter())
            await one.ended
        finally:
            self._end(one)
            if one.blocked is not None:
                one.blocked.cancel()
            stream.cancel()

    def _tell(self) -> None:
        """There may be more. From any thread."""
        if not self._told:
            self._told = True
            self._wake()

    def _pass(self) -> None:
        self._told = False  # before it looks
        now = perf_counter()
        for one in list(self._open):
            if one.blocked is None and one.has_news():
                self._read(one, now)
        if self._table is None:
            return
        for one in self._table.send(now, self._observe):
            if one.column is not None:  # it has not ended meanwhile
                self._read(one, now)

    def _read(self, one: Follower, now: float) -> None:
        stream = one.stream
        try:
            blocked = self._write_rest(one)
            while blocked is None and one in self._open:
                done = stream.done  # before the chunk: behind a last one there is an empty one
                chunk = stream._chunk_from(one.index)
                if chunk is not None:
                    n = chunk.stop - one.index
                    if n == 0:
                        self._end(one)
                        return
                    if one.index:
                        self._observe((now - one.took_s) / n, n)
                    one.index, one.took_s = chunk.stop, now
                    blocked = one.take(chunk)
                if blocked is None and not done:
                    self._put(one)
                    return
            if blocked is not None:
                self._wait_for(one, blocked)
        except Exception as error:
            self._end(one, error)

    def _write_rest(self, one: Follower) -> Awaitable[None] | None:
        """Out of the table: what its sink did not take."""
        if self._table is None or one.column is None or one.sink is None:
            return None
        rest = self._table.rest(one)
        self._drop(one)
        return None if rest is None else one.sink.write(rest)

    def _put(self, one: Follower) -> None:
        """Into the table, where that is enough for its next token."""
        column = one.find()
        if column is None or one.sink is None:
            return
        if self._table is None:
            self._table = one.sink.table()
        self._table.put(one, column)
        one.sink.when_lost(partial(self._drop, one))
        del self._open[one]

    def _drop(self, one: Follower) -> None:
        if self._table is not None and one.column is not None and one.sink is not None:
            self._table.drop(one)
            one.sink.when_lost(None)
            self._open[one] = None

    def _wait_for(self, one: Follower, blocked: Awaitable[None]) -> None:
        one.blocked = asyncio.ensure_future(blocked)
        one.blocked.add_done_callback(lambda blocked: self._go_on(one, blocked))

    def _go_on(self, one: Follower, blocked: asyncio.Future[None]) -> None:
        one.blocked = None
        if blocked.cancelled():
            self._end(one, asyncio.CancelledError())
        elif (error := blocked.exception()) is not None:
            self._end(one, error)
        else:
            self._read(one, perf_counter())

    def _end(self, one: Follower, error: BaseException | None = None) -> None:
        """It takes nothing more."""
        self._drop(one)
        self._open.pop(one, None)
        if one.ended.done():
            return
        if error is None:
            one.ended.set_result(None)
        elif isinstance(error, asyncio.CancelledError):
            one.ended.cancel()
        else:
            one.ended.set_exception(error)
