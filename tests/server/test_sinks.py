"""Texts that go to sockets at once, as long as these take them."""

import asyncio
import contextlib
import os
import socket
import sys
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from pyllamabatch.engine.detokenizer import Pieces
from pyllamabatch.engine.followers import Followers, TextWriter
from pyllamabatch.engine.relays import Relay
from pyllamabatch.engine.stream import Host, Stream
from pyllamabatch.errors import EngineClosed
from pyllamabatch.server.protocol import HttpProtocol
from pyllamabatch.step.ring_reader import Page
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.connections import Connection, bodies, chunk

if sys.platform == "win32":
    LOOPS = [asyncio.new_event_loop]
else:
    import uvloop

    LOOPS = [uvloop.new_event_loop, asyncio.new_event_loop]

N_STEPS = 2000
GONE = 10  # a token whose text is not to be had any more


class Streams:
    """Some, each with a connection of its own, that get the same tokens step by step. The text of
    token i is `text(i)`."""

    def __init__(self, n: int) -> None:
        self.page = Page(n, N_STEPS)
        self.n_steps = 0
        self.gaps: list[int] = []
        relay = Relay(asyncio.get_running_loop())
        self.followers = Followers(relay, lambda seconds, n: self.gaps.append(n))
        pieces = Pieces(lambda tokens: [*map(text, tokens)])
        host = Host(lambda id: None, lambda stream: None)
        self.all = [Stream(i, 1, SamplingParams(), pieces, host, 0.0) for i in range(n)]
        for i, stream in enumerate(self.all):
            stream._begin(self.page, i)

    async def follow(self) -> None:
        self.ways = [await Connection.make() for _ in self.all]
        self.tasks = [
            asyncio.create_task(self.followers.follow(stream, self.writer(way)))
            for stream, way in zip(self.all, self.ways, strict=True)
        ]
        await asyncio.sleep(0)

    def writer(self, way: Connection) -> TextWriter:
        sink = partial(way.sink, b"<", b">")
        return TextWriter(b"<", b">", str.encode, way.write_part, sink)

    async def step(self, last: int | None = None) -> bytes:
        """What each gets; but the token of the last one is this."""
        page, i = self.page, self.n_steps
        page.token[:, i], page.step[:, i] = (token := i % 10), i
        if last is not None:
            page.token[-1, i] = last
        page.n_tokens[:] = self.n_steps = page.struct.n_steps = i + 1
        page.show()
        self.followers._tell()
        for _ in range(3):
            await asyncio.sleep(0)
        return b"<" + text(token) + b">"

    async def finish(self) -> None:
        for stream in self.all:
            stream._finish("stop")
        await asyncio.wait(self.tasks, timeout=60)

    async def close(self) -> None:
        for way in self.ways:
            await way.close()


def text(token: int) -> bytes:
    if token == GONE:
        raise EngineClosed("the vocabulary is gone")
    return b"%d" % token * 1000


def run(new_loop: Any, test: Any) -> None:
    loop = new_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(test(), 60))
    finally:
        loop.close()


@pytest.mark.parametrize("new_loop", LOOPS)
def test_what_a_socket_does_not_take_comes_later(new_loop: Any) -> None:
    """In order, to a client that reads slowly; another one gets its texts at once meanwhile, and a
    third has left."""

    async def test() -> None:
        streams = Streams(3)
        await streams.follow()
        slow, quick, left = streams.ways
        sent, got = list[bytes](), b""
        while not slow.transport.get_write_buffer_size():
            sent.append(await streams.step())
            assert list(bodies(quick.come())) == sent[-1:]
            if len(sent) == 20:
                left.transport.abort()
        assert len(sent) > 20
        for _ in range(5):  # they wait behind what the transport has
            got += slow.come()
            sent.append(await streams.step())
        wanted = b"".join(b"<" + text(i % 10) + b">" for i in range(len(sent)))
        reader, _ = await asyncio.open_connection(sock=slow.other)
        read = asyncio.create_task(reader.read())
        await streams.finish()
        slow.transport.close()  # behind what it has
        got += await read
        assert b"".join(bodies(got)).replace(b"><", b"") == wanted.replace(b"><", b"")
        await streams.close()
        assert [task.exception() for task in streams.tasks] == [None] * 3

    run(new_loop, test)


@pytest.mark.skipif(sys.platform == "win32", reason="sockets are no files there")
@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_socket_that_is_closed_gets_nothing_of_anothers(new_loop: Any) -> None:
    """A connection that comes right behind it may get its number."""

    async def test() -> None:
        streams = Streams(1)
        await streams.follow()
        for _ in range(20):
            await streams.step()
        (way,) = streams.ways
        number = way.transport.get_extra_info("socket").fileno()
        way.transport.abort()
        late = [await Connection.make() for _ in range(4)]
        numbers = [one.transport.get_extra_info("socket").fileno() for one in late]
        assert number in numbers
        await streams.step()
        for one in late:
            assert not one.come()
        await streams.finish()
        await streams.close()
        for one in late:
            await one.close()

    run(new_loop, test)


@pytest.mark.skipif(sys.platform == "win32", reason="sockets are no files there")
@pytest.mark.parametrize("leave", ["abort", "close", "client"])
@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_connection_tells_before_its_socket_is_closed(new_loop: Any, leave: str) -> None:
    """The server's own."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        made = HttpProtocol(uvicorn.Config(answer_nothing), ServerState(), {})
        ours, other = socket.socketpair()
        await loop.create_connection(lambda: made, sock=ours)
        number = made.transport.get_extra_info("socket").fileno()
        ends, lost = os.stat(number), loop.create_future()
        made.when_lost = lambda: lost.set_result(os.stat(number))
        other.close() if leave == "client" else getattr(made.transport, leave)()
        assert os.path.samestat(await lost, ends)
        other.close()

    run(new_loop, test)


async def answer_nothing(scope: Any, receive: Any, send: Any) -> None: ...


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit there")
@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_stream_takes_no_descriptor(new_loop: Any) -> None:
    """Beside its connection's: where there is none left, it goes on."""
    import resource

    async def test() -> None:
        streams = Streams(2)
        await streams.follow()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(0)
            sent = b"".join([await streams.step() for _ in range(12)])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for way in streams.ways:
            assert b"".join(bodies(way.come())) == sent
        await streams.finish()
        await streams.close()

    run(new_loop, test)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_a_text_that_is_not_to_be_had_ends_its_stream_alone(new_loop: Any) -> None:
    """What the socket of another one did not take of the same step comes later."""

    async def test() -> None:
        streams = Streams(2)
        await streams.follow()
        for _ in range(12):
            await streams.step()
        slow, _ = streams.ways
        slow.come()
        full = socket.socket(fileno=os.dup(slow.transport.get_extra_info("socket").fileno()))
        junk = 0
        with full, contextlib.suppress(BlockingIOError):
            while True:
                junk += full.send(b"x")
        sent = await streams.step(GONE)
        assert isinstance(streams.tasks[1].exception(), EngineClosed)
        reader, _ = await asyncio.open_connection(sock=slow.other)
        assert await reader.readexactly(junk) == b"x" * junk
        assert await reader.readexactly(len(chunk(sent))) == chunk(sent)
        streams.all[0]._finish("stop")
        await streams.tasks[0]
        await streams.close()

    run(new_loop, test)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_who_has_left_before_the_first_token_gets_none(new_loop: Any) -> None:
    async def test() -> None:
        streams = Streams(2)
        await streams.follow()
        streams.ways[0].transport.abort()
        await asyncio.sleep(0)
        sent = [await streams.step() for _ in range(12)]
        assert b"".join(bodies(streams.ways[1].come())) == b"".join(sent)
        await streams.finish()
        assert [task.exception() for task in streams.tasks] == [None] * 2
        await streams.close()

    run(new_loop, test)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_texts_of_a_step_are_counted_together(new_loop: Any) -> None:
    """They go to their sockets in one call, once a token's text is known."""

    async def test() -> None:
        streams = Streams(3)
        await streams.follow()
        for _ in range(30):
            await streams.step()
        assert streams.gaps[-10:] == [3] * 10
        await streams.finish()
        await streams.close()

    run(new_loop, test)
