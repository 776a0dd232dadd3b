"""Interactive sequences that run and wait for their owners, and how long these tend to take."""

from __future__ import annotations

from pyllamabatch.cost.step_cost import StepCost

from .gather import LEAST_SECONDS, ExpectedSequence, Gather, Gathering

PATIENCE_SECONDS = 0.5
FIRST_SECONDS = 200e-6  # mean of an owner's time before anything is known


class ReturnTime:
    """How long an owner takes from a token to the next thing that it asks for.

    Times within that of a step, or within 200 µs, are averaged (`mean`), with the weight 1/8 of RFC
    6298, which estimates round trips of packets for the same purpose. Longer ones (a user reads, a
    thread waits for others) are never worth to be waited for, however long they are: of those only
    the share counts, `returns` being the others'. It begins at a half, and has the weight 1/8 too.
    """

    __slots__ = ("mean", "returns")

    def __init__(self, like: ReturnTime | None = None) -> None:
        self.mean: float = FIRST_SECONDS if like is None else like.mean
        self.returns: float = 0.5 if like is None else like.returns

    def learn(self, seconds: float, within: float) -> None:
        """It took so long, where a step took `within`."""
        if seconds > within:
            self.returns -= self.returns / 8
            return
        self.returns += (1 - self.returns) / 8
        self.mean += (seconds - self.mean) / 8


class IdleSequences:
    """The interactive sequences that run and have nothing to compute, the longest idle first, and
    which of them are expected: those that have had something to compute since the last wait in
    vain. A new one is taken to be like all before it. `patience`: seconds that one may be idle
    while others need its room."""

    def __init__(self, gather: Gather, patience: float = PATIENCE_SECONDS) -> None:
        self.gather = gather
        self.usual = ReturnTime()
        self.within = 0.0  # the last step's time
        self.ready_at: float | None = None  # when there was something to compute for this step
        self.n_awaited = 0  # how many have to come before the last wait is over sooner
        self._patience = patience
        self._since: dict[int, float] = {}
        self._expected: set[int] = set()
        self._return_times: dict[int, ReturnTime] = {}

    def __len__(self) -> int:
        return len(self._since)

    @property
    def n_expected(self) -> int:
        return len(self._expected)

    def begin(self, id: int, now: float) -> None:
        self._since[id] = now
        self._expected.add(id)

    def end(self, id: int) -> None:
        self._since.pop(id, None)
        self._expected.discard(id)

    def learn(self, id: int, now: float) -> None:
        """Its owner has asked for something at this time; nothing, if it is not idle."""
        since = self._since.get(id)
        if since is not None:
            self._learn(id, max(0.0, now - since))

    def computed_alone(self, id: int, n: int, now: float, seconds: float) -> None:
        """It was idle, and had `n` tokens until `now`, each in a step of its own that took
        `seconds`."""
        idle = max(0.0, (now - self._since[id]) / n - seconds)
        self.within = seconds
        for _ in range(min(n, 16)):  # more of them change nothing
            self._learn(id, idle)
        self.end(id)
        self.begin(id, now)

    def _learn(self, id: int, seconds: float) -> None:
        return_time = self._return_times.get(id)
        if return_time is None:
            return_time = self._return_times[id] = ReturnTime(self.usual)
        for each in (return_time, self.usual):
            each.learn(seconds, max(self.within, LEAST_SECONDS))

    def forget(self, id: int) -> None:
        """It is gone."""
        self._return_times.pop(id, None)

    def wait(self, now: float, n_ready: int, cost: StepCost | None, kv: float) -> float:
        """Seconds to wait for the expected ones, which are not expected any more once that is 0.
        For the rest see `Gathering`."""
        if self.ready_at is None:
            self.ready_at = now
        self.n_awaited = 0
        if not self._expected:
            return 0.0
        expected = tuple(self._view(id, now) for id in self._expected)
        seconds = self.gather(Gathering(now, self.ready_at, n_ready, expected, cost, kv))
        if seconds > 0:
            soon = sum(seq.wait <= seconds for seq in expected)
            self.n_awaited = soon or len(expected)
            return seconds
        self._expected.clear()
        return 0.0

    def overdue(self, now: float) -> int | None:
        """The one that has been idle longest, if that is too long."""
        for id, since in self._since.items():
            return id if since + self._patience <= now else None  # rounded as in `until_overdue`
        return None

    def until_overdue(self, now: float) -> float:
        """Seconds until there is one; 0 when none is idle."""
        for since in self._since.values():
            return max(0.0, since + self._patience - now)
        return 0.0

    def _view(self, id: int, now: float) -> ExpectedSequence:
        return_time = self._return_times.get(id, self.usual)
        idle = max(0.0, now - self._since[id])
        return ExpectedSequence(idle, return_time.mean, return_time.returns)
