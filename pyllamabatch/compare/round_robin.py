"""A router in turns: what comes in over a connection goes to the next server, as it is."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from typing import Any

from pyllamabatch.compare.completion import HOST

PART_BYTES = 2**16


def route(pipe: Connection[Any, Any], ports: Sequence[int]) -> None:
    """The router, until its process ends. Sends its port."""
    asyncio.run(_route(pipe, ports))


async def _route(pipe: Connection[Any, Any], ports: Sequence[int]) -> None:
    from pyllamabatch.server.run import listen  # the extra `server`, for this arm alone

    turns = itertools.cycle(ports)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError):  # a server that has gone: its client is cut off
            to_reader, to_writer = await asyncio.open_connection(HOST, next(turns))
            await asyncio.gather(_pass(reader, to_writer), _pass(to_reader, writer))

    with listen(HOST, 0) as listening:
        async with await asyncio.start_server(connected, sock=listening) as server:
            pipe.send(listening.getsockname()[1])
            await server.serve_forever()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until one of them ends, which ends the other."""
    with closing(writer), suppress(ConnectionError):
        while part := await reader.read(PART_BYTES):
            writer.write(part)
            await writer.drain()
