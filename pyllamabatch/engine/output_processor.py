"""OutputProcessor: a thread that brings what was sampled from the ring to the streams, while the
core computes the next steps.

It copies steps from the ring to a page, which costs no Python per sequence. Streams take their
tokens from the page when they are read. The thread itself looks only at streams with stop strings
and at those that a reader waits for.

What the core does between two steps comes as an event with the number of steps before it, so that
everything happens to a stream in the order in which it was computed."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..step.ring_reader import Page, StepTable
from ..step.trace import StepTrace
from .protocols import RingReader
from .results import FinishReason
from .stream import Stream

log = logging.getLogger(__name__)

PAGE_STEPS = 128
LAZY_SECONDS = 0.1  # the longest wait while tokens come that no reader waits for
IDLE_SECONDS = 1.0
WAKE_SECONDS = 5e-5  # what a reader that is woken needs, before more are woken
PAUSE_SECONDS_MAX = 0.005
AT_ONCE = 8  # streams that are searched before the core may come first


class Wait(Enum):
    """What the thread waits for."""

    EVENT = auto()  # the steps before the next event
    STEP = auto()  # the next step: a reader waits, or a stop string may be in it
    MANY = auto()  # many steps, or a reader that comes to wait: it wakes the thread


class Core(Protocol):
    """What the thread tells the core. `cancel(id, "stop")`: a stop string has ended the text.
    `ended()`: a stream has. `fail(error)`: the thread ends because of a bug."""

    def cancel(self, id: int, reason: FinishReason) -> None: ...
    def ended(self) -> None: ...
    def fail(self, error: BaseException) -> None: ...


class OutputProcessor:
    """`place`, `leave`, `end` and `close` are for the core thread, `watch` for any."""

    def __init__(
        self, reader: RingReader, n_slots: int, core: Core, trace: StepTrace | None = None
    ) -> None:
        self.finished: dict[str, int] = dict.fromkeys(
            ("stop", "length", "cancelled", "deadline", "error"), 0
        )
        self.n_dropped = 0  # tokens that were sampled behind a stop string
        self.thread = threading.Thread(target=self._run, name="pyllamabatch-output", daemon=True)
        self._reader = reader
        self._core = core
        self._trace = trace
        self._n_slots = n_slots
        self._at: list[Stream | None] = [None] * n_slots  # by slot
        self._with_stops: set[Stream] = set()
        self._watched: set[Stream] = set()  # a reader waits for more of them
        self._followed: set[Stream] = set()
        self._left: list[Stream] = []  # slots, since followers were told
        self._wait = Wait.STEP
        self._n_woken = 0  # readers, at the last turn
        self._n_read = self._n_told = 0
        self._events: deque[tuple[int, Callable[..., None], tuple[Any, ...]]] = deque()
        self._open = True
        self._page = self._new_page()
        # How many steps had 0, 1, ... tokens, without those of a last page.
        self._counted = np.zeros(1, np.int64), self._page.steps

    # -- the core thread

    def place(self, slot: int, stream: Stream) -> None:
        """The tokens of this slot are the stream's from now on."""
        self._add(self._place, slot, stream)

    def leave(self, slot: int) -> None:
        """The slot is free."""
        self._add(self._leave, slot)

    def end(
        self,
        stream: Stream,
        reason: FinishReason,
        stop: int | None = None,
        error: Exception | None = None,
    ) -> None:
        """The request has ended and left its slot."""
        self._add(self._end, stream, reason, stop, error)

    def close(self) -> None:
        """Nothing comes any more: the thread ends."""
        self._add(self._close)

    def _add(self, act: Callable[..., None], *args: Any) -> None:
        self._events.append((self._reader.n_recorded, act, args))

    @property
    def has_events(self) -> bool:
        return bool(self._events)

    def finish_rest(self, error: Exception) -> None:
        """When the thread has ended. If it failed, streams whose end is still to come have not got
        all of their tokens, and end with this error."""
        lines = error.__traceback__
        for _, act, args in self._events:
            if act == self._end:
                stream = args[0]
                stream._traceback = lines
                try:
                    self._end(stream, "error", None, error)
                except Exception:
                    log.exception("the end of request %d was not delivered", stream.id)

    # -- any thread

    def step_tokens(self) -> dict[int, int]:
        """How many steps had so many tokens: rows of prompts, and those that were sampled."""
        before, steps = self._counted
        counts = _more(before, steps)
        return {n: int(counts[n]) for n in counts.nonzero()[0].tolist()}

    def watch(self, stream: Stream) -> None:
        """A reader waits for more of this stream, or it has a follower."""
        if stream._is_waited_for:
            self._watched.add(stream)
        if stream._followers:
            self._followed.add(stream)
        if self._wait is Wait.MANY:
            self._reader.wake()

    # -- the thread

    def _run(self) -> None:
        try:
            while self._open:
                published = self._wait_for_steps()
                began = time.perf_counter()
                self._process(published)
                busy = time.perf_counter() - began + self._n_woken * WAKE_SECONDS
                time.sleep(min(busy, PAUSE_SECONDS_MAX))  # others need the interpreter, too
        except BaseException as error:
            log.exception("the output thread failed; its engine is closed")
            self._core.fail(error)

    def turn(self) -> None:
        """Wait for steps or events, and process what there is."""
        self._process(self._wait_for_steps())

    def _process(self, published: int) -> None:
        events = self._events
        while True:
            # An event that comes before a step was in `events` before the step was published.
            self._read(min(published, events[0][0]) if events else published)
            if not events or events[0][0] > self._n_read:
                break
            self._reader.yield_to_compute()
            _, act, args = events[0]
            act(*args)
            events.popleft()  # not before: `finish_rest` ends a stream whose end has failed
        for i, stream in enumerate(list(self._with_stops), 1):
            if stream._scan():
                self._with_stops.discard(stream)
                self._core.cancel(stream.id, "stop")
            if i % AT_ONCE == 0:
                self._reader.yield_to_compute()
        self._wake_readers()

    def _wait_for_steps(self) -> int:
        reader, n = self._reader, self._n_read
        self._wait = self._next_wait()
        if self._wait is Wait.EVENT:
            return reader.wait(max(n, self._events[0][0]), LAZY_SECONDS)
        wanted = self._watched or self._followed  # looked at after `_wait` was set
        if self._wait is Wait.MANY and wanted:
            self._wait = Wait.STEP
        if self._wait is Wait.STEP:
            return reader.wait(n + 1, IDLE_SECONDS)
        running = any(stream is not None for stream in self._at)
        most = LAZY_SECONDS if running else IDLE_SECONDS
        published = reader.wait(n + reader.n_steps_max // 2, most)
        self._wait = Wait.STEP  # the thread is awake
        return published

    def _next_wait(self) -> Wait:
        if self._events:
            return Wait.EVENT
        return Wait.STEP if self._with_stops or self._n_woken else Wait.MANY

    def _read(self, until: int) -> None:
        while self._n_read < until:
            n = self._reader.read(until, self._page)
            if n:
                self._page.show()
                self._n_read += n
            else:
                self._turn_page()

    def _turn_page(self, *, logprobs: bool = False) -> None:
        counts = _more(*self._counted)
        page = self._page = self._new_page(logprobs)
        self._counted = counts, page.steps
        for stream in self._at:
            if stream is not None:
                stream._turn_to(page)

    def _new_page(self, logprobs: bool = False) -> Page:
        streams = [stream for stream in self._at if stream is not None]
        logprobs = logprobs or any(stream._logprobs is not None for stream in streams)
        page = Page(self._n_slots, PAGE_STEPS, self._reader.n_logprobs_max if logprobs else None)
        if self._trace is not None:
            self._trace.add_steps(page.steps)
        return page

    def _wake_readers(self) -> None:
        woken = [stream for stream in self._watched.copy() if stream._news() or stream.done]
        for stream in woken:
            self._watched.discard(stream)
            stream._wake()
        self._n_woken = len(woken)
        if self._followed and self._n_told != self._n_read:
            told = self._followed.intersection((*self._at, *self._left))
            for tell in {tell for stream in told for tell in stream._followers}:
                tell()
            self._n_woken += len(told)
        self._n_told = self._n_read
        self._left.clear()

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
        self._left.append(stream)

    def _end(
        self, stream: Stream, reason: FinishReason, stop: int | None, error: Exception | None
    ) -> None:
        stream._finish(reason, stop, error, self._count)
        for streams in (self._with_stops, self._watched, self._followed):  # none comes back now
            streams.discard(stream)
        self._core.ended()

    def _count(self, reason: FinishReason, n_dropped: int) -> None:
        self.finished[reason] += 1
        self.n_dropped += n_dropped

    def _close(self) -> None:
        self._open = False


def _more(counts: npt.NDArray[np.int64], steps: StepTable) -> npt.NDArray[np.int64]:
    """With those of these steps."""
    new = np.bincount(steps.tokens, minlength=len(counts))
    new[: len(counts)] += counts
    return new
