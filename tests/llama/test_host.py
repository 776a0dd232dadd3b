"""What the host gives: cores by affinity and quota, memory by the control group, whole files.

No recording of a machine: values in the formats that the systems define. Linux: control groups of
both versions (Documentation/admin-guide/cgroup-v2.rst and cgroup-v1), proc_meminfo(5). macOS:
`sysctl hw` (perflevel0: the performance cores; an Intel Mac has no such name), with the cores that
Apple's technical specifications name.
"""

import os
from pathlib import Path

import psutil
import pytest

from pyllamabatch.llama import host


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A folder with /proc and /sys of a process in these control groups."""
    under_cgroup = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": groups, **under_cgroup}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


V2 = "0::/a/b"
V1 = "4:memory:/a\n3:cpu,cpuacct:/a"
QUOTA, PERIOD = (f"cpu,cpuacct/a/cpu.cfs_{name}_us" for name in ("quota", "period"))


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (V2, {}, 8),
        (V2, {"a/b/cpu.max": "max 100000"}, 8),
        (V2, {"a/b/cpu.max": "200000 100000"}, 2),
        (V2, {"a/b/cpu.max": "150000 100000"}, 2),
        (V2, {"a/b/cpu.max": "1000 100000"}, 1),
        (V2, {"a/b/cpu.max": "600000 100000", "a/cpu.max": "300000 100000"}, 3),  # the one above
        (V2, {"cpu.max": "400000 100000"}, 4),  # a container that sees its own group as the root
        (V1, {QUOTA: "-1"}, 8),
        (V1, {QUOTA: "250000", PERIOD: "50000"}, 5),
        ("12:pids:/", {"cpu.max": "200000 100000"}, 8),  # no group of its own for the CPU
    ],
)
def test_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert host.usable_cores(system(tmp_path, groups, files)) == cores


M2_ULTRA = {"hw.perflevel0.logicalcpu": 16, "hw.perflevel1.logicalcpu": 8}  # of 24
INTEL: dict[str, int] = {}  # it has cores of one kind


@pytest.mark.parametrize(("values", "cores"), [(M2_ULTRA, 16), (INTEL, 24)])
def test_a_macs_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, int], cores: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 24)
    assert host.usable_cores(tmp_path, "darwin", lambda name: values.get(name, 0)) == cores


@pytest.mark.parametrize(("level", "share"), [(83, 0.83), (12, 0.12), (0, 1.0)])
def test_a_macs_free_memory(level: int, share: float) -> None:
    """What kern.memorystatus_level says, anew at every call; 0: an older system without it."""
    values = {"kern.memorystatus_level": level}
    found = host.host_available("darwin", lambda name: values.get(name, 0))
    assert found == pytest.approx(share * host.host_memory(), rel=1e-9)


PHYSICAL = psutil.virtual_memory().total
FILES = "anon 9\ninactive_file 1000\nactive_file 500"  # of memory.stat
FILES_V1 = "inactive_file 1\ntotal_inactive_file 1000\ntotal_active_file 500"
MOST, NOW, STAT = (f"a/b/memory.{name}" for name in ("max", "current", "stat"))
LIMIT, USAGE, STAT_V1 = (
    f"memory/a/memory.{n}" for n in ("limit_in_bytes", "usage_in_bytes", "stat")
)


@pytest.mark.parametrize(
    ("groups", "files", "memory", "available"),
    [
        (V2, {}, PHYSICAL, PHYSICAL),
        (V2, {MOST: "max"}, PHYSICAL, PHYSICAL),
        (V2, {MOST: "8192"}, 8192, 8192),
        (V2, {MOST: "8192", "a/memory.max": "4096"}, 4096, 4096),
        (V2, {"memory.max": "4096"}, 4096, 4096),  # a container that sees its own as the root
        (V2, {MOST: "8192", NOW: "5000"}, 8192, 3192),
        (V2, {MOST: "8192", NOW: "5000", STAT: FILES}, 8192, 4692),
        # others have most of the group above
        (V2, {MOST: "4096", "a/memory.max": "8192", "a/memory.current": "8000"}, 4096, 192),
        (V1, {LIMIT: "8192", USAGE: "5000", STAT_V1: FILES_V1}, 8192, 4692),
        (V1, {LIMIT: "9223372036854771712"}, PHYSICAL, PHYSICAL),  # none
    ],
)
def test_memory(
    tmp_path: Path, groups: str, files: dict[str, str], memory: int, available: int
) -> None:
    root = system(tmp_path, groups, files)
    assert host.host_memory(root) == memory
    assert host.host_available("linux", root=root) == available


def test_memory_that_others_have(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemAvailable:  2 kB\nx\n")
    assert host.host_available("linux", root=tmp_path) == 2048


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with host.whole_file(path) as part:
        part.write_bytes(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"

    def fail() -> None:
        with host.whole_file(path) as part:
            part.write_bytes(b"two")
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
