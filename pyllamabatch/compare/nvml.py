"""Memory and energy of NVIDIA GPUs from the driver's own library (NVML), without a CUDA context."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from typing import Any

_UNKNOWN = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
_TOO_SMALL = 7  # NVML_ERROR_INSUFFICIENT_SIZE


class _Memory(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves (all where it has no plain numbers). `library`:
    libnvidia-ml, or what behaves like it."""

    def __init__(self, library: Any) -> None:
        self._library = library
        if library.nvmlInit_v2() != 0:
            raise OSError("NVML does not start")
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        self._devices = []
        for i in _visible(count.value):
            device = ctypes.c_void_p()
            if library.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device)) == 0:
                self._devices.append(device)
        self._before = self._used()

    @classmethod
    def open(cls) -> Nvml | None:
        """None where there is no NVIDIA driver, or no GPU."""
        try:
            found = cls(ctypes.CDLL("libnvidia-ml.so.1"))
        except OSError:
            return None
        return found if found._devices else None

    def read(self, pids: Collection[int]) -> dict[str, float]:
        """device_bytes: what the driver says of these processes; where it knows none of them (in a
        container it may number them otherwise), what the devices hold more than when this was made.
        gpu_energy_joules: of the devices, since the driver was loaded."""
        used = self._used_by(pids) or self._used() - self._before
        found = {"device_bytes": float(used)} if used > 0 else {}
        joules = self._joules()
        return found if joules is None else found | {"gpu_energy_joules": joules}

    def _used(self) -> int:
        memory, total = _Memory(), 0
        for device in self._devices:
            if self._library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0:
                total += memory.used
        return total

    def _used_by(self, pids: Collection[int]) -> int:
        total = 0
        for device in self._devices:
            for process in self._processes(device):
                if process.pid in pids and process.used != _UNKNOWN:
                    total += process.used
        return total

    def _processes(self, device: ctypes.c_void_p) -> list[_Process]:
        room = 64
        while True:
            count, infos = ctypes.c_uint(room), (_Process * room)()
            code = self._library.nvmlDeviceGetComputeRunningProcesses_v3(
                device, ctypes.byref(count), infos
            )
            if code != _TOO_SMALL or room > 2**16:
                return list(infos[: count.value]) if code == 0 else []
            room *= 4

    def _joules(self) -> float | None:
        """NVML counts millijoules; None when a device does not (before Volta)."""
        total, energy = 0, ctypes.c_ulonglong()
        for device in self._devices:
            call = self._library.nvmlDeviceGetTotalEnergyConsumption
            if call(device, ctypes.byref(energy)) != 0:
                return None
            total += energy.value
        return total / 1000


def _visible(count: int) -> list[int]:
    words = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(word.strip().isdigit() for word in words):
        return [int(word) for word in words if int(word) < count]
    return list(range(count))
