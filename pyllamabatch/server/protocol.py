"""HttpProtocol: uvicorn's connection, to which a response can write without ASGI's messages."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .answer import TEXT_SINK, WRITES
from .chunk_sink import ChunkSink
from .errors import ApiError


class HttpProtocol(HttpToolsProtocol):
    """Offers the ASGI extensions `WRITES` and `TEXT_SINK` where an answer of unknown length has
    chunks. `when_lost`: called before its socket is closed, behind which another connection may get
    that number."""

    when_lost: Callable[[], None] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self.when_lost is not None:
            self.when_lost()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        scope = cast("dict[str, Any]", self.scope)
        if self.parser.get_http_version() == "1.1" and self.parser.get_method() != b"HEAD":
            scope["extensions"] = extensions = dict[str, Any]()
            extensions[WRITES] = self.write_part
            if self.scheme == "http" and sys.platform != "win32":
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
