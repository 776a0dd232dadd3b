"""What processes take while they run, and what other processes take of the machine meanwhile.

The figures are psutil's and nvidia-ml-py's (the extra `compare`), and two that these have not:
macOS's footprint and Linux's processor energy. A figure that the system does not say has no key.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

try:
    import psutil
except ImportError:  # no figures of processes
    psutil = None

T = TypeVar("T")
Sample = dict[str, float]
"""Bytes now, or joules (`…_joules`) since some moment in the past."""

INTERVAL_S = 0.2
SHARE = 0.05  # of the time that reading may take: the kernel walks page tables for some figures
BUSY = 0.1  # of the machine's cores: what others use of them disturbs a measurement
SETTLE_S = 2.0  # others must be quiet for this long before a run starts
POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Samples processes from `start` to `stop`.

        meter = Meter([child.pid])
        ...                             # the child loads its model
        meter.start()
        ...                             # what is measured
        print(meter.stop()["pss_bytes"])

    Where the system knows only the whole device, or all wired memory, what it has more than when
    the meter was made counts as that of the processes. So make it before they allocate.
    """

    def __init__(
        self,
        pids: Iterable[int],
        *,
        interval_s: float = INTERVAL_S,
        sources: Sequence[Callable[[], Sample]] | None = None,
    ) -> None:
        self._pids = list(pids)
        self._sources = system_sources(self._pids) if sources is None else sources
        self._interval_s = interval_s
        self._samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)

    def start(self) -> None:
        """Take the first sample. Once for each meter."""
        self._others = OtherCores(self._pids)
        self._samples.append(self._sample())
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Take the last sample; the figures of all the processes together, where they are known:

        - rss_bytes, pss_bytes, shared_bytes: pages in memory, shared ones counted for each
          process; shared ones divided by their sharers; those that another process has, too
        - footprint_bytes, wired_bytes (macOS): what the system accounts to the processes, and all
          wired memory
        - device_bytes: memory of NVIDIA GPUs
        - each of these as the median of samples, and as the largest with `_peak` before `_bytes`
        - cpu_energy_joules: of all the machine's processors (Linux), of the processes (macOS)
        - gpu_energy_joules: of the NVIDIA GPUs; energy_joules: both
        - other_cpu: cores that other processes used, on average
        """
        self._over.set()
        self._thread.join()
        self._samples.append(self._sample())
        return figures(self._samples) | self._others.figure()

    def _watch(self) -> None:
        pause = self._interval_s
        while not self._over.wait(pause):
            began = time.perf_counter()
            self._samples.append(self._sample())
            pause = max(self._interval_s, (time.perf_counter() - began) / SHARE)

    def _sample(self) -> Sample:
        return {name: value for read in self._sources for name, value in read().items()}


def figures(samples: Sequence[Sample]) -> dict[str, float]:
    """Median and largest bytes, and joules: the sum of what a counter grew by from sample to
    sample. A counter that wraps around loses one interval."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample[name] for sample in samples if name in sample]
        if not name.endswith("_joules"):
            found[name] = median(values)
            found[name.replace("_bytes", "_peak_bytes")] = max(values)
        elif grown := sum(max(0.0, b - a) for a, b in pairwise(values)):
            found[name] = grown
    joules = [value for name, value in found.items() if name.endswith("_joules")]
    return found | ({"energy_joules": sum(joules)} if joules else {})


def system_sources(pids: Collection[int]) -> list[Callable[[], Sample]]:
    """What this system says of these processes."""
    sources: list[Callable[[], Sample]] = [package_joules]
    if psutil is not None:
        sources.append(lambda: process_bytes(pids))
        if sys.platform == "darwin":
            wired = psutil.virtual_memory().wired
            sources.append(lambda: mac_accounts(pids))
            sources.append(lambda: more("wired_bytes", psutil.virtual_memory().wired - wired))
    with suppress(Exception):  # no nvidia-ml-py, no driver, no GPU
        sources.append(Gpus(pids).read)
    return sources


def more(name: str, value: float) -> Sample:
    return {name: float(value)} if value > 0 else {}


def process_bytes(pids: Iterable[int]) -> Sample:
    """Of the processes that have not ended."""
    total: Counter[str] = Counter()
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            try:
                sizes = process.memory_full_info()
            except psutil.AccessDenied:  # macOS, but for root
                sizes = process.memory_info()
            total["rss_bytes"] += sizes.rss
            if hasattr(sizes, "pss"):
                total["pss_bytes"] += sizes.pss
                total["shared_bytes"] += sizes.rss - sizes.uss
    return {name: float(size) for name, size in total.items() if size}


def mac_accounts(pids: Iterable[int]) -> Sample:
    """The footprint, GPU memory included, and the energy of processor time: macOS 13's
    proc_pid_rusage, which needs no root."""
    total: Counter[str] = Counter()
    numbers = (ctypes.c_uint64 * 64)()  # struct rusage_info_v6: an uuid in two, then the numbers
    for pid in pids:
        if _libproc().proc_pid_rusage(pid, 6, ctypes.byref(numbers)) == 0:
            total["footprint_bytes"] += numbers[2 + 7]
            total["cpu_energy_joules"] += numbers[2 + 40] / 1e9  # type: ignore[assignment]
    return {name: float(value) for name, value in total.items() if value}


@cache
def _libproc() -> Any:
    return ctypes.CDLL("/usr/lib/libproc.dylib")


def package_joules(tree: Path = POWERCAP) -> Sample:
    """The counter of all processor packages, of Linux's powercap tree (RAPL). Nothing where there
    is none, or where only root may read it."""
    zones = [zone for zone in tree.glob("*-rapl:*") if zone.name.count(":") == 1]
    try:
        packages = [z for z in zones if (z / "name").read_text().startswith("package")]
        total = sum(int((zone / "energy_uj").read_text()) for zone in packages)
    except OSError:
        return {}
    return {"cpu_energy_joules": total / 1e6} if packages else {}


class Gpus:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES names by numbers, else all. ImportError and
    pynvml's errors where there is none."""

    def __init__(self, pids: Collection[int]) -> None:
        import pynvml

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        words = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        named = [int(word) for word in words if word.strip().isdigit()]
        visible = [i for i in named if i < count] if len(named) == len(words) else range(count)
        self._devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in visible]
        self._pids = pids
        self._before = self._used()

    def read(self) -> Sample:
        """device_bytes: of the processes; where the driver knows none of them (it may number them
        otherwise in a container), what the devices hold more than when this was made."""
        known = [
            process.usedGpuMemory
            for device in self._devices
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(device)
            if process.pid in self._pids and process.usedGpuMemory is not None
        ]
        found = more("device_bytes", sum(known) or self._used() - self._before)
        with suppress(self._nvml.NVMLError):  # before Volta they don't count
            energies = map(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._devices)
            found["gpu_energy_joules"] = sum(energies) / 1e3
        return found

    def _used(self) -> int:
        return sum(self._nvml.nvmlDeviceGetMemoryInfo(device).used for device in self._devices)


class OtherCores:
    """Counts from its creation on. `pids`: children of ours that run all the while."""

    def __init__(self, pids: Collection[int] = ()) -> None:
        self._pids = pids
        self._began = time.perf_counter()
        self._before = self._used()

    def figure(self) -> dict[str, float]:
        """other_cpu: of the cores that we may use, those that other processes used on
        average, a virtual machine's stolen time included. Nothing where psutil is missing."""
        if psutil is None:
            return {}
        seconds = time.perf_counter() - self._began
        return {"other_cpu": max(0.0, (self._used() - self._before) / seconds)}

    def _used(self) -> float:
        """CPU seconds of all processes but ours and our children."""
        if psutil is None:
            return 0.0
        mine = psutil.Process()
        usable = set(mine.cpu_affinity()) if hasattr(mine, "cpu_affinity") else None
        busy = sum(
            sum(core) - core.idle - getattr(core, "iowait", 0.0) - getattr(core, "guest", 0.0)
            for i, core in enumerate(psutil.cpu_times(percpu=True))
            if usable is None or i in usable
        )
        own = sum(mine.cpu_times()[:4])  # user and system, and those of children that have ended
        for pid in self._pids:
            with suppress(psutil.Error):
                own += sum(psutil.Process(pid).cpu_times()[:2])
        return float(busy - own)


def undisturbed(
    run: Callable[[], T], limit: float | None, pids: Sequence[int] = ()
) -> tuple[T, float]:
    """What `run` returns, and the cores that others used meanwhile (-1 where that is not known).

    With a `limit` the run waits until others use fewer cores, and is made again, as often as it
    takes, when they used more while it ran.
    """
    while True:
        if limit is not None:
            wait_for_quiet(limit)
        watch = OtherCores(pids)
        result = run()
        others = watch.figure().get("other_cpu", -1.0)
        if limit is None or others <= limit:
            return result, others


def wait_for_quiet(limit: float) -> None:
    """Until others use at most so many cores for `SETTLE_S`."""
    watch = OtherCores()
    time.sleep(SETTLE_S)
    while watch.figure().get("other_cpu", 0.0) > limit:
        watch = OtherCores()
        time.sleep(SETTLE_S)
