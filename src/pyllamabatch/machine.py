"""What the decoder runs on: a stepper and a memory; and how long it lets them run."""

from __future__ import annotations

from typing import Any, Protocol

from .kv import Slots

RUN_SECONDS = 0.02


class StepperLike(Protocol):
    """What the decoder needs of a `Stepper`."""

    @property
    def rows(self) -> Any: ...
    @property
    def n_steps_max(self) -> int: ...
    def step(self, n_rows: int) -> Any: ...
    def run(self, slots: Slots, n_steps: int) -> Any: ...
    def ring(self) -> None: ...
    def clear_slot(self, seq_id: int) -> None: ...
    def take_slot(self, seq_id: int) -> Any: ...
    def put_slot(self, seq_id: int, slot: Any) -> None: ...
    def slot_error(self, seq_id: int) -> str: ...


class MemoryLike(Protocol):
    """What the decoder needs of a `Memory`."""

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None: ...
    def pos_max(self, seq_id: int) -> int: ...


class Pace:
    """How many steps a run may take. Its tokens reach their readers when it returns, so it should
    not take much longer than `seconds` at the speed of the run before; where one step takes longer
    than that, it is one step."""

    def __init__(self, seconds: float = RUN_SECONDS) -> None:
        self.n_steps = 1
        self._seconds = seconds

    def took(self, seconds: float, n_steps: int) -> None:
        """The last run: its time and the steps that it did."""
        if n_steps:
            per_step = max(seconds / n_steps, 1e-9)
            self.n_steps = max(1, int(self._seconds / per_step))
