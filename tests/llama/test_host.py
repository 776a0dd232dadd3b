"""What the host gives: cores by affinity and quota, memory by the control group, whole files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyllamabatch.llama import host


def given(monkeypatch: pytest.MonkeyPatch, files: dict[str, list[str]]) -> None:
    monkeypatch.setattr(host, "_lines", lambda path: files.get(Path(path).name, []))


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), (None, 8)],
)
def test_cores(monkeypatch: pytest.MonkeyPatch, quota: str | None, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    given(monkeypatch, {"cpu.max": [quota] if quota else []})
    assert host.usable_cores() == cores


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    given(monkeypatch, {"memory.max": ["max"]})
    assert host.host_memory() == host.host_available() == physical
    given(monkeypatch, {"memory.max": ["4096"], "meminfo": ["MemAvailable:  2 kB", "x"]})
    assert host.host_memory() == 4096
    assert host.host_available() == 2048


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    host.write_whole(path, b"one")

    def fail(source: str, target: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        host.write_whole(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
