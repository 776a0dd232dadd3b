"""What a front gets from a replica, or why not: pytest -m ray tests/cluster."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pyllamabatch.cluster.call import TICKET_BYTES, Place, head_line

pytestmark = pytest.mark.ray
HEAD = head_line((200, [(b"content-type", b"text/event-stream")]))
EVENT = b"data: 1\n\n"


async def fetch(sent: bytes, ended: Callable[[asyncio.Future[int]], Any], *, stays: bool) -> bytes:
    """The body, of a replica that sends these bytes and then closes, or stays. `ended` says what
    Ray does."""
    from pyllamabatch.cluster.front import fetched

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(TICKET_BYTES) == b"t" * TICKET_BYTES
        writer.write(sent)
        await writer.drain()
        ended(end)
        if not stays:
            writer.close()
        await end_of_test.wait()
        writer.close()

    end, end_of_test = asyncio.get_running_loop().create_future(), asyncio.Event()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    body = b""
    try:
        async for part in fetched(Place(host, port, b"t" * TICKET_BYTES), end):
            body += part if isinstance(part, bytes) else b""
    finally:
        end_of_test.set()
        server.close()
    return body


def run(sent: bytes, ended: Callable[[asyncio.Future[int]], Any], *, stays: bool = False) -> bytes:
    return asyncio.run(asyncio.wait_for(fetch(sent, ended, stays=stays), 20))


def test_all_has_come() -> None:
    sent = HEAD + 3 * EVENT
    assert run(sent, lambda end: end.set_result(len(sent))) == 3 * EVENT


def test_a_tail_that_is_missing_is_no_end() -> None:
    with pytest.raises(ConnectionError, match="was cut off"):
        run(HEAD + EVENT, lambda end: end.set_result(len(HEAD) + 2 * len(EVENT)))
    with pytest.raises(ConnectionError, match="was cut off"):
        run(HEAD[:5], lambda end: end.set_result(len(HEAD)))


def test_a_replica_that_is_gone_without_a_word() -> None:
    """Its connection stays open."""
    gone = RuntimeError("the actor died")
    with pytest.raises(RuntimeError, match="the actor died"):
        run(HEAD + EVENT, lambda end: end.set_exception(gone), stays=True)


def test_a_place_that_no_one_listens_at() -> None:
    from pyllamabatch.cluster.front import fetched

    async def fetch_from_nowhere() -> None:
        end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        async for _ in fetched(Place("127.0.0.1", 1, b"t" * TICKET_BYTES), end):
            pass

    with pytest.raises(ConnectionError, match=r"no connection to 127\.0\.0\.1:1:"):
        asyncio.run(fetch_from_nowhere())
