"""An engine gives up host memory while there is pressure, and takes it again afterwards."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pyllamabatch.engine.memory_watch import MemoryWatch
from pyllamabatch.kv import SwapSpace
from pyllamabatch.llama.pressure import Pressure

NORMAL, WARNING, CRITICAL = Pressure


def test_pressure_moves_states_to_files(tmp_path: Path) -> None:
    space = SwapSpace(100, tmp_path)
    space.put(1, b"state")
    levels = iter([NORMAL, WARNING, CRITICAL, CRITICAL, NORMAL])
    commands: list[Callable[[], None]] = []
    watch = MemoryWatch(space, commands.append, read=lambda: next(levels))
    found = []
    for _ in range(5):
        watch.look()
        assert len(commands) <= 1
        while commands:
            commands.pop()()
        space.put(2, b"another")
        found.append((space.used, space.n_bytes, len(list(tmp_path.iterdir()))))
    assert found == [(12, 100, 0), (0, 0, 2), (0, 0, 2), (0, 0, 2), (7, 100, 1)]
    assert (space.take(1), space.take(2)) == (b"state", b"another")


def test_without_room_for_files_they_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    space = SwapSpace(100, tmp_path / "missing")
    space.put(1, b"state")
    watch = MemoryWatch(space, lambda command: command(), read=lambda: CRITICAL)
    with caplog.at_level(logging.WARNING, logger="pyllamabatch"):
        watch.look()
    assert "memory pressure: critical" in caplog.text
    assert "saved states stay in memory" in caplog.text
    assert space.take(1) == b"state"


def test_it_looks_until_the_core_ends() -> None:
    stop, answered = threading.Event(), threading.Event()
    core = threading.Thread(target=stop.wait)
    core.start()
    watch = MemoryWatch(
        SwapSpace(0), lambda command: answered.set(), read=lambda: CRITICAL, seconds=0.001
    )
    thread = watch.start(core)
    assert answered.wait(60)
    stop.set()
    core.join()
    thread.join(60)
    assert not thread.is_alive()
