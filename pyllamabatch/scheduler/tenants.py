"""What each tenant has had so far and has waiting: what fairness is counted in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .view import SequenceView

I64 = npt.NDArray[np.int64]

# (tenant number + 1, tokens generated since its admission) of each running sequence; 0, 0: nobody
Running = Callable[[], tuple[I64, I64]]


class Tenants:
    """All tenants that ever had a sequence, numbered as they came: `names[i]` is number i, and the
    arrays (int64, one entry per tenant, made when they are asked for) say of each

    - waiting, running: how many sequences do now;
    - prompt: prompt tokens of the sequences that were admitted, each counted once;
    - generated: tokens generated for it so far.
    """

    __slots__ = ("_counts", "_generated", "_number", "_prompt", "_running", "_waiting", "names")

    def __init__(self, running: Running | None = None) -> None:
        self.names: list[str] = []
        self._number: dict[str, int] = {}
        self._counts = np.zeros((3, 8), dtype=np.int64)
        self._waiting, self._prompt, self._generated = self._counts
        self._running = running or _nobody

    @classmethod
    def of(cls, running: Iterable[SequenceView], waiting: Iterable[SequenceView]) -> Tenants:
        """As it follows from these sequences alone."""
        running, waiting = list(running), list(waiting)
        slots: list[tuple[int, int]] = []
        made = cls(lambda: _columns(slots))
        for view in running:
            number = made.number(view.tenant)
            slots.append((number + 1, view.generated))
            made.admitted(number, view.n_prompt)
        for view in waiting:
            number = made.number(view.tenant)
            made.waits(number)
            if view.preemptions:
                made.admitted(number, view.n_prompt)
                made.left(number, view.generated)
        return made

    # -- for the scheduler

    def number(self, name: str) -> int:
        number = self._number.get(name)
        if number is None:
            number = self._number[name] = len(self.names)
            self.names.append(name)
            if number == self._counts.shape[1]:
                self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)), axis=1)
                self._waiting, self._prompt, self._generated = self._counts
        return number

    def waits(self, number: int, n: int = 1) -> None:
        """`n` more sequences wait: -1, one less."""
        self._waiting[number] += n

    def admitted(self, number: int, n_prompt: int) -> None:
        """A sequence, for the first time."""
        self._prompt[number] += n_prompt

    def left(self, number: int, n_generated: int) -> None:
        """A sequence runs no more; `n_generated` since its admission."""
        self._generated[number] += n_generated

    # -- for the policy

    def __len__(self) -> int:
        return len(self.names)

    @property
    def waiting(self) -> I64:
        waiting: I64 = self._waiting[: len(self.names)].copy()
        return waiting

    @property
    def running(self) -> I64:
        numbers, _ = self._running()
        return np.bincount(numbers, minlength=len(self.names) + 1)[1:]

    @property
    def prompt(self) -> I64:
        prompt: I64 = self._prompt[: len(self.names)].copy()
        return prompt

    @property
    def generated(self) -> I64:
        numbers, turns = self._running()
        running = np.bincount(numbers, turns, minlength=len(self.names) + 1)[1:]
        return self._generated[: len(self.names)] + running.astype(np.int64)


def _columns(pairs: list[tuple[int, int]]) -> tuple[I64, I64]:
    numbers, generated = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return numbers, generated


def _nobody() -> tuple[I64, I64]:
    return _columns([])
