"""The machine that a plan is made for, by what its system says.

No recording of a Mac: `iogpu.wired_limit_mb` is 0 until it is set, then whole MiB; what Metal
recommends of 192 GiB is three quarters (llama.cpp's log of `recommendedMaxWorkingSetSize`).
"""

import sys

import pytest

from pyllamabatch.llama import runtime
from pyllamabatch.llama.runtime import BackendDevice
from pyllamabatch.planner import machines
from pyllamabatch.planner.machines import GIB, MACHINES, here, machine


def mac(monkeypatch: pytest.MonkeyPatch, values: dict[str, int], total: int) -> None:
    """As on a Mac whose Metal recommends `total`, and whose sysctl has these values."""
    gpu = BackendDevice("MTL0", "Apple M2 Ultra", "gpu", "MTL", total, total)
    monkeypatch.setattr(runtime, "devices", lambda: {"MTL0": gpu})
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machines, "host_memory", lambda: 192 * GIB)
    monkeypatch.setattr(machines, "sysctl", lambda name: values.get(name, 0))


def test_the_wired_limit_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"iogpu.wired_limit_mb": 0}
    mac(monkeypatch, values, 144 * GIB)
    assert (here().kind, here().device_limit) == ("metal", 144 * GIB)
    assert here().source == "recommendedMaxWorkingSetSize"
    values["iogpu.wired_limit_mb"] = 170_000
    assert here().device_limit == 170_000 * 2**20
    assert here().source == "iogpu.wired_limit_mb"
    assert here().memory == 192 * GIB


def test_every_mac_has_a_limit_below_its_memory() -> None:
    macs = [one for one in MACHINES.values() if one.kind == "metal"]
    chips = {one.name.rpartition("-")[0] for one in macs}
    assert {f"m{n}{kind}" for n in range(1, 6) for kind in ("", "-pro", "-max")} <= chips
    for one in macs:
        assert 0.6 * one.memory < one.device_limit < one.memory
        assert machine(one.name) is one
