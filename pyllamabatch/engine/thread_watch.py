"""ThreadWatch: gives up a thread that has no core of its own, and takes it back.

At each barrier of a step all threads wait for the last one. Where another process computes on the
core of one, a step may take less time without it. Which number is better shows when steps are timed
with both. That is done now and then, and at once where the thread that runs the steps does not
compute for all of their time: it has no core then, or sleeps for one that has none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

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
LESS = 0.85  # of their time: so little does a thread compute that others disturb


class ThreadWatch:
    """The leader's. Steps with prompts have all threads. Those that may have drafts have as many as
    the same sequences without, and are timed where they had none. Each number of rows has its own
    choice, but the cost of trials is counted for all of them together."""

    def __init__(
        self, set_threads: Callable[[int, int], object], n_threads: int, n_threads_batch: int
    ) -> None:
        """set_threads: as `Context.set_threads`, for one row and for many."""
        self._set_threads = set_threads
        self._all = self._now = (n_threads, n_threads_batch)
        self._choices: dict[int, ThreadChoice] = {}  # by rows
        self._trial_at = perf_counter() + SOON  # the next one
        self._misled = False  # by a thread that did not compute: the trial was not won, or not yet
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
            self._pay(choice.give_up(run.seconds / run.n_steps, run.seconds), perf_counter())
        elif choice is not None and run.n_steps:
            window = choice.took(run.n_steps, run.seconds, own)
            if window is not None:
                self._look(choice, *window, perf_counter())
        return self._wanted(choice) == self._now

    def _look(self, choice: ThreadChoice, each: float, share: float, now: float) -> None:
        """A window of steps that took `each`, and their thread computed for `share` of that."""
        due = now >= self._trial_at
        if choice.other:
            lost = choice.compared(each)
            if lost is not None:
                if lost <= 0:
                    self._trial_at = now + SOON
                self._pay(lost, now)
                self._misled &= lost > 0
        elif due or (share < LESS and not self._misled):
            self._misled = not due
            if due:
                self._trial_at = now + SOON
            choice.compare(each)

    def _pay(self, lost: float, now: float) -> None:
        """The next trial is as far away as these seconds of the last one have it."""
        if lost > 0:
            self._trial_at = max(now, self._trial_at) + max(SOON, lost / COST)

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
            choice = self._choices[n_rows] = ThreadChoice(most)
        return choice


@dataclass(slots=True)
class ThreadChoice:
    """Of steps of as many rows. `n_most`: threads that there are."""

    n_most: int
    n: int = 0
    other: int = 0  # that is compared with `n`; 0: none
    n_trials: int = 0
    times: list[float] = field(default_factory=list)  # of the trial's windows
    n_done: int = 0  # steps of the window, and their seconds, and those that their thread computed
    seconds: float = 0.0
    own: float = 0.0
    each: float = LOOK  # of the last steps while nothing was compared

    def __post_init__(self) -> None:
        self.n = self.n_most

    @property
    def n_now(self) -> int:
        return self.other if self.other and len(self.times) % 2 else self.n

    @property
    def n_left(self) -> int:
        """Steps until the next decision."""
        return WINDOW - self.n_done if self.other else max(WINDOW, int(LOOK / max(self.each, 1e-6)))

    def took(self, n_steps: int, seconds: float, own: float) -> tuple[float, float] | None:
        """Seconds of each step, and the share that their thread computed, where a window ends."""
        self.n_done += n_steps
        self.seconds += seconds
        self.own += own
        if self.n_done < WINDOW or not self.seconds:
            return None
        each, share = self.seconds / self.n_done, self.own / self.seconds
        self._begin_window()
        if not self.other:
            self.each = each
        return each, share

    def give_up(self, each: float, seconds: float) -> float:
        """A trial whose next steps, of `each` seconds, can't be compared with those before. Another
        one follows. Seconds that were lost: all that a window took that has no other to compare."""
        self.each = each
        if not self.other:
            return 0.0
        lost = max(0.0, self._lost()) + (self.n_now != self.n) * (self.seconds + seconds)
        self.other = 0
        self._begin_window()
        return lost

    def _begin_window(self) -> None:
        self.n_done, self.seconds, self.own = 0, 0.0, 0.0

    def compare(self, each: float) -> None:
        """A trial begins, with the window that has just ended."""
        n, most = self.n, self.n_most
        near = dict.fromkeys((n - 1, n // 2, n + 1, min(2 * n, most)))
        others = [other for other in near if 1 <= other <= most and other != n]
        self.other = others[self.n_trials % len(others)]
        self.n_trials += 1
        self.times = [each]

    def compared(self, each: float) -> float | None:
        """The next window of it. Seconds that were lost, once it is decided; None before."""
        self.times.append(each)
        if len(self.times) < WINDOWS and each <= HOPELESS * self.times[0]:
            return None
        mine, others = self.times[::2], self.times[1::2]
        enough = FEWER if self.other < self.n else 1.0
        lost = 0.0
        if max(others) < enough * min(mine):
            log.debug("%d threads in place of %d: %s", self.other, self.n, self.times)
            self.n = self.other
        else:
            lost = self._lost()
        self.other = 0
        return lost

    def _lost(self) -> float:
        mine = min(self.times[::2])
        return WINDOW * sum(each - mine for each in self.times[1::2])
