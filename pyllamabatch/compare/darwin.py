"""What macOS says of one's own processes without root: libproc's `proc_pid_rusage`, and vm_stat."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterable
from functools import cache

V4, V6 = 4, 6  # RUSAGE_INFO_V4, RUSAGE_INFO_V6 (macOS 13) of <sys/resource.h>
_UUID = 16  # bytes before the numbers, which are all uint64
_N_NUMBERS = 64  # more than version 6 has (56)
_RESIDENT, _FOOTPRINT, _ENERGY_NJ = 6, 7, 40  # ri_resident_size, ri_phys_footprint, ri_energy_nj

Numbers = Callable[[int, int], "list[int] | None"]
"""From a process and a version of the structure to its numbers; None when it is refused."""


def mac_process_sizes(pids: Iterable[int], numbers: Numbers | None = None) -> dict[str, float]:
    """rss and footprint bytes of the processes that are there, and joules of their processor time
    since they began, where this macOS counts them."""
    numbers = numbers or proc_pid_rusage
    total: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        total[name] = total.get(name, 0.0) + value

    for pid in pids:
        energy = True
        found = numbers(pid, V6)
        if found is None:
            found, energy = numbers(pid, V4), False
        if found is None:
            continue
        add("rss_bytes", found[_RESIDENT])
        add("footprint_bytes", found[_FOOTPRINT])
        if energy and found[_ENERGY_NJ]:
            add("cpu_energy_joules", found[_ENERGY_NJ] / 1e9)
    return total


def proc_pid_rusage(pid: int, version: int) -> list[int] | None:
    buffer = (ctypes.c_uint64 * (_UUID // 8 + _N_NUMBERS))()
    code = _libproc().proc_pid_rusage(pid, version, ctypes.byref(buffer))
    return list(buffer[_UUID // 8 :]) if code == 0 else None


@cache
def _libproc() -> ctypes.CDLL:
    return ctypes.CDLL("/usr/lib/libproc.dylib")


def mac_wired() -> float | None:
    """Wired bytes of the whole system; None when vm_stat does not say."""
    try:
        done = subprocess.run(["vm_stat"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return wired_of(done.stdout)


def wired_of(text: str) -> float | None:
    """From what vm_stat prints."""
    page = re.search(r"page size of (\d+) bytes", text)
    wired = re.search(r"Pages wired down:\s+(\d+)", text)
    return float(page[1]) * float(wired[1]) if page and wired else None
