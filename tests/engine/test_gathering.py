"""Owners of interactive sequences in threads, and how steps of the embedded model wait for them: by
what is counted, not by the time that it takes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import CostWindow, Gathering
from pyllamabatch.scheduler.idle import FIRST_SECONDS
from pyllamabatch.step.sampling_params import SamplingParams

LATE = 0.003
PARAMS = SamplingParams(temperature=0, ignore_eog=True)


class Flat(StepCost):
    """A cost model that takes every step for as long as it is told, and remembers what it sees."""

    absolute = True

    def __init__(self) -> None:
        self.seconds = 0.0
        self.seen: list[tuple[int, int, float, int]] = []

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return self.seconds

    def observe(
        self, rows: int, prefill: int, kv: float, n_seqs: int, seconds: float, n_steps: int = 1
    ) -> None:
        self.seen.append((rows, prefill, kv, n_seqs))


class Watched:
    def __init__(self, window: CostWindow) -> None:
        self.window = window
        self.answers: list[tuple[Gathering, float]] = []

    def __call__(self, gathering: Gathering) -> float:
        seconds = self.window(gathering)
        self.answers.append((gathering, seconds))
        return seconds


def engine_on(model: Model, n: int, **options: Any) -> Engine:
    return Engine(model, n_seq_max=n, n_ctx=1024, n_threads=1, **options)


def drive(engine: Engine, cost: Flat, n: int, n_tokens: int, step_s: float) -> dict[int, int]:
    """`n` threads sample until each has a token, and `n_tokens` each from then on, the last of them
    a moment later than the others, steps being taken for so long; how many steps sampled so many of
    them."""
    begin, end = threading.Barrier(n + 1, timeout=60), threading.Barrier(n, timeout=60)
    joined: list[int] = []

    def run(i: int) -> int:
        with engine.sequence(PARAMS) as sequence:
            sequence.prompt([1 + i, 2, 3])
            begin.wait()
            begin.wait()
            sampled = together = 0
            while together < n_tokens:
                if i == n - 1:
                    time.sleep(LATE)
                together += len(joined) == n
                sequence.sample()
                sampled += 1
                if sampled == 1:
                    joined.append(i)
            cost.seconds = 0.0  # the others go on without it
            end.wait()  # none leaves before the others are done
            return sampled

    with ThreadPoolExecutor(n) as threads:
        runs = [threads.submit(run, i) for i in range(n)]
        begin.wait()
        cost.seconds = step_s
        before = engine.stats().fill
        begin.wait()
        sampled = sum(one.result(120) for one in runs)
    after = engine.stats().fill
    fill = {rows: after[rows] - before.get(rows, 0) for rows in after if rows}
    assert sum(rows * steps for rows, steps in fill.items()) == sampled >= n * n_tokens
    return fill


@pytest.mark.parametrize("n", [2, 4, 8])
def test_dear_steps_are_full(embedded_model: Model, n: int) -> None:
    cost, gather = Flat(), Watched(CostWindow(longest=30))
    with engine_on(embedded_model, n, cost=cost, gather=gather) as engine:
        fill = drive(engine, cost, n, 32, step_s=1e4)
    # Each joins at its own time, and is waited for from then on: the step in which the last one
    # joins is full, and so are those of the 32 tokens behind it. Had a step gone without one of
    # them, the others would have been done one full step sooner.
    assert fill[n] >= 33
    for gathering, seconds in gather.answers:
        assert gathering.n_ready + gathering.n_expected <= n
        assert seconds <= gathering.since + 30 - gathering.now
        assert all(rest.idle >= 0 for rest in gathering.expected)
    assert any(seconds > 0 for _, seconds in gather.answers)
    rows = [shape for shape in cost.seen if shape[0] == n][-16:]
    assert [shape[:2] for shape in rows] == [(n, 0)] * len(rows)  # none of them is a prompt's


def test_steps_that_cost_nothing_wait_for_none(embedded_model: Model) -> None:
    cost, gather = Flat(), Watched(CostWindow(least=0))
    with engine_on(embedded_model, 4, cost=cost, gather=gather) as engine:
        drive(engine, cost, 4, 32, step_s=0.0)
    assert all(seconds <= 0 for _, seconds in gather.answers)


def test_a_sequence_that_is_alone_is_never_held(embedded_model: Model) -> None:
    cost, gather = Flat(), Watched(CostWindow())
    with engine_on(embedded_model, 4, cost=cost, gather=gather) as engine:
        assert drive(engine, cost, 1, 32, step_s=1e4) == {1: 33}
    assert gather.answers == []


def test_an_engine_waits_by_its_own_cost_model(embedded_model: Model) -> None:
    with engine_on(embedded_model, 2) as engine, engine.sequence(PARAMS) as sequence:
        scheduler = engine._core.scheduler
        assert scheduler.idle_sequences.gather == CostWindow()
        cost: Any = engine.cost
        assert cost.absolute == cost.calibrated
        sequence.prompt([1, 2, 3])
        sequence.sample()
        assert cost.absolute
        for _ in range(64):
            sequence.sample()
        assert engine.stats().tokens == 65  # all of them are accounted
        habit = scheduler.idle_sequences.usual
        assert (habit.mean, habit.returns) != (FIRST_SECONDS, 0.5)  # the latter on busy cores
        assert 0 < habit.mean < 1
        assert 0 < habit.returns < 1
