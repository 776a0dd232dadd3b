"""A connection of this process with itself, as the server's are, and what came through it."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

from pyllamabatch.server.chunk_sink import ChunkSink


class Connection(asyncio.Protocol):
    """It knows whether its transport wants a pause. `other`: the socket at its other end."""

    transport: Any
    flow: FlowControl
    other: socket.socket
    when_lost: Callable[[], None] | None = None

    @classmethod
    async def make(cls) -> "Connection":
        ours, other = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(cls, sock=ours)
        made.other = other
        return made

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.flow = FlowControl(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.when_lost is not None:
            self.when_lost()

    def pause_writing(self) -> None:
        self.flow.pause_writing()

    def resume_writing(self) -> None:
        self.flow.resume_writing()

    def sink(self, before: bytes, after: bytes) -> ChunkSink:
        return ChunkSink(self, before, after)  # type: ignore[arg-type]

    def write_part(self, body: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(chunk(body))

    def come(self) -> bytes:
        """What is there at the other end."""
        self.other.setblocking(False)
        try:
            return self.other.recv(2**20)
        except BlockingIOError:
            return b""

    async def close(self) -> None:
        self.transport.abort()
        await asyncio.sleep(0)
        self.other.close()


def chunk(body: bytes) -> bytes:
    """Of HTTP."""
    return b"%x\r\n%b\r\n" % (len(body), body)


def bodies(data: bytes) -> Iterator[bytes]:
    """Those of whole chunks."""
    while data:
        size, _, data = data.partition(b"\r\n")
        n = int(size, 16)
        assert data[n : n + 2] == b"\r\n"
        yield data[:n]
        data = data[n + 2 :]
