"""The delivery thread: from the ring to the streams, while the core's next steps are computed.

It moves steps from the ring to a page, which costs no Python per sequence, looks for stop strings
in the streams that have any, wakes who waits for tokens, and ends streams. What the core does
between two steps reaches it as events, each with the number of the step that it comes before, so
that everything happens to a stream in the order in which it was computed.

Where nobody waits for tokens it lets them lie in the ring for a while.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..step.ring_reader import Page
from ..step.trace import StepTrace
from .protocols import ReaderLike
from .stream import FinishReason, Stream

log = logging.getLogger(__name__)

PAGE_STEPS = 128
LAZY_SECONDS = 0.1  # tokens that nobody waits for are taken at least so often, while any come
IDLE_SECONDS = 1.0
TELL_SECONDS = 5e-5  # what a reader who is woken needs; it is left to them before more are woken
REST_SECONDS_MAX = 0.005
AT_ONCE = 8  # streams that are searched before the core may come first


class OutputProcessor:
    """`on_stop(id)`: a stop string has ended the text of a request whose tokens still come.
    `on_failure(error)`: the thread is about to end because of a bug. `on_end()`: a stream has
    ended. All of them are called by the delivery thread.

    place, leave, end and close are the core's: `at` is the number of steps recorded so far."""

    def __init__(
        self,
        reader: ReaderLike,
        n_seq_max: int,
        on_stop: Callable[[int], None],
        on_failure: Callable[[BaseException], None],
        on_end: Callable[[], None],
        trace: StepTrace | None = None,
    ) -> None:
        self.finished: dict[str, int] = {
            "stop": 0,
            "length": 0,
            "cancelled": 0,
            "deadline": 0,
            "error": 0,
        }
        self.n_dropped = 0  # sampled, but behind a stop string
        self.thread = threading.Thread(target=self._run, name="pyllamabatch-delivery", daemon=True)
        self._reader = reader
        self._on_stop = on_stop
        self._on_failure = on_failure
        self._on_end = on_end
        self._trace = trace
        self._n_seq_max = n_seq_max
        self._at: list[Stream | None] = [None] * n_seq_max  # by slot
        self._with_stops: set[Stream] = set()
        self._watched: set[Stream] = set()  # somebody waits for more of them
        self._lazy = False  # the thread waits for many steps
        self._n_told = 0  # at the last turn
        self._n_read = 0
        self._events: deque[tuple[int, Callable[..., None], tuple[Any, ...]]] = deque()
        self._open = True
        self._page = self._new_page()

    # -- the core's side

    def place(self, at: int, slot: int, stream: Stream) -> None:
        """The tokens of this slot are the stream's."""
        self._events.append((at, self._place, (slot, stream)))

    def leave(self, at: int, slot: int) -> None:
        """The slot is nobody's."""
        self._events.append((at, self._leave, (slot,)))

    def end(
        self,
        at: int,
        stream: Stream,
        reason: FinishReason,
        stop: int | None = None,
        error: Exception | None = None,
    ) -> None:
        """The request has ended and left its slot."""
        self._events.append((at, self._end, (stream, reason, stop, error)))

    def close(self, at: int) -> None:
        """There will be nothing more: the thread ends."""
        self._events.append((at, self._stop, ()))

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def finish_rest(self, error: Exception) -> None:
        """When the thread has ended: if it failed, whoever has not been told of his end has not
        got all of his tokens either, and ends with this error."""
        for _, act, args in self._events:
            if act == self._end:
                stream = args[0]
                try:
                    self._end(stream, "error", None, error)
                except Exception:
                    log.exception("the end of request %d was not delivered", stream.id)

    # -- any thread

    def watch(self, stream: Stream) -> None:
        """Somebody waits for more of this stream."""
        self._watched.add(stream)
        if self._lazy:
            self._reader.wake()

    # -- the thread

    def _run(self) -> None:
        try:
            while self._open:
                published = self._wait()
                began = time.perf_counter()
                self._hand_out(published)
                busy = time.perf_counter() - began + self._n_told * TELL_SECONDS
                time.sleep(min(busy, REST_SECONDS_MAX))  # others need the interpreter, too
        except BaseException as error:
            log.exception("the delivery thread failed; its engine is closed")
            self._on_failure(error)

    def turn(self) -> None:
        """Wait for steps or events, and hand out what there is."""
        self._hand_out(self._wait())

    def _hand_out(self, published: int) -> None:
        events = self._events
        while True:
            # What comes before a step was in `events` before the step was handed over.
            self._read(min(published, events[0][0]) if events else published)
            if not events or events[0][0] > self._n_read:
                break
            self._reader.yield_to_compute()
            _, act, args = events.popleft()
            act(*args)
        for i, stream in enumerate(list(self._with_stops), 1):
            if stream._scan():
                self._with_stops.discard(stream)
                self._on_stop(stream.id)
            if i % AT_ONCE == 0:
                self._reader.yield_to_compute()
        self._tell()

    def _wait(self) -> int:
        reader, n = self._reader, self._n_read
        if self._events:
            return reader.wait(max(n, self._events[0][0]), LAZY_SECONDS)
        self._lazy = (
            not self._with_stops and not self._n_told
        )  # said before `_watched` is looked at
        if self._watched or not self._lazy:
            self._lazy = False
            return reader.wait(n + 1, IDLE_SECONDS)
        anybody = any(stream is not None for stream in self._at)
        published = reader.wait(
            n + reader.n_steps_max // 2, LAZY_SECONDS if anybody else IDLE_SECONDS
        )
        self._lazy = False
        return published

    def _read(self, until: int) -> None:
        while self._n_read < until:
            n = self._reader.read(until, self._page)
            if n:
                self._n_read += n
                self._page.show()
            else:
                self._turn_page()

    def _turn_page(self, *, logprobs: bool = False) -> None:
        page = self._page = self._new_page(logprobs)
        for stream in self._at:
            if stream is not None:
                stream._turn_to(page)

    def _new_page(self, logprobs: bool = False) -> Page:
        streams = [stream for stream in self._at if stream is not None]
        logprobs = logprobs or any(stream._logprobs is not None for stream in streams)
        page = Page(self._n_seq_max, PAGE_STEPS, self._reader.n_logprobs_max if logprobs else None)
        if self._trace is not None:
            self._trace.add_steps(page.steps)
        return page

    def _tell(self) -> None:
        told = [stream for stream in self._watched.copy() if stream._has_more() or stream.done]
        for stream in told:
            self._watched.discard(stream)
            stream._tell()
        self._n_told = len(told)

    # -- events

    def _place(self, slot: int, stream: Stream) -> None:
        if stream._logprobs is not None and self._page.logprob is None:
            self._turn_page(logprobs=True)
        self._at[slot] = stream
        stream._begin(self._page, slot)
        if stream._harmless is not None:
            self._with_stops.add(stream)

    def _leave(self, slot: int) -> None:
        stream, self._at[slot] = self._at[slot], None
        assert stream is not None
        stream._turn_to(None)

    def _end(
        self, stream: Stream, reason: FinishReason, stop: int | None, error: Exception | None
    ) -> None:
        self._with_stops.discard(stream)
        self._watched.discard(stream)
        stream._finish(reason, stop, error, self._count)
        self._on_end()

    def _count(self, reason: FinishReason, n_dropped: int) -> None:
        self.finished[reason] += 1
        self.n_dropped += n_dropped

    def _stop(self) -> None:
        self._open = False
