"""Whether this system runs out of memory, by its own account, and memory that goes back to it."""

import ctypes
import sys
from enum import IntEnum
from pathlib import Path

from pyllamabatch.llama.host import Sysctl, control_groups, lines_of, sysctl

STALLED_PERCENT = 10.0
"""Of the last ten seconds in which tasks waited for memory, on Linux."""

_MAC_LEVELS = {2: 1, 4: 2}  # kern.memorystatus_vm_pressure_level; 1 is normal


class Pressure(IntEnum):
    """WARNING: processes should give up caches. CRITICAL: the system is about to end some."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2


def memory_pressure(
    root: Path = Path("/"), system: str = sys.platform, read: Sysctl = sysctl
) -> Pressure:
    """On a Mac `kern.memorystatus_vm_pressure_level`. On Linux by the stall information of this
    process's control group, else of the whole system: WARNING where some tasks wait for memory
    for `STALLED_PERCENT` of the time, CRITICAL where all of them do. NORMAL where neither is told.

    `root`: where /proc and /sys are. `read`: macOS's `sysctl`."""
    if system == "darwin":
        return Pressure(_MAC_LEVELS.get(read("kern.memorystatus_vm_pressure_level"), 0))
    if system != "linux":
        return Pressure.NORMAL
    lines = _own_group(root) or lines_of(root / "proc/pressure/memory")
    stalled = {line.split()[0]: float(line.split()[1].removeprefix("avg10=")) for line in lines}
    if stalled.get("full", 0.0) >= STALLED_PERCENT:
        return Pressure.CRITICAL
    return Pressure(int(stalled.get("some", 0.0) >= STALLED_PERCENT))


def _own_group(root: Path) -> list[str]:
    """memory.pressure of the control group (version 2) that this process is in, or of one above."""
    files = (lines_of(folder / "memory.pressure") for folder in control_groups("memory", root))
    return next(filter(None, files), [])


def release_freed() -> None:
    """Give what the C library keeps of freed memory back to the system; nothing where it has no
    function for that."""
    if sys.platform == "win32":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_zone_pressure_relief"):  # macOS
        libc.malloc_zone_pressure_relief.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        libc.malloc_zone_pressure_relief(None, 0)
    elif hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(ctypes.c_size_t(0))
