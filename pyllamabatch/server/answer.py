"""Answers to completions: whole, or as server-sent events while tokens come.

An `Answer` is one interface's form of a request: it turns chunks and results into bytes. A client
that leaves is noticed by `receive`, and what runs for it is cancelled."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from starlette.requests import Request
from starlette.responses import Response

from ..engine.followers import Take, TextWriter
from ..engine.results import Chunk, PromptProgress, Result
from ..engine.stream import Stream
from . import errors
from .errors import ApiError, json_response
from .prompt_reports import PromptReports
from .security import ApiKeys, Cors
from .tokens import came_too_late

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, MutableMapping

    from .service import Service

    Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

DONE = b"data: [DONE]\n\n"
WRITES = "pyllamabatch.writes"
"""An ASGI extension: a `Write` that stands for `send` of parts of the body."""
Write = Callable[[bytes], Awaitable[None] | None]
"""Writes a part of the body, not an empty one. What it returns is awaited before the next one."""
TEXT_SINK = "pyllamabatch.text_sink"
"""An ASGI extension: makes a `TextSink` of `before` and `after`, for a response of one stream."""
HELD_BEGIN = "pyllamabatch.held_begin"
"""An ASGI extension: nothing is sent before the first token, because what asks repeats a request of
which nothing was sent."""


class Answer(Protocol):
    """`i`: the choice. What returns bytes makes whole server-sent events, or none. reports: before
    the first token a client hears how far its prompt is."""

    reports: bool = False

    @abstractmethod
    def whole(self, results: Sequence[Result]) -> Any:
        """The answer without streaming, as JSON."""

    def begin(self) -> bytes:
        """Before the first token."""
        return b""

    def around(self, i: int) -> tuple[bytes, bytes] | None:
        """What is before and behind the text, as a JSON string without its quotes, in an event of
        what is new of a choice. None: `chunk` makes it."""
        return None

    def progress(self, i: int, progress: PromptProgress) -> bytes:
        """How far the prompt of a choice is."""
        return b""

    @abstractmethod
    def chunk(self, i: int, stream: Stream, chunk: Chunk) -> bytes:
        """What is new of a choice."""

    @abstractmethod
    def finish(self, i: int, result: Result) -> bytes:
        """A choice has ended well."""

    def end(self, results: Sequence[Result]) -> bytes:
        """All have."""
        return b""

    def failed(self, error: ApiError) -> bytes:
        """Instead of what is still to come."""
        return event(error.body)


def event(values: Any) -> bytes:
    return b"data: " + orjson.dumps(values, option=orjson.OPT_NON_STR_KEYS) + b"\n\n"


def named_event(name: str, values: Any) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(values)


async def respond(
    service: Service,
    request: Request,
    make: Callable[[], Answer],
    streams: Sequence[Stream],
    *,
    stream: bool,
) -> Response:
    """The response to a request whose streams run. They are cancelled where `make` raises."""
    try:
        answer = make()
    except BaseException:
        for one in streams:
            one.cancel()
        raise
    if stream:
        return EventStream(service, answer, streams)
    async with cancelled_on_leave(request.receive, streams):
        results = await asyncio.gather(*(_result(service, one) for one in streams))
    for result in results:
        if (error := failure(result)) is not None:
            raise error
    return json_response(answer.whole(results))


class EventStream(Response):
    """Server-sent events, a write for each step's news of a connection."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, answer: Answer, streams: Sequence[Stream]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service = service
        self._answer = answer
        self._streams = streams

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            async with cancelled_on_leave(receive, self._streams):
                await self._write(scope, send)
        finally:
            for stream in self._streams:
                stream.cancel()

    async def _write(self, scope: Any, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        answer, streams = self._answer, self._streams
        given = write_of(scope)
        write = given or (lambda content: send(_body(content)))
        alone = given is not None and len(streams) == 1
        self._sink_of = scope["extensions"].get(TEXT_SINK) if alone else None
        held = HELD_BEGIN in (scope.get("extensions") or ()) and not answer.reports
        if begin := answer.begin():
            if held:
                write = _behind(begin, write)
            else:
                await send(_body(begin))
        try:
            if len(streams) == 1 and not held:
                result, last = await self._follow(write, 0, streams[0])
                last += answer.end([result])
            else:
                results = await _all(
                    [self._follow_all(write, i, stream) for i, stream in enumerate(streams)]
                )
                last = answer.end(results)
        except Exception as error:  # the status has gone out: the last event says it
            last = answer.failed(errors.of(error))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _follow_all(self, write: Write, i: int, stream: Stream) -> Result:
        result, content = await self._follow(write, i, stream)
        if content and (waits := write(content)) is not None:
            await waits
        return result

    async def _follow(self, write: Write, i: int, stream: Stream) -> tuple[Result, bytes]:
        """The result of a choice, and its last events, which are still to be written."""
        answer = self._answer

        def take(chunk: Chunk) -> Awaitable[None] | None:
            content = answer.chunk(i, stream, chunk)
            return write(content) if content else None

        taker: Take = take
        reports: PromptReports | None = None
        if answer.reports:

            def report(progress: PromptProgress) -> Awaitable[None] | None:
                content = answer.progress(i, progress)
                return write(content) if content else None

            reports = PromptReports(stream, report)
            taker = reports.before(take)
        elif around := answer.around(i):
            sink = partial(self._sink_of, *around) if self._sink_of else None
            taker = TextWriter(*around, _escaped, write, sink)
        try:
            await self._service.followers.follow(stream, taker)
            result = stream.wait(0)
            self._service.metrics.ended(result)
            error = failure(result)
            if reports is not None:
                early = error is not None or came_too_late(result)
                blocked = reports.close() if early else reports.end()
                if blocked is not None:
                    await blocked
            if error is not None:
                raise error
        finally:
            if reports is not None:
                reports.close()
        return result, answer.finish(i, result)


def _escaped(text: str) -> bytes:
    return orjson.dumps(text)[1:-1]


async def _all(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The result of each. Raises the first error, when the others have ended, too: nothing writes
    behind the last part."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def write_of(scope: Any) -> Write | None:
    """The server's, unless other middleware than ours is on the way to it, which wants to see what
    is sent."""
    write: Write | None = (scope.get("extensions") or {}).get(WRITES)
    if write is None or any(one.cls not in (ApiKeys, Cors) for one in scope["app"].user_middleware):
        return None
    return write


def _behind(begin: bytes, write: Write) -> Write:
    """As `write`, but `begin` is before the first part."""
    held = begin

    def written(content: bytes) -> Awaitable[None] | None:
        nonlocal held
        if held:
            content, held = held + content, b""
        return write(content)

    return written


def _body(content: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": True}


async def _result(service: Service, stream: Stream) -> Result:
    """Its result, also when it failed. It is not read before its end: that costs nothing."""
    ended = asyncio.get_running_loop().create_future()
    loop = ended.get_loop()

    def wake() -> None:
        if not ended.done():
            ended.set_result(None)

    stream.add_done_callback(lambda _: loop.call_soon_threadsafe(wake))
    await ended
    result = stream.wait(0)
    service.metrics.ended_whole(result)
    return result


def failure(result: Result) -> ApiError | None:
    """Why there is no answer. A deadline ends one early, like a budget."""
    if result.error is not None:
        return errors.of(result.error)
    if result.finish_reason == "cancelled":
        return ApiError(503, "the server ended the request", "unavailable_error", code="cancelled")
    return None


class Cancellable(Protocol):
    @abstractmethod
    def cancel(self) -> object: ...


@asynccontextmanager
async def cancelled_on_leave(
    receive: Receive, streams: Sequence[Cancellable]
) -> AsyncIterator[None]:
    """A client that closes its connection inside cancels the streams, or other work."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for stream in streams:
            stream.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    finally:
        watching.cancel()
