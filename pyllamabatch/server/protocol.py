"""HttpProtocol: uvicorn's connection, to which a response can write without ASGI's messages."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..engine.followers import TextSink
from ..raw import ffi, lib
from .answer import TEXT_SINK, WRITES
from .errors import ApiError


class ChunkSink(TextSink):
    """Chunks of one response: `before`, a text, `after`. A text goes to the socket itself, as long
    as that takes it; what is left goes to the transport, and what comes behind it."""

    __slots__ = ("after", "before", "flow", "socket", "transport")

    def __init__(self, protocol: HttpProtocol, before: bytes, after: bytes) -> None:
        self.transport = transport = protocol.transport
        self.flow = protocol.flow
        self.socket: int = transport.get_extra_info("socket").fileno()
        self.before, self.after = before, after

    @classmethod
    def send(
        cls, sinks: Sequence[ChunkSink], texts: Sequence[bytes]
    ) -> Iterator[tuple[int, Awaitable[None]]]:
        """In one native call, with one write for each."""
        sockets, parts = list[int](), list[bytes]()
        for sink, text in zip(sinks, texts, strict=True):
            before, after, transport = sink.before, sink.after, sink.transport
            n = len(before) + len(text) + len(after)
            parts.append(b"%x\r\n%b%b%b\r\n" % (n, before, text, after))
            waits = transport.is_closing() or transport.get_write_buffer_size()
            sockets.append(-1 if waits else sink.socket)
        n_sent = ffi.new("int32_t[]", len(parts))
        ends = list(accumulate(map(len, parts)))
        if lib.plb_send(len(parts), sockets, b"".join(parts), ends, n_sent) == len(parts):
            return
        for i, sink in enumerate(sinks):
            if n_sent[i] < len(parts[i]) and not sink.transport.is_closing():
                sink.transport.write(parts[i][n_sent[i] :])
                if sink.flow.write_paused:
                    yield i, sink.flow.drain()


class HttpProtocol(HttpToolsProtocol):
    """Offers the ASGI extensions `WRITES` and `TEXT_SINK` where an answer of unknown length has
    chunks."""

    def on_headers_complete(self) -> None:
        scope = cast("dict[str, Any]", self.scope)
        if self.parser.get_http_version() == "1.1" and self.parser.get_method() != b"HEAD":
            scope["extensions"] = extensions = dict[str, Any]()
            extensions[WRITES] = self.write_part
            if self.scheme == "http":
                extensions[TEXT_SINK] = partial(ChunkSink, self)
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP. It is the end of the connection."""
        body = orjson.dumps(ApiError(400, msg, code="invalid_http").body)
        head = (
            b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head % len(body) + body)
        self.transport.close()

    def write_part(self, body: bytes) -> Awaitable[None] | None:
        """A chunk, in one write. Dropped where the client has left. For a response that has begun
        without a length, and is not at its end."""
        if self.transport.is_closing():
            return None
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return self.flow.drain() if self.flow.write_paused else None
