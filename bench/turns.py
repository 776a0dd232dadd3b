"""Engines of one process that take turns every tenth of a second, each with a clock of its own,
which stands while another one computes. So what disturbs the machine for a second or a minute
slows all of them alike, and their ratio stays."""

import time
from collections import deque
from collections.abc import Callable
from threading import Condition

from pyllamabatch.engine.engine import Engine

SLICE = 0.1  # seconds, and the rest of a step; a native call of many steps is interrupted


class Turns:
    def __init__(self) -> None:
        self.changed = Condition()
        self.rota: deque[Turn] = deque()  # the first one computes

    def of(self, engine: Engine) -> "Turn":
        """The steps of `engine` wait for their turn while it takes part."""
        core = engine._core
        turn = Turn(self, engine._stepper.interrupt)
        core.step = turn.around(core.step)  # type: ignore[method-assign]
        return turn


class Turn:
    """As a context manager: takes part. Its times are of no use to others."""

    def __init__(self, turns: Turns, interrupt: Callable[[], None]) -> None:
        self._turns, self._interrupt = turns, interrupt
        self._spent = self._cpu_spent = 0.0
        self._since = self._cpu_since = 0.0

    def __enter__(self) -> "Turn":
        rota = self._turns.rota
        with self._turns.changed:
            rota.append(self)
            if rota[0] is self:
                self._begin()
        return self

    def __exit__(self, *error: object) -> None:
        rota = self._turns.rota
        with self._turns.changed:
            if rota[0] is self:
                self._pass_on()
            rota.remove(self)
            self._turns.changed.notify_all()

    def seconds(self) -> float:
        """Of its own: what it computed in, waited for its readers in, and so on."""
        with self._turns.changed:
            return self._spent + (time.perf_counter() - self._since if self._mine() else 0.0)

    def cpu_seconds(self) -> float:
        """Of this process, in its own time."""
        with self._turns.changed:
            return self._cpu_spent + (time.process_time() - self._cpu_since if self._mine() else 0)

    def around(self, step: Callable[[], None]) -> Callable[[], None]:
        """`step` in its turn, where it takes part."""

        def in_turn() -> None:
            rota = self._turns.rota
            with self._turns.changed:
                while self in rota and not self._mine():
                    if not self._turns.changed.wait(SLICE) and rota[0]._over():
                        rota[0]._interrupt()
            step()
            with self._turns.changed:
                if self._mine() and len(rota) > 1 and self._over():
                    self._pass_on()

        return in_turn

    def _mine(self) -> bool:
        return bool(self._turns.rota) and self._turns.rota[0] is self

    def _over(self) -> bool:
        return time.perf_counter() - self._since > SLICE

    def _begin(self) -> None:
        self._since, self._cpu_since = time.perf_counter(), time.process_time()

    def _pass_on(self) -> None:
        """To the next one, and behind all others."""
        self._spent += time.perf_counter() - self._since
        self._cpu_spent += time.process_time() - self._cpu_since
        self._turns.rota.rotate(-1)
        self._turns.rota[0]._begin()
        self._turns.changed.notify_all()
