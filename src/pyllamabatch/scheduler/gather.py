"""When a step starts: at once, or a moment later because more rows are about to come.

Owners of hand-driven sequences ask for one token at a time. Between two steps their sequences have
nothing to compute for as long as it takes the owners to look at their tokens, so a step that starts
with the first who asks leaves the others to the next one. The scheduler knows who may be waited
for; how long is one small function of a frozen value, and has no clock: the engine asks it in real
time, a simulator in virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Gathering:
    """The step that could start now. Times in seconds on the scheduler's clock.

    `since`: when the first of its rows was there. `n_ready`: running sequences with something to
    compute. `n_expected`: hand-driven ones that have nothing to compute, but have had since the
    last time that nobody waited for them any more. `cost`: the device's cost model, when there
    is one.
    """

    now: float
    since: float
    n_ready: int
    n_expected: int
    cost: Any = None


class Gather(Protocol):
    """How many seconds longer to wait for those who are expected; 0 or less: not at all. Asked
    again whenever somebody comes, never when nobody is expected."""

    def __call__(self, gathering: Gathering) -> float: ...


@dataclass(frozen=True, slots=True)
class Window:
    """Wait `seconds` from the first row on; 0 never waits."""

    seconds: float = 200e-6

    def __call__(self, gathering: Gathering) -> float:
        return gathering.since + self.seconds - gathering.now


class Resting:
    """The hand-driven sequences that run and wait for their owners, longest first, and which of
    them are expected: those that have had something to compute since the last wait in vain."""

    __slots__ = ("_expected", "_since", "gather")

    def __init__(self, gather: Gather) -> None:
        self.gather = gather
        self._since: dict[int, float] = {}
        self._expected: set[int] = set()

    def begin(self, id: int, now: float) -> None:
        self._since[id] = now
        self._expected.add(id)

    def end(self, id: int) -> None:
        self._since.pop(id, None)
        self._expected.discard(id)

    def wait(self, now: float, since: float, n_ready: int, cost: Any) -> float:
        """Seconds to wait for the expected ones, who are not expected any more once that is 0."""
        if not self._expected:
            return 0.0
        gathering = Gathering(now, since, n_ready, len(self._expected), cost)
        seconds = self.gather(gathering)
        if seconds > 0:
            return seconds
        self._expected.clear()
        return 0.0

    @property
    def n_expected(self) -> int:
        return len(self._expected)

    @property
    def longest(self) -> tuple[int, float] | None:
        """(id, since when) of the one that has rested longest."""
        return next(iter(self._since.items()), None)
