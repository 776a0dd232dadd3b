"""What processes take while they run, and what other processes take of the machine meanwhile.

The figures are psutil's and nvidia-ml-py's (the extra `compare`), and macOS's footprint and energy,
which these have not. A figure that the system does not say has no key; what others use is then
`UNKNOWN`, as it must be seen that no one has looked."""

import ctypes
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from statistics import median
from typing import Any

from pyllamabatch.llama.host import usable_cores

try:
    import psutil
except ImportError:  # no figures of processes
    psutil = None

Sample = dict[str, float]
"""Bytes now, or joules (`…_joules`) since some moment in the past."""
Source = Callable[[], Sample]

INTERVAL_S = 0.2
SHARE = 0.05  # of the time that reading may take: the kernel walks page tables for some figures
UNKNOWN = -1.0  # cores that others use, without psutil
BUSY = 0.1  # of the machine's cores: what others use of them disturbs a measurement
TICK_S = 0.01  # systems count CPU time in such steps


class Meter:
    """Samples processes from `start` to `stop`.

        meter = Meter([child.pid])
        ...                             # the child loads its model
        meter.start()
        ...                             # what is measured
        print(meter.stop()["pss_bytes"])

    Where the system knows only the whole device, what it has more than when the meter was made
    counts as that of the processes. So make it before they allocate."""

    def __init__(self, pids: Iterable[int], sources: Sequence[Source] | None = None) -> None:
        self._pids = list(pids)
        self._sources = system_sources(self._pids) if sources is None else sources
        self._samples: list[Sample] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)

    def now_of(self, pids: Iterable[int]) -> None:
        """The processes have become these."""
        self._pids[:] = pids

    def start(self) -> None:
        """Take the first sample. Once for each meter."""
        self._others = OtherCores(self._pids)
        self._samples.append(self._sample())
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Take the last sample; the figures of all the processes together, where they are known:

        - rss_bytes, pss_bytes: pages in memory, shared ones counted for each process; shared ones
          divided by their sharers
        - footprint_bytes: what macOS accounts to the processes, GPU memory included
        - device_bytes: memory of NVIDIA GPUs
        - cpu_energy_joules: of the processes (macOS); gpu_energy_joules: of the NVIDIA GPUs;
          energy_joules: both
        - other_cpu: cores that other processes used, on average; `UNKNOWN` without psutil

        Bytes are the median of the samples."""
        self._over.set()
        self._thread.join()
        self._samples.append(self._sample())
        return figures(self._samples) | {"other_cpu": self._others.used()}

    def _watch(self) -> None:
        pause = INTERVAL_S
        while not self._over.wait(pause):
            began = time.perf_counter()
            self._samples.append(self._sample())
            pause = max(INTERVAL_S, (time.perf_counter() - began) / SHARE)

    def _sample(self) -> Sample:
        return {name: value for read in self._sources for name, value in read().items()}


def figures(samples: Sequence[Sample]) -> dict[str, float]:
    """Median bytes, and joules: the sum of what a counter grew by from sample to sample. A counter
    that wraps around loses one interval."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample[name] for sample in samples if name in sample]
        if not name.endswith("_joules"):
            found[name] = median(values)
        elif grown := sum(max(0.0, b - a) for a, b in pairwise(values)):
            found[name] = grown
    joules = [value for name, value in found.items() if name.endswith("_joules")]
    return found | ({"energy_joules": sum(joules)} if joules else {})


def system_sources(pids: Collection[int]) -> list[Source]:
    """What this system says of these processes."""
    sources: list[Source] = []
    if psutil is not None:
        sources.append(lambda: process_bytes(pids))
    if sys.platform == "darwin":
        sources.append(lambda: mac_accounts(pids))
    with suppress(Exception):  # no nvidia-ml-py, no driver, no GPU
        sources.append(Gpus(pids).read)
    return sources


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
            total["pss_bytes"] += getattr(sizes, "pss", 0)
    return {name: float(size) for name, size in total.items() if size}


def mac_accounts(pids: Iterable[int]) -> Sample:
    """The footprint, GPU memory included, and the energy of processor time: macOS 13's
    proc_pid_rusage, which needs no root."""
    libproc = ctypes.CDLL("/usr/lib/libproc.dylib")
    numbers = (ctypes.c_uint64 * 64)()  # struct rusage_info_v6: an uuid in two, then the numbers
    footprint, nanojoules = 0, 0
    for pid in pids:
        if libproc.proc_pid_rusage(pid, 6, ctypes.byref(numbers)) == 0:
            footprint += numbers[2 + 7]
            nanojoules += numbers[2 + 40]
    found = {"footprint_bytes": float(footprint), "cpu_energy_joules": nanojoules / 1e9}
    return {name: value for name, value in found.items() if value}


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
        known: list[int] = []
        with suppress(self._nvml.NVMLError):  # WSL 2 knows no processes
            known = [
                process.usedGpuMemory
                for device in self._devices
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(device)
                if process.pid in self._pids and process.usedGpuMemory is not None
            ]
        used = sum(known) or self._used() - self._before
        found = {"device_bytes": float(used)} if used > 0 else {}
        with suppress(self._nvml.NVMLError):  # before Volta they don't count
            energies = map(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._devices)
            found["gpu_energy_joules"] = sum(energies) / 1e3
        return found

    def _used(self) -> int:
        with suppress(self._nvml.NVMLError):  # a GB10 has no memory of its own
            return sum(self._nvml.nvmlDeviceGetMemoryInfo(device).used for device in self._devices)
        return 0


def descendants(pid: int | None = None) -> list[int]:
    """Ids of the processes that a process (this one) has started, and that those have; [] without
    psutil."""
    if psutil is None:
        return []
    return [one.pid for one in psutil.Process(pid).children(recursive=True)]


def others_are_known() -> bool:
    """Whether `OtherCores` knows what others use."""
    return psutil is not None


class OtherCores:
    """Counts from its creation on. `pids`: children of ours that run all the while."""

    def __init__(self, pids: Collection[int] = ()) -> None:
        self._pids = pids
        self._before = self._now()

    def used(self, doubt: float = 0.0) -> float:
        """Of the cores that we may use, those that other processes used on average, a virtual
        machine's stolen time included; `UNKNOWN` without psutil. doubt: CPU seconds that
        are not counted, as the system's numbers are that coarse."""
        if psutil is None:
            return UNKNOWN
        others, seconds = (b - a for a, b in zip(self._before, self._now(), strict=True))
        used = (others - doubt) / max(seconds, TICK_S)
        return float(min(max(0.0, used), usable_cores()))  # in a short time a tick may be more

    def _now(self) -> tuple[float, float]:
        """CPU time of all processes but ours and our children, and the clock's."""
        if psutil is None:
            return 0.0, 0.0
        mine = psutil.Process()
        usable = set(mine.cpu_affinity()) if hasattr(mine, "cpu_affinity") else None
        busy = sum(
            sum(core) - core.idle - getattr(core, "iowait", 0.0) - getattr(core, "guest", 0.0)
            for i, core in enumerate(psutil.cpu_times(percpu=True))
            if usable is None or i in usable
        )
        own = time.process_time() + sum(os.times()[2:4])  # and of children that have ended
        for pid in self._pids:
            with suppress(psutil.Error):
                own += sum(psutil.Process(pid).cpu_times()[:2])
        return busy - own, time.monotonic()
