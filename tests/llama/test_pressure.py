"""Memory pressure as systems tell it.

No recording of a machine: values in the formats that the systems define. Linux: PSI
(Documentation/accounting/psi.rst; control groups: Documentation/admin-guide/cgroup-v2.rst). macOS:
`kern.memorystatus_vm_pressure_level` is 1, 2 or 4, as DISPATCH_MEMORYPRESSURE_NORMAL, _WARN and
_CRITICAL (dispatch/source.h).
"""

import os
import threading
from pathlib import Path

import pytest

from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.llama import runtime
from pyllamabatch.llama.pressure import Pressure, memory_pressure, release_freed

NORMAL, WARNING, CRITICAL = Pressure
HOST, GROUPS, GROUP = "proc/pressure/memory", "proc/self/cgroup", "sys/fs/cgroup"
QUIET = """\
some avg10=0.00 avg60=0.12 avg300=0.05 total=2913411
full avg10=0.00 avg60=0.10 avg300=0.04 total=2513020
"""
SOME = """\
some avg10=23.52 avg60=9.10 avg300=2.31 total=19934115
full avg10=8.71 avg60=3.02 avg300=0.80 total=7513020
"""
FULL = """\
some avg10=71.04 avg60=44.10 avg300=20.31 total=919934115
full avg10=42.71 avg60=23.02 avg300=10.80 total=477513020
"""


@pytest.mark.parametrize(
    ("level", "pressure"),
    [(1, NORMAL), (2, WARNING), (4, CRITICAL), (0, NORMAL)],
)
def test_on_a_mac(level: int, pressure: Pressure) -> None:
    values = {"kern.memorystatus_vm_pressure_level": level}
    assert memory_pressure(system="darwin", read=lambda name: values.get(name, 0)) is pressure


@pytest.mark.parametrize(
    ("files", "pressure"),
    [
        ({HOST: QUIET}, NORMAL),
        ({HOST: SOME}, WARNING),
        ({HOST: FULL}, CRITICAL),
        ({}, NORMAL),  # a kernel without stall information
        # a container's own, on a host that is short of memory
        ({GROUPS: "0::/a/b\n", f"{GROUP}/a/b/memory.pressure": QUIET, HOST: FULL}, NORMAL),
        ({GROUPS: "4:memory:/a\n0::/\n", f"{GROUP}/memory.pressure": FULL, HOST: QUIET}, CRITICAL),
        ({GROUPS: "4:memory:/a\n", HOST: SOME}, WARNING),  # version 1, which has none
    ],
)
def test_on_linux(tmp_path: Path, files: dict[str, str], pressure: Pressure) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory_pressure(tmp_path, "linux") is pressure


def test_elsewhere_nothing_is_known() -> None:
    assert memory_pressure(system="win32") is NORMAL


def test_this_system_answers() -> None:
    assert memory_pressure() in Pressure
    release_freed()


def test_what_stays_wired_is_said_before_llama_cpp_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "GGML_METAL_RESIDENCY_KEEP_ALIVE_S"
    monkeypatch.setenv(name, "180")
    monkeypatch.setattr(runtime, "_started", threading.Event())
    runtime.keep_wired(10**7)
    assert os.environ[name] == "10000000"
    for wrong in (0, 10**7 + 1):
        with pytest.raises(ArgumentError, match="seconds"):
            runtime.keep_wired(wrong)
    runtime._started.set()
    with pytest.raises(UnsupportedOperation, match="before the first model"):
        runtime.keep_wired(60)
    assert os.environ[name] == "10000000"
