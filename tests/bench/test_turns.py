"""Engines that take turns: one computes at a time, and each clock runs in its own time alone."""

import subprocess
import sys
import time
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from bench import turns
from pyllamabatch.engine.engine import Engine

STEP_S = 0.002


class Machine:
    """Notes who computes; two at once are an error."""

    def __init__(self) -> None:
        self.by: list[str] = []
        self._busy = False

    def engine(self, name: str) -> Any:
        def step() -> None:
            assert not self._busy
            self._busy = True
            time.sleep(STEP_S)
            self._busy = False
            self.by.append(name)

        core, stepper = SimpleNamespace(step=step), SimpleNamespace(interrupt=lambda: None)
        return SimpleNamespace(_core=core, _stepper=stepper)


def test_one_computes_at_a_time_and_each_has_its_own_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "SLICE", 5 * STEP_S)
    machine, both = Machine(), turns.Turns()
    clocks, began = dict[str, float](), time.perf_counter()
    engines = {name: machine.engine(name) for name in ("a", "b")}
    members = {
        name: turns.EngineTurn(both, cast(Engine, engine)) for name, engine in engines.items()
    }

    def work(name: str, n_steps: int) -> None:
        for _ in range(n_steps):
            engines[name]._core.step()
        clocks[name] = members[name].seconds()

    with members["a"], members["b"]:  # both are there before one of them computes
        threads = [Thread(target=work, args=each) for each in (("a", 40), ("b", 20))]
        for thread in threads:
            thread.start()
        threads[1].join(10)
        members["b"].__exit__()  # the other one has the machine to itself
        threads[0].join(10)
        members["b"].__enter__()
    wall = time.perf_counter() - began
    assert machine.by.count("a") == 40
    assert machine.by.count("b") == 20
    changes = sum(x != y for x, y in zip(machine.by, machine.by[1:], strict=False))
    assert changes >= 4  # neither waited for the other's end
    assert clocks["a"] >= 40 * STEP_S
    assert clocks["b"] >= 20 * STEP_S
    assert clocks["a"] + clocks["b"] <= wall


def test_a_call_of_many_steps_is_interrupted_when_another_one_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "SLICE", STEP_S)
    both, interrupted = turns.Turns(), list[bool]()

    def long_step() -> None:  # until it is interrupted, but no longer than 10 s
        end = time.monotonic() + 10
        while not interrupted and time.monotonic() < end:
            time.sleep(STEP_S)

    def interrupt() -> None:
        interrupted.append(True)

    core, short = SimpleNamespace(step=long_step), Machine().engine("b")
    long = SimpleNamespace(_core=core, _stepper=SimpleNamespace(interrupt=interrupt))
    first = turns.EngineTurn(both, cast(Engine, long))
    second = turns.EngineTurn(both, short)
    with first, second:
        thread = Thread(target=long._core.step)
        thread.start()
        short._core.step()
        thread.join(10)
    assert interrupted


def test_who_takes_no_part_waits_for_no_other() -> None:
    both, machine = turns.Turns(), Machine()
    one, other = machine.engine("a"), machine.engine("b")
    with turns.EngineTurn(both, cast(Engine, one)):
        turns.EngineTurn(both, cast(Engine, other))
        other._core.step()  # returns, although it is not its turn
    assert machine.by == ["b"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal that stops a process")
def test_a_process_computes_in_its_turn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SLICE", 0.05)
    both, engine = turns.Turns(), Machine().engine("a")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        used = psutil.Process(child.pid)
        try:
            with turns.EngineTurn(both, engine), turns.ProcessTurn(both, child.pid) as its:
                stopped = used.cpu_times().user
                for _ in range(3):
                    engine._core.step()
                assert its.seconds() == 0  # its turn has not come
                assert used.cpu_times().user - stopped <= 0.02  # two ticks
                end = time.monotonic() + 10
                while its.seconds() < 2 * turns.SLICE and time.monotonic() < end:
                    engine._core.step()
                assert its.seconds() >= 2 * turns.SLICE
            assert used.status() != psutil.STATUS_STOPPED
        finally:
            child.kill()


def test_who_has_not_begun_is_not_told_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """While readers get what was sampled before its turn: that would count others' time as its."""
    monkeypatch.setattr(turns, "SLICE", 0.001)
    both, waiting = turns.Turns(), Machine().engine("b")
    told = list[bool]()
    first = SimpleNamespace(
        _core=SimpleNamespace(step=lambda: None),
        _stepper=SimpleNamespace(interrupt=lambda: told.append(both.between)),
    )
    monkeypatch.setattr(both, "settle", lambda: None)
    with turns.EngineTurn(both, cast(Engine, first)), turns.EngineTurn(both, waiting):
        both.between = True
        thread = Thread(target=waiting._core.step)
        thread.start()
        time.sleep(0.05)
        assert not told
        with both.changed:
            both.between = False
    thread.join(10)
    assert True not in told
