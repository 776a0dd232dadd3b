"""Interactive sequences that run and wait for their owners, and how long these tend to take."""

from __future__ import annotations

from typing import Any

from .gather import LEAST_SECONDS, ExpectedSequence, Gather, Gathering

FIRST_SECONDS = 200e-6  # mean and spread of an owner's time before anything is known


class Habit:
    """How long an owner takes from a token to the next thing that it asks for.

    Times within that of a step, or within 200 µs, are averaged, `mean` and mean deviation `spread`
    with the weights of RFC 6298 (1/8 and 1/4), which estimates round trips of packets for the same
    purpose. Longer ones (a user reads, a thread waits for others) are never worth to be waited for,
    however long they are: of those only the share counts, `returns` being the others'. It begins at
    a half, and has the weight 1/8 too."""

    __slots__ = ("mean", "returns", "spread")

    def __init__(self, like: Habit | None = None) -> None:
        self.mean: float = FIRST_SECONDS if like is None else like.mean
        self.spread: float = FIRST_SECONDS if like is None else like.spread
        self.returns: float = 0.5 if like is None else like.returns

    def learn(self, seconds: float, within: float) -> None:
        """It took so long, where a step took `within`."""
        if seconds > within:
            self.returns -= self.returns / 8
            return
        self.returns += (1 - self.returns) / 8
        self.spread += (abs(seconds - self.mean) - self.spread) / 4
        self.mean += (seconds - self.mean) / 8


class IdleSequences:
    """Who rests, longest first, and which of them are expected: those that have had something to
    compute since the last wait in vain. A new one is taken to be like all before it."""

    __slots__ = ("_expected", "_habits", "_n_awaited", "_since", "gather", "usual", "within")

    def __init__(self, gather: Gather) -> None:
        self.gather = gather
        self.usual = Habit()
        self.within = 0.0  # the last step's time
        self._since: dict[int, float] = {}
        self._expected: set[int] = set()
        self._habits: dict[int, Habit] = {}
        self._n_awaited = 0

    def begin(self, id: int, now: float) -> None:
        self._since[id] = now
        self._expected.add(id)

    def end(self, id: int) -> None:
        self._since.pop(id, None)
        self._expected.discard(id)

    def learn(self, id: int, now: float) -> None:
        """Its owner has asked for something at this time; nothing, if it does not rest."""
        since = self._since.get(id)
        if since is None:
            return
        habit = self._habits.get(id)
        if habit is None:
            habit = self._habits[id] = Habit(self.usual)
        for each in (habit, self.usual):
            each.learn(max(0.0, now - since), max(self.within, LEAST_SECONDS))

    def forget(self, id: int) -> None:
        """It is gone."""
        self._habits.pop(id, None)

    def wait(self, now: float, since: float, n_ready: int, cost: Any, kv: float) -> float:
        """Seconds to wait for the expected ones, who are not expected any more once that is 0."""
        self._n_awaited = 0
        if not self._expected:
            return 0.0
        rests = tuple(self._rest(id, now) for id in self._expected)
        seconds = self.gather(Gathering(now, since, n_ready, rests, cost, kv))
        if seconds > 0:
            soon = sum(rest.wait <= seconds for rest in rests)
            self._n_awaited = soon or len(rests)
            return seconds
        self._expected.clear()
        return 0.0

    def _rest(self, id: int, now: float) -> ExpectedSequence:
        habit = self._habits.get(id, self.usual)
        rested = max(0.0, now - self._since[id])
        return ExpectedSequence(rested, habit.mean, habit.spread, habit.returns)

    @property
    def n_awaited(self) -> int:
        """How many have to come before the last wait is over sooner."""
        return self._n_awaited

    @property
    def longest(self) -> tuple[int, float] | None:
        """(id, since when) of the one that has rested longest."""
        return next(iter(self._since.items()), None)
