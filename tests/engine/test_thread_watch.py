"""Threads are given up where a step takes less time without them, and come back."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyllamabatch.engine import thread_watch
from pyllamabatch.engine.native_context import NativeContext
from pyllamabatch.engine.thread_watch import WINDOW, WINDOWS, ThreadWatch
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Step
from pyllamabatch.step.types import Run
from tests.support.engines import engine_on, greedy

N = 4


def decodes(rows: int, drafts: int = 0) -> Step:
    slots = np.arange(rows, dtype=np.int32)
    each = dict.fromkeys(range(rows), drafts) if drafts else {}
    return Step(slots, (), (), (), rows, {}, drafts=each)


def alone(threads: int, rows: int) -> float:
    """Seconds of a step."""
    return 0.08 / threads


def beside_two(threads: int, rows: int) -> float:
    """The same where others have two of four cores."""
    return 0.06 if threads > 2 else 0.08 / threads


class Machine:
    """Its steps take what `seconds(threads, rows)` says, and `share` of that is computed by the
    thread that runs them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, one: int = N, many: int = N) -> None:
        self.now, self.threads = 0.0, (one, many)
        self.seconds: Callable[[int, int], float] = alone
        self.share = 1.0
        monkeypatch.setattr(thread_watch, "perf_counter", lambda: self.now)
        self.watch = ThreadWatch(lambda *threads: setattr(self, "threads", threads), one, many)

    def compute(
        self, seconds: float, rows: int = 4, at_once: int = 32, drafted: int = 0
    ) -> dict[int, float]:
        """For so long, in calls of up to `at_once` steps, which had so many drafted rows. Returns
        the share of steps by threads."""
        n_steps: Counter[int] = Counter()
        step = decodes(rows, drafts=2)
        until = self.now + seconds
        while self.now < until:
            n = self.watch.begin(step, at_once)
            threads = self.threads[rows > 1]
            took = n * self.seconds(threads, rows)
            self.now += took
            n_steps[threads] += n
            self.watch.took(step, Run(0, n, n, took, n_drafted=drafted), self.share * took)
        return {threads: n / n_steps.total() for threads, n in n_steps.items()}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_alone_it_keeps_all_but_for_rare_trials(machine: Machine) -> None:
    assert 0.98 < machine.compute(600)[N] < 1


def test_what_has_no_core_is_given_up_and_taken_back(machine: Machine) -> None:
    machine.compute(200)  # the next trial is far away
    machine.seconds, machine.share = beside_two, 0.6
    machine.compute(5)
    assert machine.compute(60)[2] > 0.95
    machine.seconds, machine.share = alone, 1.0
    machine.compute(100)
    assert machine.compute(60)[N] > 0.95


def test_trials_of_many_numbers_of_rows_cost_no_more(machine: Machine) -> None:
    shares = [machine.compute(0.6, rows=2 + i % 16)[N] for i in range(1000)]
    assert 0.98 < sum(shares) / 1000 < 1


def test_a_new_engine_meets_a_neighbour_in_its_first_steps(machine: Machine) -> None:
    machine.seconds, machine.share = lambda threads, rows: 0.06 if threads > 3 else 0.04, 0.6
    machine.compute(0.06 * WINDOW * WINDOWS, at_once=64)
    assert machine.threads[1] == 3


def test_a_thread_that_always_sleeps_tells_nothing_new(machine: Machine) -> None:
    machine.share = 0.5  # for a GPU that computes some of the layers
    assert 0.98 < machine.compute(600)[N] < 1


def test_each_number_of_rows_has_its_own(machine: Machine) -> None:
    machine.seconds = lambda threads, rows: 0.02 / threads if rows > 1 else 0.01 * threads
    machine.compute(20, rows=1)
    assert machine.compute(60, rows=8)[N] > 0.95
    assert machine.compute(20, rows=1)[1] > 0.95


def test_one_thread_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Machine(monkeypatch, 1, 2).compute(20, rows=1) == {1: 1.0}


def test_steps_that_had_drafts_have_as_many_as_those_without(machine: Machine) -> None:
    machine.seconds = lambda threads, rows: 0.01 * threads
    assert machine.compute(20, drafted=5) == {N: 1.0}  # nothing is compared
    machine.compute(20)
    assert N not in machine.compute(1, drafted=5)


def test_calls_are_long_where_steps_are_short(machine: Machine) -> None:
    machine.seconds = lambda threads, rows: 0.004 / threads
    for drafted in (0, 3):
        assert machine.watch.begin(decodes(5 + drafted), 1000) == WINDOW  # nothing is known of it
        machine.compute(0.05, rows=5 + drafted, drafted=drafted)
        assert machine.watch.begin(decodes(5 + drafted), 1000) == 100


def test_a_trial_ends_where_drafts_begin(machine: Machine) -> None:
    for _ in range(1000):
        if machine.threads[1] != N:
            break
        machine.compute(0.1, at_once=1)
    assert machine.watch.tries
    shares = machine.compute(60, at_once=8, drafted=5)
    assert shares[N] > 0.99
    assert not machine.watch.tries


def test_trials_that_drafts_end_cost_no_more(machine: Machine) -> None:
    for at_once in (3, 16):
        drafted = [5 * (i % 8 > 0) for i in range(4000)]
        shares = [machine.compute(0.1, at_once=at_once, drafted=n).get(N, 0) for n in drafted]
        assert 0.98 < sum(shares) / len(shares) < 1


def test_a_call_that_goes_on_ends_where_threads_change(machine: Machine) -> None:
    step = decodes(1)
    machine.watch.begin(step, 1)
    changes = 0
    for _ in range(200):
        machine.now += 0.1
        if not machine.watch.took(step, Run(0, 1, 1, 0.1), 0.1):
            changes += 1
            before = machine.threads
            machine.watch.begin(step, 1)
            assert machine.threads != before
    assert changes > 1


def test_an_engine_has_one_where_threads_change_no_answer(embedded_model: Model) -> None:
    def watch(**options: object) -> object:
        with engine_on(embedded_model, n_threads=2, **options) as engine:
            stream = engine.submit("What is 17 + 25?", greedy(4))
            assert len(stream.result().tokens) == 4
            return engine._core._device.threads

    assert isinstance(watch(), ThreadWatch)
    assert watch(batch_invariant=True) is None
    assert watch(n_threads_batch=1) is not None


@pytest.mark.parametrize(
    ("offloaded", "params", "watched"),
    [(1.0, {}, False), (1.0, {"offload_kqv": False}, True), (0.5, {}, True), (0.0, {}, True)],
)
def test_threads_are_watched_where_the_cpu_computes_a_part(
    offloaded: float,
    params: dict[str, Any],
    watched: bool,
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model, "offloaded", offloaded)
    with NativeContext(model, n_ctx=256, n_threads=2, **params) as context:
        assert (context.thread_watch() is not None) == watched
