"""What this host gives to a process: cores, memory, files. Pure Python, without libllama."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path, PurePosixPath

from pyllamabatch.errors import ArgumentError, ModelLoadError

MAX_THREADS = 512  # GGML_MAX_N_THREADS

PathLike = str | os.PathLike[str]


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, and its control groups' quota rounded up.

    `root`: where /proc and /sys are.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "cpu", "cpu,cpuacct"):  # version 2, or 1
            mount = root / "sys/fs/cgroup" / controllers
            path = PurePosixPath(group.lstrip("/"))
            cores = min([cores, *(_cpu_quota(mount / part) for part in (path, *path.parents))])
    return max(1, min(cores, MAX_THREADS))


def _cpu_quota(folder: Path) -> int:
    """What one control group allows, in cores."""
    lines = _lines(folder / "cpu.max") or [
        *_lines(folder / "cpu.cfs_quota_us"),
        *_lines(folder / "cpu.cfs_period_us"),
    ]
    quota, period = [*" ".join(lines).split(), "max", "max"][:2]
    return -(-int(quota) // int(period)) if quota.isdigit() else MAX_THREADS


def host_memory() -> int:
    """Bytes of physical memory, or what the control group allows of it."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = [int(line) for line in _lines("/sys/fs/cgroup/memory.max") if line.strip().isdigit()]
    return min([physical, *allowed])


def host_available() -> int:
    """Bytes that could be allocated now, at most `host_memory`."""
    free = [
        1024 * int(line.split()[1])
        for line in _lines("/proc/meminfo")
        if line.startswith("MemAvailable:")
    ]
    return min([host_memory(), *free])


def _lines(path: PathLike) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def gguf_file(path: PathLike) -> bytes:
    """The path as llama.cpp takes it, after the checks whose failures it reports badly.

    Raises `ArgumentError` for what is no file name, `ModelLoadError` for no GGUF file.
    """
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


def write_whole(path: PathLike, data: bytes) -> None:
    """Write a file whole or not at all: a reader never sees a part of it. Raises OSError."""
    target = Path(path)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
