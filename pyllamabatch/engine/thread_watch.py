"""ThreadWatch: gives up a thread that has no core of its own, and takes it back.

At each barrier of a step all threads wait for the last one. Where another process computes on the
core of one, a step may take less time without it. Which number is better shows when steps are timed
with both. That is done now and then, and at once where the thread that runs the steps computes for
less of their time than before: it has no core then, or sleeps for one that has none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from ..scheduler import Step
from ..step.types import Run

log = logging.getLogger(__name__)

WINDOW = 8  # steps that are timed together, at least
LOOK = 0.1  # seconds of these, at least, while nothing is compared
WINDOWS = 4  # of a trial, with one number and the other in turns
FEWER = 0.97  # of the time, at most, for which a thread is given up
HOPELESS = 1.3  # times as slow: a trial ends early
SOON = 1.0  # seconds between two trials, at least
COST = 0.01  # of the time, that lost trials take at most
LESS = 0.85  # of the share that a thread has computed before: then others have its core


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

    def took(self, call: Step, run: Run, own: float) -> bool:
        """After it. `own`: CPU seconds of the thread that ran it, or `run.seconds` where they are
        not known. Returns whether another one like it may go on without `begin`."""
        choice = self._choice(call)
        if choice is not None and run.n_drafted:
            choice.give_up()
        elif choice is not None and run.n_steps:
            choice.took(run.n_steps, run.seconds, own, perf_counter())
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


class Timed(NamedTuple):
    """Steps that were timed together: seconds of each, and the share that their thread computed."""

    each: float
    share: float


@dataclass(slots=True)
class ThreadChoice:
    """Of steps of as many rows. `n_most`: threads that there are. `trial_at`: when two numbers of
    them are compared next. `usual`: share of the steps' time that their thread computed, with `n`
    threads, when this was chosen."""

    n_most: int
    trial_at: float
    n: int = 0
    other: int = 0  # that is compared with `n`; 0: none
    n_trials: int = 0
    usual: float = 1.0
    windows: list[Timed] = field(default_factory=list)  # of the trial
    n_done: int = 0  # steps of the window, and their seconds, and those that their thread computed
    seconds: float = 0.0
    own: float = 0.0
    each: float = LOOK  # of the last window while nothing was compared

    def __post_init__(self) -> None:
        self.n = self.n_most

    @property
    def n_now(self) -> int:
        return self.other if self.other and len(self.windows) % 2 else self.n

    @property
    def n_left(self) -> int:
        """Steps until the next decision."""
        return WINDOW - self.n_done if self.other else max(WINDOW, int(LOOK / self.each))

    def took(self, n_steps: int, seconds: float, own: float, now: float) -> None:
        self.n_done += n_steps
        self.seconds += seconds
        self.own += own
        if self.n_done < WINDOW or not self.seconds:
            return
        window = Timed(self.seconds / self.n_done, self.own / self.seconds)
        self._begin_window()
        if self.other:
            self.windows.append(window)
            if len(self.windows) == WINDOWS or window.each > HOPELESS * self.windows[0].each:
                self._decide(now)
            return
        self.each = window.each
        if now >= self.trial_at or window.share < LESS * self.usual:
            self._compare(window)

    def give_up(self) -> None:
        """A trial whose next steps can't be compared with those before. Another one follows."""
        if self.other:
            self.other = 0
            self._begin_window()

    def _begin_window(self) -> None:
        self.n_done, self.seconds, self.own = 0, 0.0, 0.0

    def _compare(self, window: Timed) -> None:
        """`window`: the first one of the trial."""
        n, most = self.n, self.n_most
        near = dict.fromkeys((n - 1, n // 2, n + 1, min(2 * n, most)))
        others = [other for other in near if 1 <= other <= most and other != n]
        self.other = others[self.n_trials % len(others)]
        self.n_trials += 1
        self.windows = [window]

    def _decide(self, now: float) -> None:
        mine, others = self.windows[::2], self.windows[1::2]
        best = min(window.each for window in mine)
        enough = FEWER if self.other < self.n else 1.0
        lost = 0.0
        if max(window.each for window in others) < enough * best:
            log.debug("%d threads in place of %d: %s", self.other, self.n, self.windows)
            self.n, mine = self.other, others
        else:
            lost = WINDOW * sum(window.each - best for window in others)
        self.usual = mine[-1].share
        self.other, self.trial_at = 0, now + max(SOON, lost / COST)
