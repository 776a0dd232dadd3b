"""CommandQueue: what threads want the engine to do, whether they may, and which of them does it.

A command is a callable; the thread that leads calls it between two steps, in the order of arrival.
Each command interrupts the native call that is going on, after the step that it is in.

- Leader: one thread at a time takes commands and runs steps. It is the core thread, or one that
  asks for a token while no other leads. See `stop_leading`.
- Room: with `max_waiting` a submission waits while so many requests wait for their first slot. One
  of more requests than that waits until no other does.
- Draining: nothing more to compute comes in until `resume`.
- Keep-alive: inside `keep_alive()` the model and the stepper stay open."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from ..errors import EngineClosed, EngineDraining, QueueFull
from .process import Process

Command = Callable[[], None]


class CommandQueue:
    """`interrupt()` ends the native call that goes on, if there is one. `max_waiting`: requests
    without a slot yet, at most; None: any number."""

    def __init__(self, interrupt: Command, max_waiting: int | None = None) -> None:
        self.n_submitted = 0
        self.closed = False
        self.draining = False
        self.error: BaseException | None = None  # what closed it, if it was not `close`
        self.process = Process()
        self._interrupt = interrupt
        self._max_waiting = max_waiting
        self._commands: list[Command] = []
        self._n_waiting = 0  # requests without a slot yet
        self._n_ended = 0  # of `n_submitted`, and their readers know
        self._led = 0  # the identity of the thread that leads; 0: none does
        self._rest = False  # the last leader has left something to compute
        self._ended = False  # nothing is done any more
        self._n_users = 0  # inside `keep_alive`
        self._n_awaited = 0  # interactive sequences that the next step waits for
        # Guards all of this. Reentrant: a sequence may be collected while its thread holds it.
        self._lock = lock = threading.RLock()
        self._news = threading.Condition(lock)  # for the leader
        self._work = threading.Condition(lock)  # for the core thread while it does not lead
        self._room = threading.Condition(lock)
        self._room_calls: list[Command] = []
        self._drains: list[Future[bool]] = []

    # -- from any thread

    @contextmanager
    def keep_alive(self) -> Iterator[None]:
        """The model and the stepper stay open inside. EngineClosed when they are closed. Nothing is
        awaited inside: `close` waits for its end, also in the event loop."""
        self.process.check()
        with self._lock:
            self._check_open()
            self._n_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_users -= 1
                if self.closed:
                    self._work.notify()

    def submit(
        self, command: Command, n: int, timeout: float | None = None, *, anyway: bool = False
    ) -> None:
        """`command` adds `n` requests. EngineClosed, EngineDraining, and QueueFull when there is no
        room for all of them within `timeout` seconds (None: however long it takes). `anyway`: they
        come in then, because they are over."""
        self.process.check()
        with self._lock:
            if self._max_waiting is not None:
                self._room.wait_for(lambda: self._shut or self._has_room(n), timeout)
            self._check_taking()
            if not (anyway or self._has_room(n)):
                raise QueueFull(f"{self._n_waiting} requests wait, max_waiting={self._max_waiting}")
            self.n_submitted += n
            self._n_waiting += n
            self._put(command)
        self._interrupt()

    def ask(self, command: Command, *, more: bool = False) -> None:
        """`command` is of an interactive sequence. `more`: it brings more to compute. EngineClosed,
        and EngineDraining where it brings more."""
        self.process.check()
        with self._lock:
            if more:
                self._check_taking()
            self._check_open()
            self._n_awaited -= 1
            self._put(command)
        self._interrupt()

    def ask_or_lead(self, command: Command) -> bool:
        """`command` asks for a token. True: no thread leads, so the caller does, until it calls
        `stop_leading`. False: another one leads, whose next step may wait for more of these. Raises
        as `ask`."""
        self.process.check()
        with self._lock:
            self._check_taking()
            if not self._led:
                self._commands.append(command)
                self._led = threading.get_ident()
                return True
            self._n_awaited -= 1
            wake = self._n_awaited <= 0
            self._put(command, wake=wake)
        if wake:
            self._interrupt()
        return False

    def post(self, command: Command) -> None:
        """Also taken when it is closed, unless the core thread has ended; not in a forked child."""
        if not self.process.is_here:
            return
        with self._lock:
            self._put(command)
        self._interrupt()

    def close(self, last: Command) -> None:
        """Nothing is submitted or asked for any more. `last` comes behind what is there. In a
        forked child nothing happens."""
        if not self.process.is_here:
            return
        with self._lock:
            self.closed = True
            self._put(last)
            self._tell_room()
        self._interrupt()

    def drain(self) -> Future[bool]:
        """Nothing more to compute comes in until `resume`. The result: True when all that was there
        has ended, False when it was resumed before."""
        self.process.check()
        with self._lock:
            self.draining = True
            self._tell_room()
            future: Future[bool] = Future()
            future.set_running_or_notify_cancel()  # so that it can't be cancelled
            self._drains.append(future)
            self._tell_drains()
            return future

    def resume(self) -> None:
        """EngineClosed."""
        self.process.check()
        with self._lock:
            self._check_open()
            self.draining = False
            self._tell_drains(anyway=True)

    def ended(self) -> None:
        """A request has, and its reader knows."""
        with self._lock:
            self._n_ended += 1
            self._tell_drains()

    # -- room

    def fits(self, n: int) -> bool:
        """Whether `n` more requests are within `max_waiting`."""
        with self._lock:
            return self._fits(n)

    def when_room(self, call: Command, n: int) -> bool:
        """Whether `submit` of `n` requests has an answer at once. If not, `call()` when that may
        have changed."""
        with self._lock:
            if self._shut or self._has_room(n):
                return True
            self._room_calls.append(call)
            return False

    def left_queue(self) -> None:
        """A request has had a slot, or ended without one."""
        with self._lock:
            self._n_waiting -= 1
            if self._max_waiting is not None:
                self._tell_room()

    # -- the thread that leads

    def lead_at_once(self) -> bool:
        """Lead, if no thread does and there are no commands, until `stop_leading`. Raises as
        `ask_or_lead`."""
        self.process.check()
        with self._lock:
            if self.closed or self.draining:
                self._check_taking()
            if self._led or self._rest or self._commands:
                return False
            self._led = threading.get_ident()
            return True

    @property
    def leads_here(self) -> bool:
        """The thread that asks does."""
        return self._led == threading.get_ident()

    def __bool__(self) -> bool:
        return bool(self._commands)

    @property
    def all_ended(self) -> bool:
        """All requests submitted have ended, and their readers know."""
        return self._n_ended == self.n_submitted

    def take(self) -> list[Command]:
        """All commands that are there, oldest first."""
        with self._lock:
            commands, self._commands = self._commands, []
            return commands

    def put_back(self, commands: list[Command]) -> None:
        """What was not done after all."""
        with self._lock:
            self._commands[:0] = commands

    def wait(self, seconds: float, n_awaited: int = 0) -> None:
        """Until there is a command, or for so many seconds. `n_awaited`: so many interactive
        sequences are worth being woken for, all at once."""
        with self._lock:
            self._n_awaited = n_awaited
            if not self._commands:
                self._news.wait(min(seconds, threading.TIMEOUT_MAX))
            self._n_awaited = 0

    def stop_leading(self, *, rest: bool) -> None:
        """Lead no longer. `rest`: there is something to compute, for the core thread then."""
        with self._lock:
            self._led, self._rest = 0, rest
            if rest or self._commands or self.closed:
                self._work.notify()
            elif self._drains:
                self._tell_drains()

    def fail(self, error: BaseException) -> list[Command]:
        """Closed, because of this. Returns the commands that are left."""
        with self._lock:
            self.closed = self._ended = True
            self.error = error
            return self.take()

    # -- the core thread

    def lead(self) -> bool:
        """Wait until there is something to do and no thread leads, then lead. False: nothing is
        done any more, or nothing can come."""
        with self._lock:
            while self._led or not (self._commands or self._rest):
                if not self._led:
                    self._tell_drains()
                    if self.closed:
                        return False
                self._work.wait()
            self._led = 0 if self._ended else threading.get_ident()
            return not self._ended

    def end(self) -> None:
        """Nothing is done any more. Returns when no `keep_alive` is left."""
        with self._lock:
            self._ended = True
            self._commands.clear()
            self._tell_drains(anyway=True)
            self._work.wait_for(lambda: self._n_users == 0)

    def why_closed(self) -> EngineClosed:
        why = f": its thread ended with {self.error!r}" if self.error else ""
        closed = EngineClosed(f"the engine is closed{why}")
        closed.__cause__ = self.error
        return closed

    # -- inside, with the lock held

    def _check_open(self) -> None:
        if self.closed:
            raise self.why_closed()

    def _check_taking(self) -> None:
        self._check_open()
        if self.draining:
            raise EngineDraining("the engine is drained: it takes no more until it is resumed")

    @property
    def _shut(self) -> bool:
        return self.closed or self.draining

    @property
    def _quiet(self) -> bool:
        idle = not (self._led or self._rest or self._commands)
        return idle and self.all_ended

    def _tell_drains(self, *, anyway: bool = False) -> None:
        if self._drains and (anyway or self._quiet):
            drains, self._drains = self._drains, []
            for future in drains:
                future.set_result(self._quiet)

    def _put(self, command: Command, *, wake: bool = True) -> None:
        if self._ended:
            return
        self._commands.append(command)
        if not self._led:
            self._work.notify()
        elif wake:
            self._news.notify()

    def _fits(self, n: int) -> bool:
        return self._max_waiting is None or self._n_waiting + n <= self._max_waiting

    def _has_room(self, n: int) -> bool:
        return not self._n_waiting or self._fits(n)

    def _tell_room(self) -> None:
        self._room.notify_all()
        calls, self._room_calls = self._room_calls, []
        for call in calls:
            call()
