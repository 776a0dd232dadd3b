"""llama.cpp's log, from the ring in native/log.cpp to Python's `logging`.

The logger is "pyllamabatch.llama": silent until the application gives it (or a parent) a handler.
Lines arrive when one of our calls drains the ring, on the thread that made the call.
"""

from __future__ import annotations

import logging
import threading

from pyllamabatch.raw import ffi, lib

logger = logging.getLogger("pyllamabatch.llama")
logging.getLogger("pyllamabatch").addHandler(logging.NullHandler())

_SIZE = 1 << 16
_LEVELS = {
    1: logging.DEBUG,
    2: logging.INFO,
    3: logging.WARNING,
    4: logging.ERROR,
}


class _Drain:
    """Puts fragments together into lines; one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffer = ffi.new("char[]", _SIZE)
        self._level = ffi.new("int32_t *")
        self._dropped = ffi.new("int64_t *")
        self._partial = ""
        self._kept = 0  # the level below which the ring keeps nothing

    def __call__(self) -> None:
        if not self._lock.acquire(blocking=False):
            return  # whoever drains now takes our lines too
        try:
            level = _native_level()
            if level != self._kept:
                lib.plb_log_set_level(level)
                self._kept = level
            while True:
                size = lib.plb_log_drain(self._buffer, _SIZE, self._level, self._dropped)
                if self._dropped[0]:
                    logger.warning("%d fragments of llama.cpp's log were lost", self._dropped[0])
                if size <= 0:
                    return
                text = ffi.buffer(self._buffer, size)[:].decode("utf-8", "replace")
                self._emit(_LEVELS.get(self._level[0], logging.INFO), self._partial + text)
        finally:
            self._lock.release()

    def _emit(self, level: int, text: str) -> None:
        *lines, self._partial = text.split("\n")
        for line in lines:
            if line.strip(" ."):  # the dots are llama.cpp's progress bar
                logger.log(level, "%s", line)


def _native_level() -> int:
    for native, level in _LEVELS.items():
        if logger.isEnabledFor(level):
            return native
    return 4


drain = _Drain()
"""Hand what llama.cpp has logged so far to `logging`."""


def mark() -> None:
    """Forget this thread's errors: `errors()` gives those from here on."""
    lib.plb_log_mark()


def errors() -> str:
    """The warnings and errors that this thread's calls have logged since `mark()`; drains too."""
    buffer = ffi.new("char[]", 4096)
    size = lib.plb_log_errors(buffer, 4096)
    drain()
    return ffi.buffer(buffer, size)[:].decode("utf-8", "replace").strip() if size > 0 else ""
