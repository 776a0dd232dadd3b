"""MemoryWatch: an engine gives up host memory while the system runs short of it.

Mapped weights are the system's to drop. What grows are the states of swapped sequences: they go to
files. Most of the rest are cells, which an engine without requests can do without."""

import logging
import threading
from collections.abc import Callable

from ..kv import SwapSpace
from ..llama.pressure import Pressure, memory_pressure, release_freed

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0


class MemoryWatch:
    """While there is pressure, saved states lie in files, and freed memory goes back to the system.
    While it is critical, `shrink` is called between two steps, again and again.

    post: has a command done between two steps. read: the pressure now."""

    def __init__(
        self,
        space: SwapSpace,
        post: Callable[[Callable[[], None]], None],
        shrink: Callable[[], None],
        *,
        read: Callable[[], Pressure] = memory_pressure,
        seconds: float = LOOK_SECONDS,
    ) -> None:
        self.pressure = Pressure.NORMAL
        self._space = space
        self._n_bytes = space.n_bytes  # without pressure
        self._post = post
        self._shrink = shrink
        self._read = read
        self._seconds = seconds

    def start(self, core: threading.Thread) -> threading.Thread:
        """Look until the core's thread has ended, in a thread of its own, which is returned."""

        def watch() -> None:
            while core.is_alive():
                self.look()
                core.join(self._seconds)

        thread = threading.Thread(target=watch, name="pyllamabatch-memory", daemon=True)
        thread.start()
        return thread

    def look(self) -> None:
        """Once: a change is answered behind the step that goes on."""
        pressure = self._read()
        if pressure is not self.pressure:
            self.pressure = pressure
            self._post(lambda: self._answer(pressure))
        elif pressure is Pressure.CRITICAL:  # requests may have ended
            self._post(self._shrink)

    def _answer(self, pressure: Pressure) -> None:
        log.warning("memory pressure: %s", pressure.name.lower())
        try:
            self._space.resize(0 if pressure else self._n_bytes)
        except OSError as problem:
            log.warning("saved states stay in memory: %s", problem)
        if pressure is Pressure.CRITICAL:
            self._shrink()
        if pressure:
            release_freed()
