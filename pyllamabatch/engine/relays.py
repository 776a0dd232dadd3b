"""Relays: tokens and results in event loops of asyncio, without a thread per request.

The output thread wakes a loop once however many of its tasks have news. Each task then takes what
is there for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ..errors import QueueFull
from .results import Chunk, Result
from .stream import Stream

if TYPE_CHECKING:
    from .core import EngineCore
    from .stream_sink import StreamSink


class Relay:
    """The way into one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._due: list[Callable[[], None]] = []

    def future(self) -> tuple[asyncio.Future[None], Callable[[], None]]:
        """A future of the loop, and what completes it: from any thread, also more than once."""
        future: asyncio.Future[None] = self._loop.create_future()
        return future, self.call_of(partial(_complete, future))

    def call_of(self, call: Callable[[], None]) -> Callable[[], None]:
        """What has `call` called in the loop, from any thread, once for each time. It may not
        raise."""
        return partial(self._add, call)

    def _add(self, call: Callable[[], None]) -> None:
        with self._lock:
            self._due.append(call)
            if len(self._due) > 1:
                return  # the loop has been told already
        try:
            self._loop.call_soon_threadsafe(self._run)
        except RuntimeError:  # the loop is closed, and its tasks with it
            self._due.clear()

    def _run(self) -> None:
        with self._lock:
            due, self._due = self._due, []
        for call in due:
            call()


def _complete(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Relays:
    """One for each event loop that an engine serves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: WeakKeyDictionary[asyncio.AbstractEventLoop, Relay] = WeakKeyDictionary()

    def here(self) -> Relay:
        loop = asyncio.get_running_loop()
        with self._lock:
            relay = self._of.get(loop)
            if relay is None:
                relay = self._of[loop] = Relay(loop)
            return relay


async def submit(core: EngineCore, sink: StreamSink, relay: Relay) -> None:
    """As `EngineCore.submit`, but the task waits while there is no room."""
    while True:
        future, wake = relay.future()
        try:
            core.submit([sink], 0)
            return
        except QueueFull:
            if core.commands.when_room(wake):
                continue
        await future


async def chunks(stream: Stream, relay: Relay) -> AsyncGenerator[Chunk, None]:
    """What is new each time, as its text is decided. Leaving before the end cancels the request."""
    index, news = 0, asyncio.Event()
    stream._follow(relay.call_of(news.set))
    try:
        while True:
            news.clear()  # before it looks
            chunk = stream._chunk_from(index)
            if chunk is None:
                await news.wait()
            elif chunk.stop == index:
                stream._raise_error()
                return
            else:
                index = chunk.stop
                yield chunk
    finally:
        stream.cancel()


class Follower:
    """Gives `take` what is new of a stream each time, in the loop and without a switch of tasks.
    `ended` is done behind the last of it, or has the exception of `take`.

    What `take` returns is awaited before it gets more.
    """

    def __init__(
        self, stream: Stream, relay: Relay, take: Callable[[Chunk], Awaitable[None] | None]
    ) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stream = stream
        self._take = take
        self._tell = relay.call_of(self._read)
        self._index = 0
        self._told = False  # the loop is about to read
        self._blocked: asyncio.Future[None] | None = None
        stream._follow(self._news)
        self._read()

    def _news(self) -> None:
        """There may be more. From any thread."""
        if not self._told:
            self._told = True
            self._tell()

    def _read(self) -> None:
        self._told = False  # before it looks
        if self._blocked is not None:
            return
        stream, ended = self._stream, self.ended
        try:
            while not ended.done():
                done = stream.done  # before the chunk: behind a last one there is an empty one
                chunk = stream._chunk_from(self._index)
                if chunk is None:
                    return
                if chunk.stop == self._index:
                    ended.set_result(None)
                    return
                self._index = chunk.stop
                blocked = self._take(chunk)
                if blocked is not None:
                    self._blocked = asyncio.ensure_future(blocked)
                    self._blocked.add_done_callback(self._go_on)
                    return
                if not done:
                    return
        except Exception as error:
            if not ended.done():
                ended.set_exception(error)

    def _go_on(self, blocked: asyncio.Future[None]) -> None:
        self._blocked = None
        if self.ended.done():
            return
        if blocked.cancelled():
            self.ended.cancel()
        elif (error := blocked.exception()) is not None:
            self.ended.set_exception(error)
        else:
            self._read()

    def close(self) -> None:
        """It takes nothing more."""
        self.ended.cancel()
        if self._blocked is not None:
            self._blocked.cancel()


async def follow(
    stream: Stream, relay: Relay, take: Callable[[Chunk], Awaitable[None] | None]
) -> None:
    """Returns when `take` has had all chunks. Raises what it raises. Leaving before the end cancels
    the request."""
    follower = Follower(stream, relay, take)
    try:
        await follower.ended
    finally:
        follower.close()
        stream.cancel()


async def generate(core: EngineCore, sinks: list[StreamSink], relay: Relay) -> list[Result]:
    """What they are in the end, in their order."""
    streams = [sink.stream for sink in sinks]
    try:
        with core.commands.keep_alive():
            for sink in sinks:
                await submit(core, sink, relay)
        for stream in streams:
            future, wake = relay.future()
            stream.add_done_callback(partial(_call, wake))
            await future
    except BaseException:  # cancelled: they are not wanted any more
        for stream in streams:
            stream.cancel()
        raise
    return [stream.wait() for stream in streams]


async def outcome(future: Future[bool], timeout: float | None) -> bool:
    """What another thread makes of it; False after `timeout` seconds."""
    here = asyncio.wrap_future(future)
    await asyncio.wait({here}, timeout=timeout)
    return here.done() and here.result()


def _call(wake: Callable[[], None], _: Stream) -> None:
    wake()
