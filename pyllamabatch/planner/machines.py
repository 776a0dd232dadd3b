"""Machines to plan for: this one, or one by name."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from dataclasses import dataclass

from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama import runtime
from pyllamabatch.llama.host import host_memory

GIB = 2**30
_CUDA_OVERHEAD = 550 * 2**20  # the driver's context and the kernels; seen on H200 and RTX cards


@dataclass(frozen=True, slots=True)
class Machine:
    """kind: "metal", "cuda" (any GPU with memory of its own) or "cpu". memory: bytes of the host.
    device_limit: bytes that processes may have wired or allocated on the device together.
    process_overhead: bytes on the device that a process takes before it has allocated any."""

    name: str
    kind: str
    memory: int
    device_limit: int
    process_overhead: int = 0
    source: str = ""


def _mac(name: str, gib: float, limit: float, source: str) -> Machine:
    return Machine(name, "metal", int(gib * GIB), int(limit), 0, source)


_LOG = "recommendedMaxWorkingSetSize as llama.cpp logs it, "
MACHINES = {
    m.name: m
    for m in (
        _mac("m2-max-32", 32, 21845.34 * 1e6, _LOG + "ollama issue 434"),
        _mac("m2-max-96", 96, 73728 * 2**20, _LOG + "llama.cpp issue 3213"),
        _mac("m3-max-128", 128, 96 * GIB, "three quarters of memory, until macOS 14"),
        _mac("m5-max-128", 128, 107.52 * GIB, "as measured in ds4 pull request 893, macOS 26"),
        _mac("m2-ultra-192", 192, 144 * GIB, "three quarters of memory"),
        _mac("m3-ultra-256", 256, 239e9, "max recommended size in Rapid-MLX pull request 183"),
        Machine("h200", "cuda", 128 * GIB, 139 * GIB, _CUDA_OVERHEAD, "as its driver reports"),
        Machine("rtx-4090", "cuda", 64 * GIB, 24077 * 2**20, _CUDA_OVERHEAD,
                "llama.cpp, tools/fit-params/README.md"),
    )
}  # fmt: skip


def machine(name: str) -> Machine:
    """A machine of the table, or "here"."""
    if name == "here":
        return here()
    if name not in MACHINES:
        raise ArgumentError("machine", name, f"must be here, {', '.join(MACHINES)}")
    return MACHINES[name]


def here() -> Machine:
    """This machine: memory and device limit as they are without our own processes. Several GPUs
    count together."""
    devices = [d for d in runtime.devices().values() if d.kind in ("gpu", "igpu") and d.total]
    if not devices:
        return Machine("here", "cpu", host_memory(), 0, 0, "control group and physical memory")
    total = sum(d.total for d in devices)
    if sys.platform == "darwin":
        wired = sysctl("iogpu.wired_limit_mb") * 2**20
        source = "iogpu.wired_limit_mb" if wired else "recommendedMaxWorkingSetSize"
        return Machine("here", "metal", host_memory(), wired or total, 0, source)
    return Machine("here", "cuda", host_memory(), total, _CUDA_OVERHEAD, "the driver")


def sysctl(name: str) -> int:
    """A number of macOS's sysctl; 0 where it has no such name."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    code = libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return int(value.value) if code == 0 else 0
