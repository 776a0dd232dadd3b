"""Memory and energy of an arm's processes while it runs, as the system says them.

Steady is the median of samples, peak the largest. What the system does not say has no key: a figure
that is missing is not a 0.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from pyllamabatch.compare.darwin import mac_process_sizes, mac_wired
from pyllamabatch.compare.nvml import Nvml
from pyllamabatch.compare.powercap import Powercap
from pyllamabatch.llama import runtime
from pyllamabatch.planner.sharing import rollup

Source = Callable[[], dict[str, float]]
"""A sample: bytes now, or joules (`…_joules`) since some moment in the past."""

INTERVAL_S = 0.2
SHARE = 0.05  # of the time that reading may take: the kernel walks page tables for some figures
PROC = Path("/proc")


class Reader:
    """Samples the processes from `start()` to `stop()`.

    Make it before the arm loads its model: where the system knows only the whole device (or all
    wired memory), what it has more than at that moment counts as the arm's. Stop it before the arm
    frees anything. `sources`: instead of those of this system.

    `stop()` returns, of those that the system says, for all processes together:

    - rss_bytes, pss_bytes, shared_bytes: pages in memory, shared ones counted for each process;
      shared ones divided by their sharers; those of rss that another process has, too (Linux)
    - footprint_bytes, wired_bytes: what macOS accounts to the processes; all wired memory that came
      since the reader was made (on a Mac also what the GPU has wired)
    - device_bytes: memory of GPUs
    - each of these with `_peak` before `_bytes`
    - cpu_energy_joules: of all the machine's processors (Linux, where powercap may be read), or of
      these processes alone (macOS)
    - gpu_energy_joules: of the GPUs (NVML)
    - energy_joules: the sum of both, where there is one
    """

    def __init__(
        self,
        pids: Iterable[int],
        *,
        interval_s: float = INTERVAL_S,
        sources: Sequence[Source] | None = None,
    ) -> None:
        pids = list(pids)
        self._sources = system_sources(pids) if sources is None else sources
        self._interval_s = interval_s
        self._samples: list[dict[str, float]] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """The first sample is taken before this returns."""
        if self._thread is not None:
            raise RuntimeError("this reader has been started before: make a new one")
        self._samples.append(self._sample())
        self._thread = threading.Thread(target=self._watch, name="memory reader", daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Takes the last sample. The figures of the class's docstring, as far as they are known."""
        if self._thread is None:
            raise RuntimeError("this reader has not been started")
        self._over.set()
        self._thread.join()
        self._samples.append(self._sample())
        return figures(self._samples)

    def _watch(self) -> None:
        pause = self._interval_s
        while not self._over.wait(pause):
            began = time.perf_counter()
            self._samples.append(self._sample())
            took = time.perf_counter() - began
            pause = max(self._interval_s, took / SHARE)

    def _sample(self) -> dict[str, float]:
        return {name: value for read in self._sources for name, value in read().items()}


def figures(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Steady and peak bytes, and joules from the first sample to the last that has them."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample[name] for sample in samples if name in sample]
        if not name.endswith("_joules"):
            found[name] = median(values)
            found[name.replace("_bytes", "_peak_bytes")] = max(values)
        elif len(values) > 1 and values[-1] > values[0]:
            found[name] = values[-1] - values[0]
    joules = [found[name] for name in found if name.endswith("_joules")]
    return found | ({"energy_joules": sum(joules)} if joules else {})


def system_sources(pids: Sequence[int]) -> list[Source]:
    """What this system has to say of these processes."""
    sources: list[Source] = []
    if sys.platform == "darwin":
        sources += [lambda: mac_process_sizes(pids), _growth("wired_bytes", mac_wired)]
    else:
        sources.append(lambda: process_sizes(pids))
    packages = Powercap()
    if packages.read():
        sources.append(packages.read)
    if (nvml := Nvml.open()) is not None:
        sources.append(lambda: nvml.read(pids))
    elif list(pids) == [os.getpid()] and any(_gpus()):
        # It speaks for this process, or for the whole device: never for a child of ours alone.
        sources.append(_growth("device_bytes", lambda: -float(sum(d.free for d in _gpus()))))
    return sources


def process_sizes(pids: Iterable[int], proc: Path = PROC) -> dict[str, float]:
    """rss, pss and shared of the processes that are there; rss alone where the kernel has no
    smaps_rollup. Nothing of somebody else's process, and none when all have ended."""
    total: dict[str, float] = {}
    for pid in pids:
        try:
            sizes: dict[str, int] = rollup(pid, proc)
        except OSError:
            sizes = _rss(pid, proc)
        for name, size in sizes.items():
            total[f"{name}_bytes"] = total.get(f"{name}_bytes", 0.0) + size
    return total


def _rss(pid: int, proc: Path) -> dict[str, int]:
    try:
        pages = int((proc / str(pid) / "statm").read_text().split()[1])
    except (OSError, IndexError):
        return {}
    return {"rss": pages * os.sysconf("SC_PAGE_SIZE")} if pages else {}


def _gpus() -> list[runtime.Device]:
    return [d for d in runtime.devices().values() if d.kind in ("gpu", "igpu") and d.total]


def _growth(name: str, read: Callable[[], float | None]) -> Source:
    """How much more it is than now; no figure while it is not more."""
    before = read()

    def sample() -> dict[str, float]:
        value = read()
        if value is None or before is None or value <= before:
            return {}
        return {name: value - before}

    return sample
