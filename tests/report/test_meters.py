"""What a meter says of processes: made-up counters, a fake NVML, and real children."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pyllamabatch.llama.host import usable_cores
from pyllamabatch.report import meters
from pyllamabatch.report.meters import Gpus, Meter, OtherCores, figures
from tests.support.served import until

MIB = 2**20


def test_steady_is_the_median_and_joules_are_what_the_counter_grew_by() -> None:
    samples: list[dict[str, float]] = [
        {"rss_bytes": 10.0, "cpu_energy_joules": 5.0},
        {"rss_bytes": 30.0},
        {"rss_bytes": 12.0, "cpu_energy_joules": 9.0, "gpu_energy_joules": 100.0},
        {"cpu_energy_joules": 1.0, "gpu_energy_joules": 130.0},  # the first one has wrapped around
        {"cpu_energy_joules": 1.5},
    ]
    assert figures(samples) == {
        "rss_bytes": 12.0,
        "cpu_energy_joules": 4.5,
        "gpu_energy_joules": 30.0,
        "energy_joules": 34.5,
    }


def test_what_is_not_known_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert figures([{}, {}]) == {}
    assert figures([{"cpu_energy_joules": 5.0}, {"cpu_energy_joules": 5.0}]) == {}
    monkeypatch.setattr(meters, "psutil", None)
    meter = Meter([1], sources=[dict])
    meter.start()
    assert meter.stop() == {"other_cpu": meters.UNKNOWN}


def test_a_meter_samples_all_the_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "INTERVAL_S", 0.001)
    values = itertools.count(1)
    meter = Meter([1], sources=[lambda: {"rss_bytes": float(next(values))}])
    meter.start()
    until(lambda: len(meter._samples) > 9)
    assert 1 < meter.stop()["rss_bytes"] < next(values)


class FakeNvml:
    """Two GPUs; `used` and `processes` of each, `energy` in mJ."""

    class NVMLError(Exception): ...

    def __init__(self) -> None:
        self.used = [1000 * MIB, 0]
        self.processes: list[list[tuple[int, int | None]]] = [[], []]
        self.energy: list[int | None] = [5_000, 1_000]

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, device: int) -> Any:
        return SimpleNamespace(used=self.used[device])

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[Any]:
        return [SimpleNamespace(pid=p, usedGpuMemory=used) for p, used in self.processes[device]]

    def nvmlDeviceGetTotalEnergyConsumption(self, device: int) -> int:
        value = self.energy[device]
        if value is None:
            raise self.NVMLError
        return value


def test_nvml_knows_processes_or_what_came_since(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library: Any = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    gpus = Gpus([41, 42])
    assert gpus.read() == {"gpu_energy_joules": 6.0}
    library.used = [1500 * MIB, 100 * MIB]
    assert gpus.read()["device_bytes"] == 600 * MIB
    library.processes = [[(41, 300 * MIB), (42, None), (43, 70 * MIB)], [(42, 20 * MIB)]]
    library.energy[1] = None
    assert gpus.read() == {"device_bytes": 320 * MIB}


@pytest.mark.parametrize(
    ("refused", "found"), [("ComputeRunningProcesses", 500 * MIB), ("MemoryInfo", 300 * MIB)]
)
def test_what_nvml_refuses_costs_no_other_figure(
    monkeypatch: pytest.MonkeyPatch, refused: str, found: int
) -> None:
    """WSL 2 knows no processes; a GB10 of a DGX Spark has no memory of its own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library: Any = FakeNvml()

    def refuse(device: int) -> Any:
        raise library.NVMLError

    monkeypatch.setattr(library, f"nvmlDeviceGet{refused}", refuse)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    gpus = Gpus([41])
    library.used[0] += 500 * MIB
    library.processes[0] = [(41, 300 * MIB)]
    assert gpus.read() == {"device_bytes": found, "gpu_energy_joules": 6.0}


@pytest.mark.parametrize(("words", "joules"), [("1,7", 1.0), ("GPU-8f", 6.0)])
def test_nvml_looks_at_the_visible_gpus(
    monkeypatch: pytest.MonkeyPatch, words: str, joules: float
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", words)
    library: Any = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert Gpus([1]).read() == {"gpu_energy_joules": joules}


CHILD = """
import mmap, sys
file = open(sys.argv[1], "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapped[::4096])
own = bytearray(b"x" * (24 << 20))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not psutil.LINUX, reason="other systems do not say what processes share")
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
            meter = Meter(pids)
            meter.start()
            found.append(meter.stop())
    finally:
        for child in children:
            child.kill()
            child.communicate(timeout=30)
    one, two = found
    assert one["rss_bytes"] > (32 + 24) * MIB  # the mapped file and its own
    assert two["rss_bytes"] > 1.9 * one["rss_bytes"]
    assert two["rss_bytes"] - two["pss_bytes"] >= 32 * MIB  # the file is there once
    ended = Meter([child.pid for child in children])
    ended.start()
    assert "rss_bytes" not in ended.stop()


def test_the_children_that_are_named_are_no_others() -> None:
    spin = "import sys\nprint(1, flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            named, unnamed = OtherCores([child.pid]), OtherCores()
            began = psutil.Process(child.pid).cpu_times().user
            while psutil.Process(child.pid).cpu_times().user < began + 0.3:
                time.sleep(0.01)
            used = unnamed.used() - named.used()
            assert used > 0.01
        finally:
            child.kill()


def test_others_use_no_more_cores_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a short time one tick of the clock may be more."""
    seen = iter([(0.0, 0.0), (1.0, 1e-3)])
    monkeypatch.setattr(OtherCores, "_now", lambda _: next(seen))
    assert OtherCores().used() == usable_cores()
