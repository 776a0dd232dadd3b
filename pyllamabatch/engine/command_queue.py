"""The commands: what other threads have for the core's, and whether they may.

Anybody posts acts, which the core's thread does between two steps, and waits here while it has
nothing to compute. Whoever comes through the door (`visit`) keeps the model and the stepper open
until he leaves; requests wait in front of it while the line is full. While it is drained, nothing
that is to be computed comes in; it is quiet when nothing is left of what was there before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from ..errors import EngineClosed, EngineDraining, QueueFull

Act = Callable[[], None]


class CommandQueue:
    """`ring()` ends the native call that goes on, if there is one, after the step that it is in.
    `max_waiting`: requests that have not had a slot yet, at most; None: any number."""

    def __init__(self, ring: Act, max_waiting: int | None = None) -> None:
        self.n_submitted = 0
        self.closed = False
        self.draining = False
        self.error: BaseException | None = None  # what closed it, if it was not `close`
        self._ring = ring
        self._max_waiting = max_waiting
        self._mail: list[Act] = []
        self._n_in_line = 0
        self._n_ended = 0  # of `n_submitted`, their readers told
        self._idle = False  # the core's thread has nothing to compute
        self._n_visitors = 0
        self._n_awaited = 0  # interactive sequences that the next step waits for
        # Guards all of this. A forgotten sequence may be collected while it is held.
        lock = threading.RLock()
        self._news = threading.Condition(lock)
        self._room = threading.Condition(lock)
        self._room_calls: list[Act] = []
        self._drains: list[Future[bool]] = []

    # -- from any thread

    @contextmanager
    def visit(self) -> Iterator[None]:
        """The model and the stepper stay open inside. EngineClosed when they are closed already."""
        with self._news:
            self._check_open()
            self._n_visitors += 1
        try:
            yield
        finally:
            with self._news:
                self._n_visitors -= 1
                self._news.notify()

    def submit(self, act: Act, n: int, timeout: float | None = None) -> None:
        """`act` takes in `n` requests. EngineClosed, EngineDraining, and QueueFull when the line
        has no room for all of them within `timeout` seconds (None: however long it takes)."""
        with self._news:
            self._room.wait_for(lambda: self._shut or self._has_room(n), timeout)
            self._check_open()
            self._check_taking()
            if not self._has_room(n):
                raise QueueFull(f"{self._n_in_line} requests wait, max_waiting={self._max_waiting}")
            self.n_submitted += n
            self._n_in_line += n
            self._put(act)
        self._ring()

    def ask(self, act: Act, *, more: bool, awaited: bool) -> None:
        """`act` is of a interactive sequence. `more`: it brings more to compute. `awaited`: it asks
        for a token, so that the step may wait for more of that kind. EngineClosed, and
        EngineDraining where it brings more."""
        with self._news:
            self._check_open()
            if more:
                self._check_taking()
            self._n_awaited -= 1
            wake = not awaited or self._n_awaited <= 0
            self._put(act, wake=wake)
        if wake:
            self._ring()

    def post(self, act: Act) -> None:
        """Taken also when it is closed, but nobody may be there to do it."""
        with self._news:
            self._put(act)
        self._ring()

    def close(self, last: Act) -> None:
        """Nobody comes in any more; `last` is the last that is done, but for what is posted."""
        with self._news:
            self.closed = True
            self._put(last)
            self._tell_room()
        self._ring()

    def drain(self) -> Future[bool]:
        """Nothing more to compute comes in until `resume`. True when all that was there has ended,
        False when it was resumed before that."""
        with self._news:
            self.draining = True
            self._tell_room()
            future: Future[bool] = Future()
            future.set_running_or_notify_cancel()  # nobody can cancel it
            self._drains.append(future)
            self._tell_drains()
            return future

    def resume(self) -> None:
        """EngineClosed."""
        with self._news:
            self._check_open()
            self.draining = False
            self._tell_drains(True)

    def ended(self) -> None:
        """A request has, and its reader knows."""
        with self._news:
            self._n_ended += 1
            self._tell_drains()

    # -- the line in front of the slots

    def has_room(self, n: int) -> bool:
        """Whether `n` more requests can be submitted at once."""
        with self._news:
            return self._has_room(n)

    def when_room(self, call: Act) -> bool:
        """Whether `submit` has an answer at once; if not, `call()` when it may be so."""
        with self._news:
            if self._shut or self._has_room(1):
                return True
            self._room_calls.append(call)
            return False

    def left_line(self) -> None:
        """A request has had a slot, or ended without one."""
        with self._news:
            self._n_in_line -= 1
            if self._max_waiting is not None:
                self._tell_room()

    # -- the core's thread

    def __bool__(self) -> bool:
        return bool(self._mail)

    def take(self) -> list[Act]:
        """All that is there, oldest first."""
        with self._news:
            mail, self._mail = self._mail, []
            self._idle = False
            return mail

    def put_back(self, mail: list[Act]) -> None:
        """What was not done after all."""
        with self._news:
            self._mail[:0] = mail

    def wait(self, seconds: float | None, n_awaited: int = 0) -> bool:
        """Until there is mail, or for so many seconds (None: however long it takes). `n_awaited`:
        so many interactive sequences are worth being woken for, all at once. False when there is
        nothing to wait for: it is closed."""
        with self._news:
            self._n_awaited = n_awaited
            if not self._mail:
                if seconds is None:
                    self._idle = True
                    self._tell_drains()
                    if self.closed:
                        return False
                self._news.wait(seconds)
            self._n_awaited = 0
        return True

    def fail(self, error: BaseException) -> list[Act]:
        """Closed, because of this; the mail that is left."""
        with self._news:
            self.closed, self.error = True, error
            return self.take()

    def end(self) -> None:
        """Nothing is done any more; returns when all visitors have left."""
        with self._news:
            self._tell_drains(True)
            self._news.wait_for(lambda: self._n_visitors == 0)

    def why_closed(self) -> EngineClosed:
        if self.error is None:
            return EngineClosed("the engine is closed")
        return EngineClosed(f"the engine is closed: its thread ended with {self.error!r}")

    # -- inside, with the lock held

    def _check_open(self) -> None:
        if self.closed:
            raise self.why_closed()

    def _check_taking(self) -> None:
        if self.draining:
            raise EngineDraining("the engine is drained: it takes no more until it is resumed")

    @property
    def _shut(self) -> bool:
        return self.closed or self.draining

    @property
    def _quiet(self) -> bool:
        return self._idle and not self._mail and self._n_ended == self.n_submitted

    def _tell_drains(self, anyway: bool = False) -> None:
        if self._drains and (anyway or self._quiet):
            drains, self._drains = self._drains, []
            for future in drains:
                future.set_result(self._quiet)

    def _put(self, act: Act, *, wake: bool = True) -> None:
        self._mail.append(act)
        if wake:
            self._news.notify()

    def _has_room(self, n: int) -> bool:
        return self._max_waiting is None or self._n_in_line + n <= self._max_waiting

    def _tell_room(self) -> None:
        self._room.notify_all()
        calls, self._room_calls = self._room_calls, []
        for call in calls:
            call()
