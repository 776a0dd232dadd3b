"""Stream: one request's tokens and text as they come.

The output processor fills a page (`step/ring_reader.py`). A stream takes its tokens from there when
it is read, when the page is full, at its end, and at every step if it has stop strings."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple

from ..llama.vocab import Utf8Decoder
from ..step.ring_reader import Page
from ..step.sampling_params import SamplingParams
from .detokenizer import Pieces, TextFeed
from .process import Process
from .results import Chunk, FinishReason, PromptProgress, Result, TimesSoFar, Token

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Host:
    """What a stream needs of its engine, which it keeps alive while it is open. `cancel(id)` ends
    its request. `watch(stream)`: a reader waits for more. `may_wait()` raises in a thread, and
    `process` in a forked child, where a reader would wait for ever."""

    cancel: Callable[[int], None]
    watch: Callable[[Stream], None]
    engine: object = None
    may_wait: Callable[[], None] = lambda: None
    process: Process = field(default_factory=Process)


class Column(NamedTuple):
    """The next token of a stream is entry `at` of a page's column `slot`, as long as `turn` is the
    column's."""

    page: Page
    slot: int
    at: int
    turn: int


class Stream:
    """A submitted request. Every method may be called from any thread.

        for token in stream: ...            # Token objects, as soon as their text is certain
        for text in stream.text_stream():   # the same, text only
        stream.result(timeout=10)           # wait for the end

    Iterating starts at the first token each time. It raises the request's error where the tokens
    end because of one."""

    # without a dict: it has more attributes than those that CPython holds beside each other
    __slots__ = (
        "_admitted_at", "_callbacks", "_end", "_feed", "_first_at", "_followers", "_harmless",
        "_host", "_is_waited_for", "_lock", "_logprobs", "_more", "_n_accepted", "_n_computed",
        "_n_drafted", "_n_drafts", "_n_dropped", "_n_taken", "_n_told", "_page", "_pieces",
        "_pieces_of", "_prompt_callback", "_result", "_slot", "_stopped", "_texts", "_tokens",
        "_top", "_traceback", "id", "n_cached", "n_prompt", "submitted_at",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        n_prompt: int,
        params: SamplingParams,
        pieces: Pieces,
        host: Host,
        submitted_at: float,
    ) -> None:
        self.id = id
        self.n_prompt = n_prompt
        self.submitted_at = submitted_at
        self.n_cached = 0
        self._n_computed = 0  # tokens of its prompt, while it has no other
        self._prompt_callback: Callable[[PromptProgress], None] | None = None
        self._n_drafts = self._n_drafted = self._n_accepted = 0
        self._admitted_at: float | None = None
        self._first_at: float | None = None
        self._lock = threading.RLock()  # a prompt callback, or a signal's, may ask the stream
        self._more = threading.Condition(self._lock)
        self._end = threading.Condition(self._lock)
        self._page: Page | None = None  # while it has a slot
        self._slot = -1
        self._n_taken = 0  # tokens of the page's column
        self._tokens: list[int] = []
        self._logprobs: list[float] | None = None if params.logprobs is None else []
        self._top: list[dict[int, float]] | None = [] if params.logprobs else None
        self._pieces_of = pieces.of
        self._texts = pieces.texts
        stops = tuple(params.stop) if params.max_tokens else ()
        self._harmless = pieces.harmless(stops) if stops else None
        self._pieces: list[bytes] = []  # of all tokens, at the end
        self._feed = TextFeed(stops, params.min_tokens)
        self._stopped = params.max_tokens == 0  # or by a stop string
        self._n_dropped = 0  # tokens since then
        self._result: Result | None = None
        self._traceback: TracebackType | None = None  # of its error, which each raise makes longer
        self._callbacks: list[Callable[[Stream], Any]] = []
        self._followers: tuple[Callable[[], None], ...] = ()
        self._is_waited_for = False  # by readers that are no followers
        self._n_told = 0  # tokens that there were when readers were woken last
        self._host: Host | None = host  # until the end

    # -- reading

    def __iter__(self) -> Iterator[Token]:
        index = 0
        while True:
            self._check_process()
            with self._lock:
                self._wait_for_more(index)
                n_decided = self._feed.n_decided
                tokens = [self._token(i) for i in range(index, n_decided)]
            yield from tokens
            index = n_decided
            if not tokens:
                self._raise_error()
                return

    def text_stream(self) -> Iterator[str]:
        """The text, piece by piece, without empty pieces."""
        for token in self:
            if token.text:
                yield token.text

    @property
    def text(self) -> str:
        """The text so far."""
        self._check_process()
        with self._lock:
            self._watch()
            self._catch_up()
            return self._feed.text

    @property
    def tokens(self) -> list[int]:
        """The tokens so far."""
        self._check_process()
        with self._lock:
            self._watch()
            self._take()
            return self._tokens.copy()

    def between(self, start: int, stop: int) -> list[Token]:
        """The tokens of a `Chunk`."""
        with self._lock:
            return [self._token(i) for i in range(start, stop)]

    def wait_for_tokens(self, n: int) -> bool:
        """Whether it has so many tokens, once it has them or has ended. Their text may not be
        certain yet: half a character waits for its other half."""
        self._check_process()
        with self._lock:
            while True:
                self._take()
                if len(self._tokens) >= n or self._result is not None:
                    return len(self._tokens) >= n
                self._watch()
                if not self._has_more():  # as in `_wait_for_more`
                    self._wait()

    @property
    def done(self) -> bool:
        return self._result is not None

    def wait(self, timeout: float | None = None) -> Result:
        """The result once it is there, also when it is an error. TimeoutError when it takes longer
        than `timeout` seconds, EngineClosed in a forked child, UnsupportedOperation in a callback
        of the engine."""
        self._check_process()
        with self._lock:
            if (timeout is None or timeout > 0) and self._host is not None:
                self._host.may_wait()
            seconds = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
            if not self._end.wait_for(lambda: self._result is not None, seconds):
                raise TimeoutError(f"request {self.id} is not done after {timeout} s")
            assert self._result is not None
            return self._result

    def result(self, timeout: float | None = None) -> Result:
        """As `wait`, but raises the request's error when it failed."""
        result = self.wait(timeout)
        self._raise_error()
        return result

    def cancel(self) -> bool:
        """End the request within a step; what it has generated stays. False when it has ended
        already."""
        host = self._host
        if host is None:
            return False
        host.cancel(self.id)
        return True

    def add_done_callback(self, callback: Callable[[Stream], Any]) -> None:
        """`callback(stream)` is called once, when the request has ended: by the engine's output
        thread, so it must be quick, or at once when it has ended already. It may submit, which
        raises QueueFull where there is no room, and may not wait for another stream or sequence."""
        self._check_process()
        with self._lock:
            if self._result is None:
                self._callbacks.append(callback)
                return
        callback(self)

    def on_prompt(self, callback: Callable[[PromptProgress], None]) -> None:
        """`callback(progress)` is called when the request has its first slot, and behind each step
        that computes a part of its prompt, unless its first token was read already. By the engine's
        own thread: it must be quick. What it raises is logged, and it is not called again."""
        self._check_process()
        with self._lock:
            self._prompt_callback = callback
            if self._admitted_at is not None:
                self._tell_prompt(self.n_cached, self._admitted_at)
                if self._n_computed > self.n_cached:
                    self._tell_prompt(self._n_computed, perf_counter())

    def times(self) -> TimesSoFar:
        """What it has taken so far."""
        self._check_process()
        with self._lock:
            first, admitted, since = self._first_at, self._admitted_at, self.submitted_at
            return TimesSoFar(
                self.n_prompt, self.n_cached, len(self._tokens),
                None if admitted is None else admitted - since,
                None if first is None else first - since,
                perf_counter() - since, self._n_drafted, self._n_accepted,
            )  # fmt: skip

    def __repr__(self) -> str:
        result = self._result
        state = result.finish_reason if result else "open"
        return f"<Stream {self.id}: {state}, {len(self._tokens)} tokens>"

    # -- for the core thread

    def _admitted(self, n_cached: int) -> None:
        """It has its first slot, and so many of its tokens need not be computed."""
        with self._lock:
            self.n_cached = self._n_computed = n_cached
            self._admitted_at = now = perf_counter()
            self._tell_prompt(n_cached, now)

    def _prompt_computed(self, n: int) -> None:
        """So many of its tokens are."""
        self._n_computed = n
        if self._prompt_callback is not None:
            with self._lock:
                self._tell_prompt(n, perf_counter())

    def _drafted(self, n_drafts: int, n_drafted: int, n_accepted: int) -> None:
        self._n_drafts += n_drafts
        self._n_drafted += n_drafted
        self._n_accepted += n_accepted

    # -- for the output processor

    def _begin(self, page: Page, slot: int) -> None:
        """What comes into this column of the page from now on is this stream's."""
        with self._lock:
            self._page, self._slot = page, slot
            self._n_taken = page.shown[slot]
            page.turns[slot] += 1

    def _turn_to(self, page: Page | None) -> None:
        """Take what is left in the old page. `page`: the next one, None when it has no slot."""
        with self._lock:
            self._take()
            self._leave_column()
            self._page, self._n_taken = page, 0

    def _news(self) -> bool:
        """Whether there are other tokens than when this was asked last."""
        page, n = self._page, len(self._tokens)
        if page is not None:
            n += page.shown[self._slot] - self._n_taken
        if n == self._n_told:
            return False
        self._n_told = n
        return True

    def _scan(self) -> bool:
        """Look for a stop string in what is new; whether there has been one."""
        with self._lock:
            self._take()
            return self._stopped

    def _wake(self) -> None:
        """Wake the readers that wait for more."""
        with self._lock:
            self._is_waited_for = False
            self._more.notify_all()

    def _finish(
        self,
        reason: FinishReason,
        stop: str | int | None = None,
        error: Exception | None = None,
        count: Callable[[FinishReason, int], None] = lambda reason, n_dropped: None,
    ) -> None:
        """The end, unless a stop string was there first. `count(reason, n)` is called before the
        result can be seen; n: tokens behind a stop string, `stop` included."""
        now = perf_counter()
        with self._lock:
            if self._result is not None:
                return
            self._take()
            self._leave_column()
            self._page = None
            if error is not None and self._traceback is None:
                self._traceback = error.__traceback__
            if self._feed.stop is not None:
                self._n_dropped += stop is not None
                reason, stop, error = "stop", self._feed.stop, None
            elif self._stopped and reason == "stop":  # by the token that is left out
                self._n_dropped += 1
                reason, stop = "length", None
            self._pieces = self._pieces_of(self._tokens)  # the vocabulary may be gone later
            text = self._whole_text()
            count(reason, self._n_dropped)
            first, admitted = self._first_at, self._admitted_at
            self._result = Result(
                id=self.id,
                text=text,
                tokens=self._tokens.copy(),
                finish_reason=reason,
                n_prompt=self.n_prompt,
                n_generated=len(self._tokens),
                ttft_s=None if first is None else first - self.submitted_at,
                e2el_s=now - self.submitted_at,
                stop=stop,
                error=error,
                logprobs=self._logprobs,
                top_logprobs=self._top,
                queue_s=None if admitted is None else admitted - self.submitted_at,
                n_cached=self.n_cached,
                n_drafted=self._n_drafted,
                n_accepted=self._n_accepted,
                n_drafts=self._n_drafts,
            )
            self._host = None
            callbacks, self._callbacks = self._callbacks, []
            self._more.notify_all()
            self._end.notify_all()
            for follower in self._followers:
                follower()
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Stream], Any]) -> None:
        try:
            callback(self)
        except Exception:
            log.exception("a done callback of request %d failed", self.id)

    # -- inside, with the lock held

    def _tell_prompt(self, n: int, now: float) -> None:
        """`n` tokens of it are computed."""
        call, began = self._prompt_callback, self._admitted_at
        if call is None or began is None or self._first_at is not None:
            return
        try:
            call(PromptProgress(self.n_prompt, self.n_cached, n, now - began))
        except Exception:
            log.exception("a prompt callback of request %d failed", self.id)
            self._prompt_callback = None

    def _leave_column(self) -> None:
        if self._page is not None:
            self._page.turns[self._slot] += 1

    def _take(self) -> None:
        """What is new in the page."""
        page, slot = self._page, self._slot
        if page is None:
            return
        new = slice(self._n_taken, page.shown[slot])
        if new.start == new.stop:
            return
        self._n_taken = new.stop
        if self._stopped:
            self._n_dropped += new.stop - new.start
            return
        if self._first_at is None:
            self._first_at = page.steps.end_s(int(page.step[slot, new.start]))
        tokens = page.token[slot, new].tolist()
        self._tokens += tokens
        if self._logprobs is not None and page.logprob is not None:
            self._logprobs += page.logprob[slot, new].tolist()
            if self._top is not None:
                self._top += page.top(slot, new)
        harmless = self._harmless
        if harmless is not None and (self._feed.holds or not harmless.covers(tokens)):
            self._look_for_stops()

    def _look_for_stops(self) -> None:
        parts = self._feed.parts
        for piece in self._pieces_of(self._tokens[len(parts) :]):
            if self._feed.feed(piece):
                self._stopped = True
                n = len(parts)
                self._n_dropped = len(self._tokens) - n
                for values in (self._tokens, self._logprobs, self._top):
                    if values is not None:
                        del values[n:]
                return

    def _catch_up(self) -> None:
        """All text that there is so far."""
        self._take()
        feed = self._feed
        n = len(feed.parts)
        if n < len(self._tokens):
            for piece in self._pieces[n:] or self._pieces_of(self._tokens[n:]):
                feed.feed(piece)
        if self._result is not None:
            feed.finish()

    def _whole_text(self) -> str:
        """At the end. What was never read is not cut into tokens now."""
        if self._stopped:
            return self._feed.text
        decode = Utf8Decoder("replace").decode
        return decode(b"".join(self._pieces))  # without a last character that was not completed

    def _wait_for_more(self, index: int) -> None:
        while True:
            self._catch_up()
            if self._feed.n_decided > index or self._result is not None:
                return
            self._watch()
            if not self._has_more():  # once more: `_watch` was too late for what came before
                self._wait()

    def _wait(self) -> None:
        if self._host is not None:
            self._host.may_wait()
        self._more.wait()

    def _follow(self, call: Callable[[], None]) -> None:
        """`call()` each time when there may be more for `_chunk_from`, at the end too. It has to
        be quick, and may be called with the lock held."""
        self._check_process()
        with self._lock:
            self._followers = (*self._followers, call)
            if self._host is not None:
                self._host.watch(self)

    def _chunk_from(self, index: int) -> Chunk | None:
        """What is decided from `index` on; an empty chunk is the end. None: nothing yet."""
        with self._lock:
            self._catch_up()
            stop, parts = self._feed.n_decided, self._feed.parts
            if stop == index and self._result is None:
                return None
            text = parts[index] if stop == index + 1 else "".join(parts[index:stop])
            return Chunk(text, index, stop)

    def _column(self, index: int) -> Column | None:
        """Where the page has the tokens from `index` on, for a follower that wants their text. None
        where a chunk has to say it: of the first token, of log-probabilities and stop strings, of
        characters that are partly there."""
        more_than_text = self._logprobs is not None or self._harmless is not None
        with self._lock:
            page, behind = self._page, len(self._tokens) != index
            if page is None or behind or more_than_text or self._first_at is None:
                return None
            return Column(page, self._slot, self._n_taken, int(page.turns[self._slot]))

    def _has_more(self) -> bool:
        """Whether the page has tokens that were not taken yet."""
        page = self._page
        return page is not None and page.shown[self._slot] > self._n_taken

    def _watch(self) -> None:
        """The output processor fetches what is new. A reader that does not wait for it finds it
        the next time. The lock is held, so that no stream is watched behind its end."""
        host = self._host
        if host is not None:
            self._is_waited_for = True
            host.watch(self)

    def _check_process(self) -> None:
        """EngineClosed in a forked child, where the lock may be held for ever."""
        if (host := self._host) is not None:
            host.process.check()

    def _token(self, i: int) -> Token:
        return Token(
            token=self._tokens[i],
            text=self._feed.parts[i],
            index=i,
            logprob=None if self._logprobs is None else self._logprobs[i],
            top_logprobs=None if self._top is None else self._top[i],
        )

    def _raise_error(self) -> None:
        result = self._result
        if result is not None and result.error is not None:
            raise result.error.with_traceback(self._traceback)
