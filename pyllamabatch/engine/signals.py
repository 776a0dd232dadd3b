"""DeferredSignals: signal handlers wait until the main thread has left a piece of work.

Python runs them in the main thread, between any two instructions, and most of them raise (Ctrl-C).
"""

# `signal` itself looks for an enum member at each call, and takes twenty times as long.
import _signal as fast  # type: ignore[import-not-found,unused-ignore]
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

_NUMBERS = tuple(signal.valid_signals())

Noted = Sequence[tuple[int, FrameType | None]]


class DeferredSignals:
    """`with signals as noted`: in the main thread a signal that comes inside the block is noted,
    and `notify()` is called: the block had better end soon. Its handler runs when the block is
    left, and may raise there. In any other thread, which runs no handlers, nothing is done. Blocks
    of the main thread are not inside one another."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._main = threading.main_thread().ident
        # The main thread's.
        self._seen: list[Any] = []  # handlers of `_NUMBERS`, last time
        self._python: list[tuple[int, Any]] = []  # those of them that are Python's
        self._deferred: list[tuple[int, Any]] = []
        self._noted: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> Noted:
        if threading.get_ident() != self._main:
            return ()
        handlers = [*map(fast.getsignal, _NUMBERS)]
        if handlers != self._seen:
            pairs = zip(_NUMBERS, handlers, strict=True)
            self._python = [(number, handler) for number, handler in pairs if callable(handler)]
            self._seen = handlers
        try:
            for pair in self._python:
                self._deferred.append(pair)
                fast.signal(pair[0], self._note)
        except BaseException:  # of a handler that was not deferred yet
            self._restore()
            raise
        return self._noted

    def __exit__(self, *error: object) -> None:
        if self._deferred and threading.get_ident() == self._main:
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append((number, frame))
        self._notify()

    def _restore(self) -> None:
        """However often handlers raise that are there again."""
        try:
            while self._deferred:
                fast.signal(*self._deferred[-1])
                self._deferred.pop()
            while self._noted:
                number, frame = self._noted.pop(0)
                dict(self._python)[number](number, frame)
        except BaseException:
            if self._deferred:
                self._restore()
            raise
