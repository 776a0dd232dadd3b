"""What a reader says of processes: recorded trees, fake libraries, and a real child."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.compare import memory
from pyllamabatch.compare.darwin import mac_process_sizes, wired_of
from pyllamabatch.compare.memory import Reader, figures, process_sizes
from pyllamabatch.compare.nvml import Nvml
from pyllamabatch.compare.powercap import Powercap

MIB = 2**20
ROLLUP = """\
55e1e388b000-7fff7d368000 ---p 00000000 00:00 0                          [rollup]
Rss:                {rss} kB
Pss:                {pss} kB
Pss_Dirty:           112 kB
Shared_Clean:       {clean} kB
Shared_Dirty:          4 kB
Private_Clean:        40 kB
"""


def tree(folder: Path, pid: int, **sizes: int) -> None:
    (folder / str(pid)).mkdir(parents=True, exist_ok=True)
    (folder / str(pid) / "smaps_rollup").write_text(ROLLUP.format(**sizes))


def test_a_recorded_tree_is_summed_over_processes(tmp_path: Path) -> None:
    tree(tmp_path, 7, rss=3000, pss=2000, clean=1500)
    tree(tmp_path, 8, rss=1000, pss=600, clean=500)
    assert process_sizes([7, 8], tmp_path) == {
        "rss_bytes": 1024 * 4000,
        "pss_bytes": 1024 * 2600,
        "shared_bytes": 1024 * 2008,
    }
    assert process_sizes([8, 9], tmp_path)["rss_bytes"] == 1024 * 1000  # 9 has ended
    assert process_sizes([9], tmp_path) == {}


def test_without_a_rollup_there_is_rss_alone(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "statm").write_text("90000 300 20 1 0 80 0\n")
    page = os.sysconf("SC_PAGE_SIZE")
    assert process_sizes([7], tmp_path) == {"rss_bytes": 300 * page}
    (tmp_path / "7" / "statm").write_text("0 0 0 0 0 0 0\n")  # a zombie
    assert process_sizes([7], tmp_path) == {}


def test_steady_is_the_median_and_joules_are_a_difference() -> None:
    samples: list[dict[str, float]] = [
        {"rss_bytes": 10.0, "cpu_energy_joules": 5.0},
        {"rss_bytes": 30.0},
        {"rss_bytes": 12.0, "cpu_energy_joules": 9.0, "gpu_energy_joules": 100.0},
        {"gpu_energy_joules": 130.0},
    ]
    assert figures(samples) == {
        "rss_bytes": 12.0,
        "rss_peak_bytes": 30.0,
        "cpu_energy_joules": 4.0,
        "gpu_energy_joules": 30.0,
        "energy_joules": 34.0,
    }


def test_what_is_not_known_has_no_key() -> None:
    assert figures([{}, {}]) == {}
    assert figures([{"cpu_energy_joules": 5.0}, {"cpu_energy_joules": 5.0}]) == {}
    reader = Reader([1], sources=[dict])
    reader.start()
    assert reader.stop() == {}


def test_a_reader_samples_all_the_while_and_runs_once() -> None:
    values = itertools.count(1)
    reader = Reader([1], interval_s=0.001, sources=[lambda: {"rss_bytes": float(next(values))}])
    with pytest.raises(RuntimeError, match="not been started"):
        reader.stop()
    reader.start()
    while next(values) < 50:
        time.sleep(0.001)
    found = reader.stop()
    assert found["rss_peak_bytes"] > found["rss_bytes"] > 1
    with pytest.raises(RuntimeError, match="make a new one"):
        reader.start()


def test_packages_are_summed_and_wrap_around(tmp_path: Path) -> None:
    def zone(name: str, label: str, energy: int) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "name").write_text(label + "\n")
        (tmp_path / name / "energy_uj").write_text(f"{energy}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")

    zone("intel-rapl:0", "package-0", 9_000_000)
    zone("intel-rapl:1", "package-1", 1_000_000)
    zone("intel-rapl:0:0", "core", 5_000_000)
    zone("intel-rapl:2", "psys", 5_000_000)
    packages = Powercap(tmp_path)
    zone("intel-rapl:0", "package-0", 1_000_000)  # + 2 J, over the end of its range
    zone("intel-rapl:1", "package-1", 1_500_000)
    assert packages.read() == {"cpu_energy_joules": 2.5}
    zone("intel-rapl:1", "package-1", 2_000_000)
    assert packages.read() == {"cpu_energy_joules": 3.0}
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert packages.read() == {}
    zone("intel-rapl:1", "package-1", 2_500_000)
    assert packages.read() == {}  # what passed meanwhile is not known
    assert Powercap(tmp_path / "absent").read() == {}


class FakeNvml:
    """Two GPUs; `used` and `processes` of each, `energy` in mJ."""

    def __init__(self) -> None:
        self.used = [1000 * MIB, 0]
        self.processes: list[list[tuple[int, int]]] = [[], []]
        self.energy: list[int | None] = [5_000, 1_000]

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        memory._obj.used = self.used[(handle.value or 0) - 1]
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, infos: Any) -> int:
        mine = self.processes[handle.value - 1]
        if count._obj.value < len(mine):
            return 7
        count._obj.value = len(mine)
        for info, (pid, used) in zip(infos, mine, strict=False):
            info.pid, info.used = pid, used
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:
        value = self.energy[handle.value - 1]
        if value is None:
            return 3  # NVML_ERROR_NOT_SUPPORTED
        energy._obj.value = value
        return 0


def test_nvml_knows_processes_or_what_came_since(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library = FakeNvml()
    nvml = Nvml(library)
    assert nvml.read([41, 42]) == {"gpu_energy_joules": 6.0}
    library.used = [1500 * MIB, 100 * MIB]
    library.processes[1] = [(i, MIB) for i in range(1000, 1100)]  # more than there is room for
    assert nvml.read([41, 42])["device_bytes"] == 600 * MIB
    library.processes[0] = [(41, 300 * MIB), (42, 2**64 - 1), (43, 70 * MIB)]
    library.processes[1].append((42, 20 * MIB))
    library.energy[1] = None
    assert nvml.read([41, 42]) == {"device_bytes": 320 * MIB}


def test_nvml_looks_at_the_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7")
    assert Nvml(FakeNvml()).read([1]) == {"gpu_energy_joules": 1.0}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f")
    assert Nvml(FakeNvml()).read([1]) == {"gpu_energy_joules": 6.0}


def mac(processes: dict[tuple[int, int], dict[int, int]]) -> Callable[[int, int], list[int] | None]:
    """libproc that knows these (pid, version): numbers by their place in the structure."""

    def numbers(pid: int, version: int) -> list[int] | None:
        found = processes.get((pid, version))
        return None if found is None else [found.get(i, 0) for i in range(64)]

    return numbers


def test_macos_accounts_footprint_and_energy() -> None:
    six = {(7, 6): {6: 900, 7: 500, 40: 3_000_000_000}, (8, 6): {6: 100, 7: 50, 40: 1_000_000_000}}
    assert mac_process_sizes([7, 8, 9], mac(six)) == {
        "rss_bytes": 1000,
        "footprint_bytes": 550,
        "cpu_energy_joules": 4.0,
    }
    four = {(7, 4): {6: 900, 7: 500, 40: 77}}  # version 4 ends before the energy
    assert mac_process_sizes([7], mac(four)) == {"rss_bytes": 900, "footprint_bytes": 500}
    assert mac_process_sizes([9], mac({})) == {}


def test_wired_memory_as_vm_stat_prints_it() -> None:
    text = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               10.\n"
        "Pages wired down:                     123456.\n"
    )
    assert wired_of(text) == 16384 * 123456
    assert wired_of("vm_stat: not found") is None


def test_growth_counts_from_when_the_reader_was_made() -> None:
    values = iter([100.0, 90.0, 130.0, None])
    sample = memory._growth("wired_bytes", lambda: next(values))
    assert [sample(), sample(), sample()] == [{}, {"wired_bytes": 30.0}, {}]


CHILD = """
import mmap, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[::4096])
own = bytearray(b"x" * (24 << 20))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="this kernel has no smaps_rollup"
)
def test_two_processes_share_the_file_they_map(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(MIB) * 32)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        found = []
        for pids in ([children[0].pid], [child.pid for child in children]):
            reader = Reader(pids, interval_s=0.01)
            reader.start()
            found.append(reader.stop())
    finally:
        for child in children:
            child.kill()
            child.communicate(timeout=30)
    one, two = found
    assert one["rss_bytes"] > (32 + 24) * MIB  # the mapped file and its own
    assert two["rss_bytes"] > 1.9 * one["rss_bytes"]
    assert two["shared_bytes"] >= 2 * 32 * MIB
    assert two["rss_bytes"] - two["pss_bytes"] >= 32 * MIB  # the file is there once
    assert two["rss_peak_bytes"] >= two["rss_bytes"]
    assert "device_bytes" not in two or two["device_bytes"] > 0
