"""How much of the processor others use during a run, and runs that nobody disturbs (Linux)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
SETTLE_S = 2.0  # others must be quiet for this long before a run starts


def _busy_s() -> float | None:
    """CPU seconds used by everybody since the machine started; None where it is not said."""
    try:
        words = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(word) for word in words)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_s(pids: Sequence[int] = ()) -> float:
    """CPU seconds of this process, of its children that have ended, and of those named that run."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + sum(_process_s(pid) for pid in pids)


def _process_s(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:  # it has ended, or this is another system
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime: proc(5)


class CpuWatch:
    """Counts from its creation on.  `pids`: children that run all the while and are no others."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._pids = pids
        self._began = (time.perf_counter(), _busy_s(), _own_s(pids))

    def others(self) -> float:
        """Cores that others kept busy on average, steal of a virtual machine included; -1 where
        the system does not say.  Exact to some hundredths in runs of a second or more."""
        began, busy_before, own_before = self._began
        busy = _busy_s()
        if busy is None or busy_before is None:
            return -1.0
        used = (busy - busy_before) - (_own_s(self._pids) - own_before)
        return max(0.0, used / (time.perf_counter() - began))


def undisturbed(
    run: Callable[[], T], limit: float | None, pids: Sequence[int] = ()
) -> tuple[T, float]:
    """What `run` returns, and the cores that others used meanwhile.

    With a `limit` the run waits until others use fewer cores, and is made again when they used
    more while it ran, as often as it takes.
    """
    while True:
        if limit is not None:
            wait_for_quiet(limit)
        watch = CpuWatch(pids)
        result = run()
        others = watch.others()
        if limit is None or others <= limit:
            return result, others


def wait_for_quiet(limit: float) -> None:
    while True:
        watch = CpuWatch()
        time.sleep(SETTLE_S)
        if watch.others() <= limit:
            return
