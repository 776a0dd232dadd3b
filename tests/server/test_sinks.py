"""Texts that go to sockets at once, as long as these take them."""

import asyncio
import socket
import sys
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from pyllamabatch.server.protocol import ChunkSink

if sys.platform == "win32":
    LOOPS = [asyncio.new_event_loop]
else:
    import uvloop

    LOOPS = [uvloop.new_event_loop, asyncio.new_event_loop]

BEFORE, AFTER = b'data: {"text":"', b'"}\n\n'


class Paused(asyncio.Protocol):
    """A connection that knows whether its transport wants a pause."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.flow = FlowControl(transport)

    def pause_writing(self) -> None:
        self.flow.pause_writing()

    def resume_writing(self) -> None:
        self.flow.resume_writing()


def chunk(text: bytes) -> bytes:
    event = BEFORE + text + AFTER
    return b"%x\r\n%b\r\n" % (len(event), event)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_what_a_socket_does_not_take_comes_later(new_loop: Any) -> None:
    """In order, to a client that reads slowly; another one gets its texts at once meanwhile, and a
    third has left."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        pairs = [socket.socketpair() for _ in range(3)]
        made = [(await loop.create_connection(Paused, sock=ours))[1] for ours, _ in pairs]
        slow, quick, left = (ChunkSink(one, BEFORE, AFTER) for one in made)  # type: ignore[arg-type]
        left.transport.abort()
        texts, blocked = list[bytes](), list[Any]()
        while not blocked:
            texts.append(b"%d" % len(texts) * 1000)
            blocked += ChunkSink.send([left, slow, quick], [texts[-1]] * 3)
            assert pairs[1][1].recv(2**20) == chunk(texts[-1])
        ((i, drained),) = blocked
        assert i == 1
        got = pairs[0][1].recv(
            2**20
        )  # the socket has room again, of which the transport knows nothing
        texts.append(b"the last")
        more = [waits for _, waits in ChunkSink.send([slow], texts[-1:])]
        wanted = b"".join(map(chunk, texts))
        reader, writer = await asyncio.open_connection(sock=pairs[0][1])
        got += await reader.readexactly(len(wanted) - len(got))
        await asyncio.gather(drained, *more)
        assert got == wanted
        assert not slow.transport.get_write_buffer_size()
        writer.close()
        for one in made:
            one.transport.abort()
        await asyncio.sleep(0)
        pairs[1][1].close()
        pairs[2][1].close()

    loop = new_loop()
    try:
        loop.run_until_complete(asyncio.wait_for(run(), 60))
    finally:
        loop.close()
