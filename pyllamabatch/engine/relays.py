"""Relays: tokens and results in event loops of asyncio, without a thread per request.

The output thread wakes a loop once however many of its tasks have news. Each task then takes what
is there for it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

from ..errors import QueueFull
from .results import Chunk, Result
from .stream import Stream

if TYPE_CHECKING:
    from .core import EngineCore
    from .stream_sink import StreamSink


class Relay:
    """The way into one event loop, which it does not keep alive."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._lock = threading.Lock()
        self._due: list[Callable[[], None]] = []

    def future(self) -> tuple[asyncio.Future[None], Callable[[], None]]:
        """A future of the loop, and what completes it: from any thread, also more than once. In
        the loop."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._run)
                return
        except RuntimeError:
            pass
        self._due.clear()  # the loop is closed, and its tasks with it

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
        self._of: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Relay]
        self._of = weakref.WeakKeyDictionary()

    def here(self) -> Relay:
        loop = asyncio.get_running_loop()
        with self._lock:
            relay = self._of.get(loop)
            if relay is None:
                relay = self._of[loop] = Relay(loop)
            return relay


async def submit(core: EngineCore, sinks: Sequence[StreamSink], relay: Relay) -> None:
    """As `EngineCore.submit`, but the task waits while there is no room."""
    deadline = sinks[0].request.options.deadline if sinks else None
    while True:
        future, wake = relay.future()
        try:
            core.submit(sinks, 0)
            return
        except QueueFull:
            if core.commands.when_room(wake, len(sinks)):
                continue
        left = None if deadline is None else deadline - perf_counter()
        await asyncio.wait({future}, timeout=left)


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


async def generate(core: EngineCore, sinks: list[StreamSink], relay: Relay) -> list[Result]:
    """What they are in the end, in their order."""
    streams = [sink.stream for sink in sinks]
    try:
        for group in core.groups(sinks):
            await submit(core, group, relay)
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
