"""Engines of this process, and servers, that take turns every tenth of a second, each with a clock
of its own, which stands while another one computes. So what disturbs the machine for a second or a
minute slows all of them alike, and their ratio stays."""

import os
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from threading import Condition

from pyllamabatch.engine.engine import Engine

SLICE = 0.1  # seconds, and the rest of a step; a native call of many steps is interrupted
LOOK = 0.002  # seconds
MOST_LOOKS = 25


class Turns:
    """Those of one machine."""

    def __init__(self) -> None:
        self.changed = Condition()
        self.rota: deque[Turn] = deque()  # the first one computes
        self.between = False  # two of them: none computes

    def settle(self) -> None:
        """Until this process's readers have what the one before has sampled: else they would take
        the next one's time. With `changed` held, which is given up meanwhile."""
        self.between = True
        for _ in range(MOST_LOOKS):
            used = time.process_time()
            self.changed.wait(LOOK)
            if time.process_time() - used < 0.2 * LOOK:
                break
        self.between = False


class Turn(ABC):
    """Of one of them, which takes part within `with`."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._spent = self._cpu_spent = 0.0
        self._since = self._cpu_since = 0.0

    def __enter__(self) -> "Turn":
        with self._turns.changed:
            self._turns.rota.append(self)
            if self._mine():
                self._begin()
            else:
                self._pause()
        return self

    def __exit__(self, *error: object) -> None:
        with self._turns.changed:
            if self._mine():
                self._pass_on()
            self._turns.rota.remove(self)
            self._resume()
            self._turns.changed.notify_all()

    def seconds(self) -> float:
        """Of its own: what it computed in, waited for its readers in, and so on."""
        with self._turns.changed:
            return self._spent + (time.perf_counter() - self._since if self._mine() else 0.0)

    def cpu_seconds(self) -> float:
        """Of this process, in its own time."""
        with self._turns.changed:
            return self._cpu_spent + (time.process_time() - self._cpu_since if self._mine() else 0)

    @abstractmethod
    def end_soon(self) -> None:
        """Others wait, and its time is over. With `changed` held."""

    @abstractmethod
    def _pause(self) -> None:
        """It computes nothing until `_resume`."""

    @abstractmethod
    def _resume(self) -> None: ...

    def _mine(self) -> bool:
        turns = self._turns
        return bool(turns.rota) and turns.rota[0] is self and not turns.between

    def over(self) -> bool:
        return time.perf_counter() - self._since > SLICE

    def _begin(self) -> None:
        self._since, self._cpu_since = time.perf_counter(), time.process_time()
        self._resume()

    def _pass_on(self) -> None:
        """To the next one, and behind all others."""
        self._pause()
        self._spent += time.perf_counter() - self._since
        self._cpu_spent += time.process_time() - self._cpu_since
        self._turns.rota.rotate(-1)
        self._turns.settle()
        self._turns.rota[0]._begin()
        self._turns.changed.notify_all()


class EngineTurn(Turn):
    """Its steps wait for their turn."""

    def __init__(self, turns: Turns, engine: Engine) -> None:
        super().__init__(turns)
        core = engine._core
        self._compute, self._interrupt = core.step, engine._stepper.interrupt
        core.step = self._step  # type: ignore[method-assign]

    def end_soon(self) -> None:
        self._interrupt()

    def _pause(self) -> None:
        """Its next step waits."""

    def _resume(self) -> None:
        """`Turns.changed` tells it."""

    def _step(self) -> None:
        turns = self._turns
        with turns.changed:
            while self in turns.rota and not self._mine():
                late = not turns.changed.wait(SLICE)
                if late and not turns.between and turns.rota[0].over():
                    turns.rota[0].end_soon()
        self._compute()
        with turns.changed:
            if self._mine() and len(turns.rota) > 1 and self.over():
                self._pass_on()


class ProcessTurn(Turn):
    """It is stopped while others compute. It gives its turn up only while an engine waits."""

    def __init__(self, turns: Turns, pid: int) -> None:
        super().__init__(turns)
        self._pid = pid

    def end_soon(self) -> None:
        self._pass_on()

    def _pause(self) -> None:
        os.kill(self._pid, signal.SIGSTOP)

    def _resume(self) -> None:
        os.kill(self._pid, signal.SIGCONT)
