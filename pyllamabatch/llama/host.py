"""What this host gives to a process: cores, memory, files. Pure Python, without libllama."""

import ctypes
import ctypes.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pyllamabatch.errors import ArgumentError, ModelLoadError

MAX_THREADS = 512  # GGML_MAX_N_THREADS

PathLike = str | os.PathLike[str]


Sysctl = Callable[[str], int]


def sysctl(name: str) -> int:
    """A number of macOS's sysctl; 0 where it has no such name."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    code = libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return int(value.value) if code == 0 else 0


def usable_cores(root: Path = Path("/"), system: str = sys.platform, read: Sysctl = sysctl) -> int:
    """Cores that this process may use: its affinity, and its control groups' quota rounded up. On a
    Mac the performance cores: at every barrier they would wait for the slower ones.

    `root`: where /proc and /sys are. `read`: macOS's `sysctl`."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if system == "darwin":
        cores = read("hw.perflevel0.logicalcpu") or cores
    cores = min([cores, *(_cpu_quota(folder) for folder in control_groups("cpu", root))])
    return max(1, min(cores, MAX_THREADS))


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of Linux's control groups that this process is in and that have the controller, its
    own group before those above it."""
    for line in lines_of(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):  # version 2, or 1
            path = PurePosixPath(group.lstrip("/"))
            for part in (path, *path.parents):
                yield root / "sys/fs/cgroup" / controllers / part


def _cpu_quota(folder: Path) -> int:
    """What one control group allows, in cores."""
    lines = lines_of(folder / "cpu.max") or [
        *lines_of(folder / "cpu.cfs_quota_us"),
        *lines_of(folder / "cpu.cfs_period_us"),
    ]
    quota, period = [*" ".join(lines).split(), "max", "max"][:2]
    return -(-int(quota) // int(period)) if quota.isdigit() else MAX_THREADS


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of physical memory, or what the control groups allow of it."""
    if sys.platform == "win32":
        return _windows_memory()[0]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(most for most, _ in _memory_limits(root))])


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Of each control group: bytes that it may use, and those of them that it could still have. The
    pages of files that it has read are given back when memory is wanted."""
    for folder in control_groups("memory", root):
        most = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        stat = dict(line.split() for line in lines_of(folder / "memory.stat"))
        files = sum(
            int(stat.get(f"total_{name}", stat.get(name, 0)))  # version 1: with groups below
            for name in ("active_file", "inactive_file")
        )
        if most:
            yield most, max(0, most - max(0, used - files))


def _number(path: Path) -> int:
    """In a file; 0 where there is none, or a word."""
    text = "".join(lines_of(path)).strip()
    return int(text) if text.isdigit() else 0


def host_available(
    system: str = sys.platform, read: Sysctl = sysctl, root: Path = Path("/")
) -> int:
    """Bytes that could be allocated now, at most `host_memory`.

    `read`: macOS's `sysctl`, whose kern.memorystatus_level is the percentage that is free or can be
    made free (what the command memory_pressure prints)."""
    if system == "darwin":
        level = read("kern.memorystatus_level")
        return host_memory() * level // 100 if level else host_memory()
    if sys.platform == "win32":
        return _windows_memory()[1]
    free = [
        1024 * int(line.split()[1])
        for line in lines_of(root / "proc/meminfo")
        if line.startswith("MemAvailable:")
    ]
    return min([host_memory(root), *free, *(left for _, left in _memory_limits(root))])


def _windows_memory() -> tuple[int, int]:
    """Bytes of physical memory, and of what is free of it."""

    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("physical", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            *((f"other{i}", ctypes.c_uint64) for i in range(5)),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    windll: Any = getattr(ctypes, "windll")  # noqa: B009 (on Windows only)
    if not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return int(status.physical), int(status.available)


def lines_of(path: PathLike) -> list[str]:
    """Of a file of text; none of one that can't be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def gguf_file(path: PathLike) -> bytes:
    """The path as llama.cpp takes it, after the checks whose failures it reports badly.

    Raises `ArgumentError` for what is no file name, `ModelLoadError` for no GGUF file."""
    name = os.fspath(path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ArgumentError("path", path, "must be the name of a file")
    try:
        with open(name, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelLoadError(name, error.strerror or str(error)) from None
    if magic != b"GGUF":
        raise ModelLoadError(name, f"not a GGUF file: it begins with {magic!r}")
    return os.fsencode(name)


@contextmanager
def whole_file(path: PathLike) -> Iterator[Path]:
    """Where to write a file that is at `path` when the block ends, and not when it raises: a reader
    never sees a part of it. Raises OSError."""
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".part-") as folder:
        part = Path(folder) / target.name
        yield part
        os.replace(part, target)
