"""Followers: what is new of many streams, given in one pass of the event loop for each step.

A token whose text stands alone goes straight from the page to a `TextWriter`. All else is a `Chunk`
of the stream."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from ..step.ring_reader import Page
from .relays import Relay
from .results import Chunk
from .stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self

Take = Callable[[Chunk], Awaitable[None] | None]
"""Gets what is new. What it returns is awaited before it gets more."""


class TextSink(Protocol):
    """Takes what `TextWriter.write` would get, of many streams at once."""

    @classmethod
    @abstractmethod
    def send(
        cls, sinks: Sequence[Self], texts: Sequence[bytes]
    ) -> Iterable[tuple[int, Awaitable[None]]]:
        """Each gets its text, without `before` and `after`. Yields what is awaited before sink i
        gets more. Does not raise."""


@dataclass(frozen=True, slots=True)
class TextWriter:
    """A `Take` that wants the text only: `write` gets `before`, the text as `encode` gives it, and
    `after`. `encode` gives the same for a text as for its parts one after the other. `sink`: does
    the same as `write`; all of a loop are of one class."""

    before: bytes
    after: bytes
    encode: Callable[[str], bytes]
    write: Callable[[bytes], Awaitable[None] | None]
    sink: TextSink | None = None

    def __call__(self, chunk: Chunk) -> Awaitable[None] | None:
        return self.write(self.before + self.encode(chunk.text) + self.after)


NO_WRITER = TextWriter(b"", b"", str.encode, lambda content: None)


class Follower:
    """One stream, of which `take` has had `index` tokens. `ended` is done behind the last of it, or
    has the exception of `take`."""

    __slots__ = (
        "ahead", "at", "blocked", "ended", "index", "page", "slot", "stream", "take", "texts",
        "took_s", "turn", "writer",
    )  # fmt: skip

    def __init__(self, stream: Stream, take: Take) -> None:
        self.stream = stream
        self.take = take
        self.writer = writer = take if isinstance(take, TextWriter) else NO_WRITER
        self.texts = stream._texts(writer.encode)
        self.index = 0
        self.took_s = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.blocked: asyncio.Future[None] | None = None
        self.page: Page | None = None
        self.slot = self.turn = 0  # of the page's column, see `Column`
        self.ahead = self.at = 0  # of `index`: where that is in the column, and in the page

    def find(self) -> None:
        """Its next token, where that is enough."""
        column = None if self.writer is NO_WRITER else self.stream._column(self.index)
        if column is None:
            self.page = None
        else:
            self.page, self.slot, at, self.turn = column
            self.ahead = at - self.index
            self.at = self.ahead + self.slot * self.page.token.shape[1]

    def has_news(self) -> bool:
        """There may be more than it has had, where the page alone does not tell."""
        stream = self.stream
        return stream._page is not None or len(stream._tokens) != self.index or stream.done


class Followers:
    """Those of one event loop. `observe(seconds, n)`: so long after the last news of a stream there
    are more; of `n` streams, or each of `n` tokens that came together."""

    def __init__(self, relay: Relay, observe: Callable[[float, int], None]) -> None:
        self._observe = observe
        self._open: dict[Follower, None] = {}
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
        now, gaps = perf_counter(), dict[float, int]()
        page: Page | None = None
        shown: Sequence[int] = ()
        to: list[Follower] = []
        sinks, texts = list[TextSink](), list[bytes]()
        for one in list(self._open):
            if one.page is None:
                if one.blocked is None and one.has_news():
                    self._read(one, now)
                continue
            if one.page is not page:
                page = one.page
                shown, turns, tokens = page.shown, page.turns, page.tokens
            index, text = one.index, None
            n_new = shown[one.slot] - one.ahead - index
            if turns[one.slot] == one.turn:  # looked at behind `shown`: what is there is its own
                if n_new == 0:
                    continue
                if n_new == 1:
                    text = one.texts[tokens[one.at + index]]
            if text is None:
                self._read(one, now)
                continue
            one.index = index + 1
            gap = now - one.took_s
            one.took_s = now
            gaps[gap] = gaps.get(gap, 0) + 1
            writer = one.writer
            if writer.sink is not None:
                to.append(one)
                sinks.append(writer.sink)
                texts.append(text)
                continue
            try:
                blocked = writer.write(writer.before + text + writer.after)
            except Exception as error:
                self._end(one, error)
            else:
                if blocked is not None:
                    self._wait_for(one, blocked)
        if sinks:
            for i, blocked in sinks[0].send(sinks, texts):
                self._wait_for(to[i], blocked)
        for gap, n in gaps.items():
            self._observe(gap, n)

    def _read(self, one: Follower, now: float) -> None:
        stream = one.stream
        try:
            while one in self._open:
                done = stream.done  # before the chunk: behind a last one there is an empty one
                chunk = stream._chunk_from(one.index)
                blocked = None
                if chunk is not None:
                    n = chunk.stop - one.index
                    if n == 0:
                        self._end(one)
                        return
                    if one.index:
                        self._observe((now - one.took_s) / n, n)
                    one.index, one.took_s = chunk.stop, now
                    blocked = one.take(chunk)
                if blocked is not None:
                    self._wait_for(one, blocked)
                    return
                if not done:
                    one.find()
                    return
        except Exception as error:
            self._end(one, error)

    def _wait_for(self, one: Follower, blocked: Awaitable[None]) -> None:
        one.page = None
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
        self._open.pop(one, None)
        if one.ended.done():
            return
        if error is None:
            one.ended.set_result(None)
        elif isinstance(error, asyncio.CancelledError):
            one.ended.cancel()
        else:
            one.ended.set_exception(error)
