"""GpuQueue: the time of one GPU, which takes one step after the other from all that ask.

A caller reserves its step's seconds behind those of all others, and sleeps until they are over. So
nothing is passed on from one caller to the next, and a caller that dies holds nothing up: what
stays is the time at which the GPU is free again, in a file that all processes of the user share."""

import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

_STATE = struct.Struct("<qqq")  # free_ns, then both clocks when it was written
_SPIN_NS, _SPIN_SHARE = 120_000, 200  # a sleep ends so much early, and by this part of it
_CLOCKS_APART_NS = 10**9  # the clocks have moved apart by more: the file is of another boot


def sleep_until(end_ns: int) -> None:
    """Return when `time.perf_counter_ns()` is `end_ns`. A core is taken for the last tenth of a
    millisecond only."""
    while (left := end_ns - time.perf_counter_ns()) > 0:
        if left > 2 * _SPIN_NS:
            time.sleep((left - _SPIN_NS - left // _SPIN_SHARE) * 1e-9)


class GpuQueue:
    """The GPU called `name`: the same one for all threads and processes of this user, on this host.

    In the order in which they ask. Raises OSError where there is no folder for temporary files."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        """`folder`: where its file lies; default the user's own, in that for temporary files."""
        self._threads = threading.Lock()
        folder = folder or own_folder()
        self._file = os.open(folder / f"{name}.gpu", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(self._file).st_size < _STATE.size:
                os.ftruncate(self._file, _STATE.size)
            self._memory = mmap.mmap(self._file, _STATE.size)
        except BaseException:
            os.close(self._file)
            raise

    def reserve(self, seconds: float, since_ns: int) -> tuple[int, int]:
        """When a step that takes `seconds`, and is ready at `since_ns`, begins and ends: behind all
        that were reserved before. In ns of `time.perf_counter_ns`."""
        with self._exclusive():
            now, wall = time.perf_counter_ns(), time.time_ns()
            free, before, wall_before = _STATE.unpack(self._memory[:])
            if abs((now - before) - (wall - wall_before)) > _CLOCKS_APART_NS:
                free = 0
            start = max(since_ns, free)
            end = start + int(seconds * 1e9)
            self._memory[:] = _STATE.pack(end, now, wall)
        return start, end

    def close(self) -> None:
        """Closing twice is fine."""
        if self._file >= 0:
            self._memory.close()
            os.close(self._file)
            self._file = -1

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Against threads of this process (a file's lock is the process's) and against others."""
        with self._threads:
            _lock(self._file)
            try:
                yield
            finally:
                _unlock(self._file)


def own_folder() -> Path:
    """The user's, which no other user can write to."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    folder = Path(tempfile.gettempdir()) / f"pyllamabatch-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


if fcntl is not None:

    def _lock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)

    def _unlock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)

else:  # the lock of a byte behind the state

    def _lock(file: int) -> None:
        os.lseek(file, _STATE.size, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_LOCK, 1)

    def _unlock(file: int) -> None:
        os.lseek(file, _STATE.size, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
