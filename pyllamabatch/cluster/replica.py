"""Replica: one engine and its HTTP application, as a Ray Serve deployment runs it.

Ray chooses the replica of a request, and counts it there until it ends. The bytes of the answer go
over a connection of their own from the replica to the front: for each token they would cost Ray
more than the engine."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, ExitStack, aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray import serve

from .call import TICKET_BYTES, Place, RoutedCall, Whole, answer, head_line, named, whole_answer

if TYPE_CHECKING:
    from ..server.service import Service

OpenApp = Callable[[], AbstractContextManager[Any]]
"""An application of `create_app` over an engine that is closed with it. It can be pickled."""

FETCH_SECONDS = 30.0
"""Until a front has come for an answer."""


class Waiting(NamedTuple):
    """An answer that a front is to fetch. `task`: what writes it there, and returns how
    many bytes."""

    call: RoutedCall
    task: asyncio.Future[asyncio.Task[int]]


class Replica:
    """Every method is for one event loop."""

    def __init__(self, open_app: OpenApp) -> None:
        self._stack = ExitStack()
        self._app = self._stack.enter_context(open_app())
        self._service: Service = self._app.state.service
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._waiting: dict[bytes, Waiting] = {}
        self._listening: asyncio.Task[asyncio.Server] | None = None

    async def __call__(self, call: RoutedCall) -> AsyncGenerator[Place | int, None]:
        """Where the answer is to be fetched; at its end, how many bytes were sent. Raises what the
        application does."""
        host, port = (await self._server()).sockets[0].getsockname()[:2]
        ticket = secrets.token_bytes(TICKET_BYTES)
        waiting = self._waiting[ticket] = Waiting(call, asyncio.get_running_loop().create_future())
        try:
            yield Place(host, port, ticket)
            yield await (await asyncio.wait_for(waiting.task, FETCH_SECONDS))
        finally:
            self._waiting.pop(ticket, None)
            if waiting.task.done() and not waiting.task.cancelled():
                waiting.task.result().cancel()

    async def _server(self) -> asyncio.Server:
        listening = self._listening
        if listening is None or (listening.done() and listening.exception() is not None):
            host = ray.util.get_node_ip_address()
            listening = asyncio.create_task(asyncio.start_server(self._fetched, host, 0))
            self._listening = listening
        return await asyncio.shield(listening)  # others wait for it, too

    async def _fetched(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A front has come. It leaves by closing its connection."""
        writer.transport.set_write_buffer_limits(0)  # what is written is sent when `drain` returns
        try:
            asked = reader.readexactly(TICKET_BYTES)
            ticket = await asyncio.wait_for(asked, FETCH_SECONDS)
            waiting = self._waiting.pop(ticket, None)
            if waiting is None or waiting.task.done():
                return
            writing = asyncio.create_task(self._write(waiting.call, writer))
            waiting.task.set_result(writing)
            leaving = asyncio.create_task(reader.read())
            await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
            writing.cancel()
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            pass  # it was no front
        finally:
            writer.close()

    async def _write(self, call: RoutedCall, writer: asyncio.StreamWriter) -> int:
        """How many bytes."""
        n = 0
        async with aclosing(answer(self._app, call)) as parts:
            async for part in parts:
                data = part if isinstance(part, bytes) else head_line(named(part, self._name))
                n += len(data)
                writer.write(data)
                await writer.drain()
        return n

    def check_health(self) -> None:
        """RuntimeError where the engine has ended: Ray makes another replica."""
        if self._service.has_engine and self._service.engine.closed:
            raise RuntimeError("the engine is closed")

    def record_routing_stats(self) -> dict[str, float]:
        """What a `ReplicaView` has of them."""
        if not self._service.has_engine:
            return {}
        stats = self._service.engine.stats()
        return {"wait": stats.wait_s, "row_seconds": stats.row_s}

    async def whole(self, call: RoutedCall) -> Whole:
        """Its answer to what all replicas are asked."""
        return await whole_answer(self._app, call, self._name)

    def __del__(self) -> None:
        self._service.close()
        self._stack.close()
