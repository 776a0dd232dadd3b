"""PromptReports: what a client hears of its prompt before the first token."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ..engine.followers import Take
from ..engine.results import Chunk, PromptProgress
from ..engine.stream import Stream

Write = Callable[[PromptProgress], Awaitable[None] | None]
"""What it returns is awaited before more is written."""


class PromptReports:
    """Of one stream, in the running event loop. While a report can't be written, newer ones take
    its place; the last one, of the whole prompt, comes right before the first token."""

    def __init__(self, stream: Stream, write: Write) -> None:
        self._loop = asyncio.get_running_loop()
        self._write = write
        self._stream = stream
        self._n_told = -1
        self._blocked: asyncio.Future[None] | None = None
        self._open = True
        stream.on_prompt(self._tell)

    def before(self, take: Take) -> Take:
        """The same, behind the last report."""

        def taken(chunk: Chunk) -> Awaitable[None] | None:
            blocked = self.end()
            return take(chunk) if blocked is None else _behind(blocked, take, chunk)

        return taken

    def close(self) -> Awaitable[None] | None:
        """Nothing is written any more. Returns what is awaited before others write."""
        self._open = False
        return self._blocked

    def end(self) -> Awaitable[None] | None:
        """The prompt is computed: the last report, unless it is written already."""
        if not self._open:
            return None
        self._open = False
        if self._n_told < 0:  # the first token came before who asked
            times = self._stream.times()
            self._put(PromptProgress(times.n_prompt, times.n_cached, times.n_cached, 0.0))
        if self._blocked is not None:
            return self._end_behind(self._blocked)
        return self._write_end()

    def _write_end(self) -> Awaitable[None] | None:
        times = self._stream.times()
        if self._n_told == times.n_prompt:
            return None
        first = times.e2el_s if times.ttft_s is None else times.ttft_s
        seconds = first - (times.queue_s or 0.0)
        return self._write(PromptProgress(times.n_prompt, times.n_cached, times.n_prompt, seconds))

    async def _end_behind(self, blocked: Awaitable[None]) -> None:
        await blocked
        if (more := self._write_end()) is not None:
            await more

    def _tell(self, progress: PromptProgress) -> None:
        """In the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._report, progress)

    def _report(self, progress: PromptProgress) -> None:
        is_writing = self._blocked is not None and not self._blocked.done()
        if not self._open or is_writing or progress.n_computed <= self._n_told:  # it was preempted
            return
        self._put(progress)

    def _put(self, progress: PromptProgress) -> None:
        self._n_told = progress.n_computed
        blocked = self._write(progress)
        self._blocked = None if blocked is None else asyncio.ensure_future(blocked)


async def _behind(blocked: Awaitable[None], take: Take, chunk: Chunk) -> None:
    await blocked
    if (more := take(chunk)) is not None:
        await more
