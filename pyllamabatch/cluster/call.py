"""Call: an HTTP request on its way to a replica, and the application there that answers it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import aclosing
from typing import Any, NamedTuple

import numpy as np
import orjson
from starlette.requests import Request

from ..kv.radix_tree import Tokens
from ..server.answer import HELD_BEGIN, WRITES, Write
from ..server.messages import unstamped

LINE_BYTES = 2**20  # of a head, at most
TICKET_BYTES = 16
CONNECT_SECONDS = 10.0
PAGE = "page"  # the key of what is asked without a body: always the same replica's
ROUTED_BY = "tools", "system", "instructions", "messages", "input", "prompt", "content"
"""Fields of a body, in the order of their texts in a prompt."""
REPLICA = b"x-replica"
"""A header of every answer: the name of the replica that gave it."""
Head = tuple[int, list[tuple[bytes, bytes]]]
"""A status and the headers."""
Whole = tuple[Head, bytes]
"""A head and the body."""


class Place(NamedTuple):
    """Where an answer can be fetched, once: who connects and sends the ticket gets the head, a
    line, and then the bytes of the body."""

    host: str
    port: int
    ticket: bytes

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises OSError with the address."""
        opening = asyncio.open_connection(self.host, self.port, limit=LINE_BYTES)
        try:
            reader, writer = await asyncio.wait_for(opening, CONNECT_SECONDS)
        except (OSError, asyncio.TimeoutError) as error:
            why = str(error) or f"nothing after {CONNECT_SECONDS:g} s"
            raise ConnectionError(f"no connection to {self.host}:{self.port}: {why}") from None
        writer.write(self.ticket)
        return reader, writer


def head_line(head: Head) -> bytes:
    status, headers = head
    pairs = [[text.decode("latin-1") for text in pair] for pair in headers]
    return orjson.dumps([status, pairs]) + b"\n"


def head_of(line: bytes) -> Head:
    """Of a `head_line`."""
    status, pairs = orjson.loads(line)
    return status, [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]


class RoutedCall(NamedTuple):
    """`prefix`: the bytes by which it is routed. `key`: see `Router.choose`. Its headers have no
    origin: what a page may read is the front's to say, and to say once."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    prefix: bytes = b""
    key: str = ""

    @classmethod
    def of(cls, request: Request, body: bytes) -> RoutedCall:
        scope = request.scope
        prefix, key = routed_by(body) if body else (b"", PAGE)
        headers = [header for header in scope["headers"] if header[0] != b"origin"]
        return cls(
            scope["method"], scope["path"], scope["query_string"], headers, body, prefix, key
        )

    def prompt(self) -> Tokens:
        """What a `Router` looks at."""
        return np.frombuffer(self.prefix, np.uint8).astype(np.int32)

    def scope(self, write: Write) -> dict[str, Any]:
        """`write` gets parts of the body that need no task."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query,
            "headers": self.headers,
            "client": None,
            "server": None,
            "extensions": {HELD_BEGIN: {}, WRITES: write},
        }


def routed_by(body: bytes) -> tuple[bytes, str]:
    """The bytes of a prompt that two requests have in common where their prompts begin alike, and
    the key that a client gave. A body that is not understood is for the replica to refuse."""
    try:
        values = orjson.loads(body)
        if not isinstance(values, dict):
            return b"", ""
        values["system"] = unstamped(values.get("system"))
        parts = [_written(values[name]) for name in ROUTED_BY if values.get(name)]
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # it reads deeper than it writes
        return b"", ""
    key = values.get("prompt_cache_key")
    return b"".join(parts), key if isinstance(key, str) else ""


def _written(value: Any) -> bytes:
    """Of token ids so many bytes for each as a text has."""
    if isinstance(value, list) and all(type(one) is int and abs(one) < 2**31 for one in value):
        return np.array(value, "<i4").tobytes()
    return value.encode() if isinstance(value, str) else orjson.dumps(value)


def named(head: Head, replica: str) -> Head:
    status, headers = head
    return status, [*headers, (REPLICA, replica.encode())]


async def whole_answer(app: Any, call: RoutedCall, replica: str) -> Whole:
    """What the application of this replica answers, at once."""
    head: Head = (500, [])
    body = b""
    async with aclosing(answer(app, call)) as parts:
        async for part in parts:
            if isinstance(part, bytes):
                body += part
            else:
                head = named(part, replica)
    return head, body


async def answer(app: Any, call: RoutedCall) -> AsyncGenerator[Head | bytes, None]:
    """What the application writes: the head, then the bytes of the body, all that have come since
    the last ones. Leaving before the end is a client that leaves. Raises what the application does
    before its answer is whole."""
    heads: list[Head] = []
    parts: list[bytes] = []
    news, left = asyncio.Event(), asyncio.Event()
    asked = whole = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await left.wait()
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": call.body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal whole
        if message["type"] == "http.response.start":
            heads.append((message["status"], list(message["headers"])))
            news.set()
        else:
            if body := message.get("body"):
                write(bytes(body))
            whole = not message.get("more_body", False)

    def write(body: bytes) -> None:
        parts.append(body)
        news.set()

    running = asyncio.create_task(app(call.scope(write), receive, send))
    running.add_done_callback(lambda _: news.set())
    try:
        while heads or parts or not running.done():
            await news.wait()
            news.clear()
            if heads:
                yield heads.pop()
            if parts:
                body = b"".join(parts)
                parts.clear()
                yield body
        try:
            await running
        except Exception:
            if not whole:  # Starlette has answered a bug before it raises it again
                raise
    finally:
        left.set()
        running.cancel()
