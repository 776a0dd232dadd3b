"""Stream: one request's tokens and text as they come; Result: what it was in the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

from .text import TextFeed

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `text`: what it adds to the text, "" where a character or a stop string
    is only partly there. `logprob`, `top_logprobs` (token -> log-probability, the most likely
    first): None unless asked for."""

    token: int
    text: str
    index: int
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request.

    `tokens`: all that were generated, but for the end-of-generation or stop token that ended them;
    tokens that make up a stop string are there, their text is not. `stop`: the text or the token
    that ended it. `error`: why, when `finish_reason` is "error". `ttft_s`: from submission to the
    first token, None when there was none; `e2el_s`: to the end.
    """

    id: int
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    n_prompt: int
    n_generated: int
    ttft_s: float | None
    e2el_s: float
    stop: str | int | None = None
    error: Exception | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None


class Stream:
    """A submitted request. Every method may be called from any thread.

        for token in stream: ...            # Token objects, as soon as their text is certain
        for text in stream.text_stream():   # the same, text only
        stream.result(timeout=10)           # wait for the end

    Iterating starts at the first token each time. It raises the request's error where the tokens
    end because of one.
    """

    def __init__(
        self,
        id: int,
        n_prompt: int,
        *,
        stops: tuple[str, ...] = (),
        logprobs: int | None = None,
        cancel: Callable[[Stream], None],
        keep: object = None,
    ) -> None:
        self.id = id
        self.n_prompt = n_prompt
        self.submitted_at = perf_counter()
        self._first_at: float | None = None
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        self._end = threading.Condition(self._lock)
        self._n_readers = 0  # threads that wait for more
        self._tokens: list[int] = []
        self._pieces: list[bytes] = []
        self._logprobs: list[float] | None = None if logprobs is None else []
        self._top: list[dict[int, float]] | None = [] if logprobs else None
        self._feed = TextFeed(stops)
        self._stops = bool(stops)
        self._result: Result | None = None
        self._callbacks: list[Callable[[Stream], Any]] = []
        self._cancel = cancel
        self._keep = keep  # the engine lives as long as its streams

    # -- reading

    def __iter__(self) -> Iterator[Token]:
        index = 0
        while True:
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
        with self._lock:
            self._catch_up()
            return self._feed.text

    @property
    def tokens(self) -> list[int]:
        """The tokens so far."""
        with self._lock:
            return self._tokens.copy()

    @property
    def done(self) -> bool:
        return self._result is not None

    def wait(self, timeout: float | None = None) -> Result:
        """The result once it is there, also when it is an error. TimeoutError when it takes longer
        than `timeout` seconds."""
        with self._lock:
            if not self._end.wait_for(lambda: self._result is not None, timeout):
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
        if self.done:
            return False
        self._cancel(self)
        return True

    def add_done_callback(self, callback: Callable[[Stream], Any]) -> None:
        """`callback(stream)` is called once, when the request has ended: by the engine's thread,
        so it must be quick, or at once when it has ended already."""
        with self._lock:
            if self._result is None:
                self._callbacks.append(callback)
                return
        callback(self)

    def __repr__(self) -> str:
        result = self._result
        state = result.finish_reason if result else "open"
        return f"<Stream {self.id}: {state}, {len(self._tokens)} tokens>"

    # -- the engine's side

    def _push(
        self,
        tokens: list[int],
        pieces: list[bytes],
        now: float,
        logprobs: list[float] | None = None,
        top: list[dict[int, float]] | None = None,
    ) -> int | None:
        """More tokens, at least one. When one of them completes a stop string, the text ends with
        it: the number of tokens up to there, which are all that was taken."""
        taken = None
        with self._lock:
            if self._first_at is None:
                self._first_at = now
            if self._stops:
                feed = self._feed.feed
                taken = next((i for i, piece in enumerate(pieces, 1) if feed(piece)), None)
                if taken is not None:
                    tokens, pieces = tokens[:taken], pieces[:taken]
            self._tokens += tokens
            self._pieces += pieces
            if self._logprobs is not None and logprobs is not None:
                self._logprobs += logprobs[:taken]
                if self._top is not None and top is not None:
                    self._top += top[:taken]
            if self._n_readers:
                self._more.notify_all()
        return taken

    def _finish(
        self,
        reason: FinishReason,
        stop: str | int | None = None,
        error: Exception | None = None,
    ) -> None:
        now = perf_counter()
        with self._lock:
            if self._result is not None:
                return
            self._catch_up()
            self._feed.finish()
            first = self._first_at
            self._result = Result(
                id=self.id,
                text=self._feed.text,
                tokens=self._tokens.copy(),
                finish_reason=reason,
                n_prompt=self.n_prompt,
                n_generated=len(self._tokens),
                ttft_s=None if first is None else first - self.submitted_at,
                e2el_s=now - self.submitted_at,
                stop=self._feed.stop if stop is None else stop,
                error=error,
                logprobs=self._logprobs,
                top_logprobs=self._top,
            )
            self._keep = None
            callbacks, self._callbacks = self._callbacks, []
            self._more.notify_all()
            self._end.notify_all()
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Stream], Any]) -> None:
        try:
            callback(self)
        except Exception:
            log.exception("a done callback of request %d failed", self.id)

    # -- inside, with the lock held

    def _catch_up(self) -> None:
        feed = self._feed
        for piece in self._pieces[len(feed.parts) :]:
            feed.feed(piece)

    def _wait_for_more(self, index: int) -> None:
        self._n_readers += 1
        try:
            while True:
                self._catch_up()
                if self._feed.n_decided > index or self._result is not None:
                    return
                self._more.wait()
        finally:
            self._n_readers -= 1

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
            raise result.error.with_traceback(None)
