"""Front: the ASGI application before the replicas. It knows no model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray.exceptions import (
    ActorUnschedulableError,
    RayActorError,
    RayError,
    RayTaskError,
    TaskCancelledError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from starlette.requests import Request

from ..errors import UnsupportedOperation
from ..server import errors
from ..server.answer import WRITES, event, named_event
from ..server.bodies import LONG_BYTES, content_of
from ..server.errors import ANTHROPIC, ApiError
from ..server.options import ServerOptions
from ..server.security import ApiKeys, Cors
from .call import REPLICA, Head, Place, RoutedCall, Whole, head_of
from .joined import JOINED

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from ..server.answer import Receive, Send, Write

log = logging.getLogger(__name__)

TRIES = 3
PART_BYTES = 2**16
EVENT_END = b"\n\n"
END_SECONDS = 60.0  # until Ray knows why an answer was cut off
LOST = (
    RayActorError, ActorUnschedulableError, ReplicaUnavailableError, DeploymentUnavailableError,
    OSError,
)  # fmt: skip
"""The replica has gone, not its answer."""


class Front:
    """`handle`: of a deployment of `Replica`. A request that a replica took with it is repeated as
    long as no token of it was sent; else its stream ends with an error that says so."""

    def __init__(self, handle: DeploymentHandle[Any], options: ServerOptions) -> None:
        self.draining = False
        self._handle = handle
        self._options = options
        self._open: set[asyncio.Task[Any]] = set()
        self._app: Any = self._answer
        if options.api_keys:
            self._app = ApiKeys(self._app, options.api_keys)
        if options.cors_origins:
            self._app = Cors(self._app, options.cors_origins)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._app(scope, receive, send)

    async def drain(self) -> None:
        """Open requests are finished, or cut off after `drain_timeout`."""
        end = time.monotonic() + self._options.drain_timeout
        while self._open and time.monotonic() < end:
            await asyncio.wait(self._open, timeout=end - time.monotonic())
        await self.stop()

    async def stop(self) -> None:
        for task in self._open:
            task.cancel()

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        sent = Sent(scope, send)
        try:
            if self.draining:
                message = "the server is about to end"
                raise ApiError(503, message, "unavailable_error", code="draining")
            request = Request(scope, receive)
            body = await content_of(request, self._options.body_bytes_max)
            call = (
                await asyncio.to_thread(RoutedCall.of, request, body)
                if len(body) > LONG_BYTES
                else RoutedCall.of(request, body)
            )
            if (call.method, call.path) == ("POST", "/lora-adapters"):
                message = "replicas come and go: they have no scales for all requests"
                raise UnsupportedOperation(f'{message}: name adapters in each request, by "lora"')
            passing = asyncio.create_task(self._pass_on(call, sent))
            self._open.add(passing)
            leaving = asyncio.create_task(_left(receive))
            try:
                await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._open.discard(passing)
                leaving.cancel()
                if not passing.done():
                    passing.cancel()
            if passing.cancelled():
                raise ApiError(503, "the server ended the request", "unavailable_error")
            if passing.done():
                passing.result()
        except Exception as error:
            await sent.failed(errors.of(error))

    async def _pass_on(self, call: RoutedCall, sent: Sent) -> None:
        """ApiError where no replica could answer."""
        lost: BaseException | None = None
        for _ in range(TRIES):
            try:
                joined = call.method == "GET" and call.path in JOINED
                source = self._joined(call) if joined else self._parts(call)
                async with aclosing(source) as parts:
                    async for part in parts:
                        await sent.part(part)
                await sent.end()
                return
            except BackPressureError as error:
                raise ApiError(429, str(error), "rate_limit_error", code="queue_full") from None
            except TaskCancelledError:
                raise ApiError(503, "the replica ended the request", "unavailable_error") from None
            except (RayError, *LOST) as error:
                lost = error.cause if isinstance(error, RayTaskError) else error
                if not isinstance(lost, LOST):
                    raise told(lost) from None
            if sent.began:
                break
        why = str(lost) if isinstance(lost, OSError) else type(lost).__name__
        message = f"the replica that computed this answer is gone: {why}"
        raise ApiError(503, message, "unavailable_error", code="replica_lost")

    async def _parts(self, call: RoutedCall) -> AsyncGenerator[Head | bytes, None]:
        """The head and the bytes of the answer."""
        response = self._handle.options(stream=True).remote(call)
        try:
            place: Place = await anext(response)
            ended = asyncio.ensure_future(anext(response))
            try:
                async with aclosing(fetched(place, ended)) as parts:
                    async for part in parts:
                        yield part
            finally:
                ended.cancel()
        except BaseException:  # the client has left, or the rest can't be had
            response.cancel()
            raise

    async def _joined(self, call: RoutedCall) -> AsyncGenerator[Head | bytes, None]:
        """The same of the answers of all replicas, or of the first one that refuses."""
        asked = call._replace(query=b"")
        answers: list[Whole] = await self._handle.broadcast("whole", asked).results_async()
        refused = [answer for answer in answers if answer[0][0] != 200]
        (status, headers), body = (refused or answers)[0]
        if not refused:
            body = await asyncio.to_thread(JOINED[call.path], answers, call.query)
        of_one = b"content-length", REPLICA
        yield status, [header for header in headers if header[0] not in of_one]
        yield body


def told(error: BaseException) -> ApiError:
    """What a client is told of what has failed in a replica. Ray's own texts are logged only: they
    have tracebacks, paths and addresses."""
    if not isinstance(error, RayError):
        return errors.of(error)
    log.error("a replica has failed", exc_info=error)
    return ApiError(500, type(error).__name__, "server_error")


async def fetched(place: Place, ended: asyncio.Future[int]) -> AsyncGenerator[Head | bytes, None]:
    """All that comes from there until `ended`: how many bytes that was. Raises what `ended` fails
    with, also where the connection does not tell; OSError where not all has come."""
    reader, writer = await place.connect()

    def failed(ended: asyncio.Future[int]) -> None:
        if ended.cancelled() or ended.exception() is not None:
            writer.transport.abort()

    ended.add_done_callback(failed)
    n = 0
    try:
        if (line := await reader.readline()).endswith(b"\n"):
            n = len(line)
            yield head_of(line)
        while part := await reader.read(PART_BYTES):
            n += len(part)
            yield part
    except OSError:
        pass  # `ended` knows more
    finally:
        writer.close()
    done, _ = await asyncio.wait((ended,), timeout=END_SECONDS)
    if not done or n != ended.result():
        raise ConnectionError(f"an answer from {place.host}:{place.port} was cut off")


class Sent:
    """What goes out for one request. The head waits for the first bytes of the body."""

    def __init__(self, scope: Any, send: Send) -> None:
        self.began = False
        self._path: str = scope["path"]
        self._scope = scope
        self._send = send
        self._head: Any = (500, [])
        self._write: Write | None = None  # for parts, where they need no message
        self._within = False  # an event: a part ends anywhere

    async def part(self, part: Any) -> None:
        if not isinstance(part, bytes):
            self._head = part
            return
        if not part:  # a chunk of nothing would be the last one
            return
        await self._begin()
        self._within = not part.endswith(EVENT_END)
        if self._write is None:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
        elif (blocked := self._write(part)) is not None:
            await blocked

    async def end(self) -> None:
        await self._begin()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def failed(self, error: ApiError) -> None:
        """As an answer of its own, or as the last event of a stream. What is neither is cut off."""
        if not self.began:
            await error.response(self._path)(self._scope, _nothing, self._send)
            return
        if dict(self._head[1]).get(b"content-type", b"").startswith(b"text/event-stream"):
            anthropic = self._path.startswith(ANTHROPIC)
            values = {"type": "error", **error.body}
            last = named_event("error", values) if anthropic else event(error.body)
            await self.part(EVENT_END + last if self._within else last)
            await self.end()
            return
        raise error

    async def _begin(self) -> None:
        if not self.began:
            self.began = True
            status, headers = self._head
            start = {"type": "http.response.start", "status": status, "headers": headers}
            await self._send(start)
            if b"content-length" not in dict(headers):
                self._write = (self._scope.get("extensions") or {}).get(WRITES)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> MutableMapping[str, Any]:
    return {"type": "http.disconnect"}


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{kind}.complete"})
        if kind == "shutdown":
            return
