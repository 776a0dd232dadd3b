"""ThreadWatch: gives up a thread that has no core of its own, and takes it back.

At each barrier of a step all threads wait for the last one. Where another process computes on the
core of one, a step may take less time without it. Which number is better shows when steps are timed
with both."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

from ..scheduler import Step
from ..step.types import Run

log = logging.getLogger(__name__)

WINDOW = 8  # steps that are timed together
WINDOWS = 4  # of a trial, with one number and the other in turns
FEWER = 0.97  # of the time, at most, for which a thread is given up
HOPELESS = 1.3  # times as slow: a trial ends early
SOON = 1.0  # seconds between two trials, at least
COST = 0.01  # of the time, that lost trials take at most


class ThreadWatch:
    """The leader's. Steps with prompts have all threads. Those that may have drafts have as many as
    the same sequences without, and are timed where they had none."""

    def __init__(
        self, set_threads: Callable[[int, int], object], n_threads: int, n_threads_batch: int
    ) -> None:
        """set_threads: as `Context.set_threads`, for one row and for many."""
        self._set_threads = set_threads
        self._all = self._now = (n_threads, n_threads_batch)
        self._choices: dict[int, ThreadChoice] = {}  # by rows
        self.tries = False  # the call since `begin` has threads that may be the wrong ones

    def begin(self, call: Step, n_steps: int) -> int:
        """Before a call: how many steps of it at most."""
        choice = self._choice(call)
        wanted = self._wanted(choice)
        if wanted != self._now:
            self._set_threads(*wanted)
            self._now = wanted
        self.tries = choice is not None and choice.n_now != choice.n
        return n_steps if choice is None else min(n_steps, choice.n_left)

    def took(self, call: Step, run: Run) -> bool:
        """After it. Returns whether another one like it may go on without `begin`."""
        choice = self._choice(call)
        if choice is not None and run.n_drafted:
            choice.give_up()
        elif choice is not None and run.n_steps:
            choice.took(run.n_steps, run.seconds, perf_counter())
        return self._wanted(choice) == self._now

    def _wanted(self, choice: ThreadChoice | None) -> tuple[int, int]:
        if choice is None or choice.n_now == choice.n_most:
            return self._all
        return choice.n_now, choice.n_now

    def _choice(self, call: Step) -> ThreadChoice | None:
        n_rows, most = call.n_rows, self._all[call.n_rows > 1]
        if call.chunks or most == 1:
            return None
        choice = self._choices.get(n_rows)
        if choice is None:
            choice = self._choices[n_rows] = ThreadChoice(most, perf_counter() + SOON)
        return choice


@dataclass(slots=True)
class ThreadChoice:
    """Of steps of as many rows. `n_most`: threads that there are. `trial_at`: when two numbers of
    them are compared next."""

    n_most: int
    trial_at: float
    n: int = 0
    other: int = 0  # that is compared with `n`; 0: none
    n_trials: int = 0
    times: list[float] = field(default_factory=list)  # of the trial's windows
    n_done: int = 0  # steps of the window, and their seconds
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.n = self.n_most

    @property
    def n_now(self) -> int:
        return self.other if self.other and len(self.times) % 2 else self.n

    @property
    def n_left(self) -> int:
        """Steps until the next decision; many while nothing is compared."""
        return WINDOW - self.n_done if self.other else 1 << 30

    def took(self, n_steps: int, seconds: float, now: float) -> None:
        self.n_done += n_steps
        self.seconds += seconds
        if self.n_done < WINDOW:
            return
        each = self.seconds / self.n_done
        self.n_done, self.seconds = 0, 0.0
        if self.other:
            self.times.append(each)
            if len(self.times) == WINDOWS or each > HOPELESS * self.times[0]:
                self._decide(now)
        elif now >= self.trial_at:
            self._compare()

    def give_up(self) -> None:
        """A trial whose next steps can't be compared with those before. Another one follows."""
        if self.other:
            self.other, self.n_done, self.seconds = 0, 0, 0.0

    def _compare(self) -> None:
        n, most = self.n, self.n_most
        near = dict.fromkeys((n - 1, n // 2, n + 1, min(2 * n, most)))
        others = [other for other in near if 1 <= other <= most and other != n]
        self.other = others[self.n_trials % len(others)]
        self.n_trials += 1
        self.times.clear()

    def _decide(self, now: float) -> None:
        mine, others = self.times[::2], self.times[1::2]
        enough = FEWER if self.other < self.n else 1.0
        lost = 0.0
        if others and max(others) < enough * min(mine):
            log.debug("%d threads in place of %d: %s", self.other, self.n, self.times)
            self.n = self.other
        else:
            lost = WINDOW * sum(each - min(mine) for each in others)
        self.other, self.trial_at = 0, now + max(SOON, lost / COST)
