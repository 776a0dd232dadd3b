"""Machines to plan for: this one, or one by name."""

import sys
from dataclasses import dataclass

from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama import runtime
from pyllamabatch.llama.host import host_memory, sysctl

GIB = 2**30
_CUDA_OVERHEAD = 550 * 2**20  # the driver's context and the kernels, of H200 and RTX cards


@dataclass(frozen=True, slots=True)
class Machine:
    """kind: "metal", "cuda" (any GPU with memory of its own) or "cpu". memory: bytes of the host.
    device_limit: bytes that all processes together may wire or allocate on the device.
    process_overhead: bytes on the device that a process takes before it allocates any."""

    name: str
    kind: str
    memory: int
    device_limit: int
    process_overhead: int = 0
    source: str = ""


_CHIPS = {
    "m1": (8, 16), "m1-pro": (16, 32), "m1-max": (32, 64), "m1-ultra": (64, 128),
    "m2": (8, 16, 24), "m2-pro": (16, 32), "m2-max": (32, 64, 96), "m2-ultra": (64, 128, 192),
    "m3": (8, 16, 24), "m3-pro": (18, 36), "m3-max": (36, 48, 64, 96, 128),
    "m3-ultra": (96, 256, 512),
    "m4": (16, 24, 32), "m4-pro": (24, 48, 64), "m4-max": (36, 48, 64, 128),
    "m5": (16, 24, 32), "m5-pro": (24, 48, 64), "m5-max": (36, 48, 64, 128),
    "m5-ultra": (512,),
}  # fmt: skip
"""GiB of memory that Macs are sold with, by chip (Apple's technical specifications; of the M5 Ultra
the most)."""

_LIMITS = {
    "m5-max-128": (107.52 * GIB, "as measured in ds4 pull request 893, macOS 26"),
    "m3-ultra-256": (239e9, "max recommended size in Rapid-MLX pull request 183"),
}
"""Wired limits that differ from the rule of `_mac`."""


def _mac(chip: str, gib: int) -> Machine:
    """Without a measured limit, two thirds of memory up to 32 GiB and three quarters beyond: what
    macOS 13 and 14 set. Later versions allow more. llama.cpp logs recommendedMaxWorkingSetSize
    10922.67 MiB of 16 GiB (llama-cpp-python issue 687), 21845.34 of 32 (ollama issue 434), 49152 of
    64 (llama.cpp issue 1870), 73728 of 96 (llama.cpp issue 3213)."""
    name = f"{chip}-{gib}"
    share, words = (2 / 3, "two thirds") if gib <= 32 else (3 / 4, "three quarters")
    rule = share * gib * GIB, f"{words} of memory, until macOS 14"
    limit, source = _LIMITS.get(name, rule)
    return Machine(name, "metal", gib * GIB, int(limit), 0, source)


MACHINES = {
    m.name: m
    for m in (
        *(_mac(chip, gib) for chip, sizes in _CHIPS.items() for gib in sizes),
        Machine("h200", "cuda", 128 * GIB, 139 * GIB, _CUDA_OVERHEAD, "as its driver reports"),
        Machine("rtx-4090", "cuda", 64 * GIB, 24077 * 2**20, _CUDA_OVERHEAD,
                "llama.cpp, tools/fit-params/README.md"),
    )
}  # fmt: skip

NAMES = (
    "here, h200, rtx-4090, or a Mac by its chip and GiB (m1-16, m3-ultra-256, "
    f"m4-pro-48, ...; {', '.join(_CHIPS)})"
)


def machine(name: str) -> Machine:
    """A machine of `MACHINES`, or "here". Raises ArgumentError."""
    if name == "here":
        return here()
    if name not in MACHINES:
        raise ArgumentError("machine", name, f"must be {NAMES}")
    return MACHINES[name]


def here() -> Machine:
    """This machine: memory and device limit without our own processes. Several GPUs are added up,
    each with what a process takes of it."""
    devices = [d for d in runtime.default_devices() if d.total]
    if not devices:
        return Machine("here", "cpu", host_memory(), 0, 0, "control group and physical memory")
    total = sum(d.total for d in devices)
    if sys.platform == "darwin":
        wired = sysctl("iogpu.wired_limit_mb") * 2**20
        source = "iogpu.wired_limit_mb" if wired else "recommendedMaxWorkingSetSize"
        return Machine("here", "metal", host_memory(), wired or total, 0, source)
    overhead = len(devices) * _CUDA_OVERHEAD
    return Machine("here", "cuda", host_memory(), total, overhead, "the driver")
