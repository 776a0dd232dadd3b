"""When a step starts, and interactive sequences among the others: no model, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.errors import RequestTooLong
from pyllamabatch.scheduler import (
    ExpectedSequence,
    Gathering,
    Limits,
    Scheduler,
    Step,
    StepView,
    Window,
)
from pyllamabatch.scheduler.deadlines import Deadlines

LIMITS = Limits(n_batch=32, n_ubatch=8, n_seq_max=4, n_cells=256, n_cells_seq=256)
WINDOW = 0.2


@dataclass
class Owners:
    """Interactive sequences, the cells that they hold by the book, and a clock."""

    limits: Limits = LIMITS
    patience: float = 5.0
    now: float = 0.0
    known: dict[int, int] = field(default_factory=dict)
    cells: dict[int, int] = field(default_factory=dict)
    sampled: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits, gather=Window(WINDOW), patience=self.patience)

    def add(self, id: int, n: int) -> None:
        self.scheduler.add(id, n, 1, arrival=self.now, interactive=True)
        self.known[id], self.sampled[id] = n, 0

    def extend(self, id: int, n: int) -> None:
        self.scheduler.extend(id, n)
        self.known[id] += n

    def trim(self, id: int, known: int) -> None:
        cached = self.scheduler.trim(id, known)
        self.known[id] = known
        if id in self.cells:
            assert cached == min(self.cells[id], known - 1)
            self.cells[id] = cached

    def remove(self, id: int) -> None:
        self.scheduler.remove(id)
        self.cells.pop(id, None)
        del self.known[id]

    def step(self) -> Step | None:
        """One step, which takes a tenth of a second."""
        step = self.scheduler.plan(self.now)
        self.now += 0.1
        if step is None:
            return None
        for id, _ in step.preempted:
            del self.cells[id]
        for id, _ in step.admitted:
            self.cells[id] = 0
        assert len(step.decode) == 0  # those are requests'
        done = []
        for chunk in step.chunks:
            assert chunk.start == self.cells[chunk.id]
            self.cells[chunk.id] += chunk.n
            assert chunk.last == (self.cells[chunk.id] == self.known[chunk.id])
            if chunk.last:
                done.append(chunk.id)
        if step.n_rows:
            self.scheduler.advance(step)
        for id in done:
            self.sampled[id] += 1
            self.known[id] += 1
        self.check()
        return step

    def run(self) -> None:
        for _ in range(1000):
            if self.scheduler.idle:
                return
            self.step()
        raise AssertionError("it never ends")

    def check(self) -> None:
        scheduler = self.scheduler
        view = scheduler.view(self.now)
        assert scheduler.accounting.used == sum(self.cells.values())
        assert {seq.id for seq in view.running} == set(self.cells)
        for seq in view.running:
            assert (seq.known, seq.computed) == (self.known[seq.id], self.cells[seq.id])
        assert {seq.id for seq in view.running if seq.decoding} == set(view.decoding)
        busy = {seq.id for seq in view.running if seq.remaining}
        assert busy == {seq.id for seq in view.prefilling} | set(view.decoding)
        assert len(scheduler.idle_sequences) == len(view.running) - len(busy)
        assert all(seq.remaining for seq in view.waiting)
        assert view.kv.promised == sum(seq.remaining for seq in view.running)


def test_a_window_ends_so_long_after_the_first_row() -> None:
    at = Gathering(
        now=10.05, since=10.0, n_ready=1, expected=(ExpectedSequence(0.0, 0.1, 0.0),) * 2
    )
    assert Window(0.2)(at) == pytest.approx(0.15)
    assert Window(0.05)(at) <= 1e-9
    assert Window(0)(at) < 0


def test_all_of_a_prompt_but_its_last_token_is_computed_until_a_token_is_asked_for() -> None:
    owners = Owners()
    owners.add(1, 10)
    owners.run()
    assert (owners.cells, owners.sampled) == ({1: 9}, {1: 0})
    owners.scheduler.ask(1)
    owners.run()
    assert (owners.cells, owners.sampled, owners.known) == ({1: 10}, {1: 1}, {1: 11})
    owners.scheduler.ask(1)
    assert owners.scheduler.view(0.0).decoding == {1}
    owners.run()
    assert (owners.cells, owners.sampled) == ({1: 11}, {1: 2})
    owners.extend(1, 40)
    owners.run()
    assert (owners.cells, owners.sampled) == ({1: 51}, {1: 2})


def test_a_prompt_of_one_token_has_nothing_to_compute_at_first() -> None:
    owners = Owners()
    owners.add(1, 1)
    assert owners.scheduler.idle
    assert owners.scheduler.plan(0.0) is None
    owners.scheduler.ask(1)
    owners.run()
    assert (owners.cells, owners.sampled) == ({1: 1}, {1: 1})


def test_a_step_waits_for_those_who_were_there_until_the_window_ends() -> None:
    owners = Owners()
    scheduler = owners.scheduler
    for id in (1, 2, 3):
        owners.add(id, 2)
    assert scheduler.hold(0.0) == 0  # none has been here before
    owners.run()
    scheduler.ask(1)
    assert scheduler.hold(10.0) == pytest.approx(WINDOW)
    scheduler.ask(2)
    assert scheduler.hold(10.15) == pytest.approx(WINDOW - 0.15)
    scheduler.ask(3)
    assert scheduler.hold(10.16) == 0
    owners.run()
    assert scheduler.counters.fill[3] == 1
    scheduler.ask(1)
    scheduler.ask(2)
    assert scheduler.hold(20.0) > 0
    assert scheduler.hold(20.0 + WINDOW) == 0  # 3 does not come
    owners.run()
    scheduler.ask(2)
    assert scheduler.hold(30.0) > 0
    scheduler.ask(1)
    assert scheduler.hold(30.0) == 0  # and is not waited for until it does


def test_who_is_alone_or_gone_is_not_waited_for() -> None:
    owners = Owners()
    owners.add(1, 2)
    owners.run()
    owners.scheduler.ask(1)
    assert owners.scheduler.hold(1.0) == 0
    owners.add(2, 3)
    owners.run()
    owners.scheduler.ask(1)
    assert owners.scheduler.hold(2.0) > 0
    owners.remove(2)
    assert owners.scheduler.hold(2.0) == 0


def test_requests_run_for_many_steps_while_others_are_idle() -> None:
    owners = Owners()
    owners.add(1, 5)
    owners.run()
    owners.scheduler.add(2, 5, 50, arrival=0.0)
    first = owners.scheduler.plan(0.0)
    assert first is not None
    owners.scheduler.advance(first)
    step = owners.scheduler.plan(0.0)
    assert step is not None
    assert step.repeat > 1
    owners.scheduler.ask(1)
    both = owners.scheduler.plan(0.0)
    assert both is not None
    assert (both.n_rows, both.repeat) == (2, 1)


def test_trimmed_tokens_give_their_cells_back_and_the_last_is_computed_again() -> None:
    owners = Owners()
    owners.add(1, 20)
    owners.scheduler.ask(1)
    owners.run()
    owners.trim(1, 8)
    owners.check()
    assert owners.cells == {1: 7}
    owners.scheduler.ask(1)
    owners.run()
    assert (owners.cells, owners.known) == ({1: 8}, {1: 9})
    with pytest.raises(ValueError, match="0 tokens are to stay of 9"):
        owners.scheduler.trim(1, 0)


def test_a_sequence_that_can_not_grow_any_more_says_so_and_stays() -> None:
    owners = Owners()
    owners.add(1, 250)
    owners.run()
    with pytest.raises(RequestTooLong):
        owners.extend(1, 7)
    owners.extend(1, 6)
    owners.scheduler.ask(1)
    owners.run()
    assert owners.known == {1: 257}
    with pytest.raises(RequestTooLong):
        owners.scheduler.ask(1)
    owners.check()


def test_which_is_idle_too_long_is_preempted_and_comes_back() -> None:
    owners = Owners()
    for id in (1, 2, 3, 4):
        owners.add(id, 10)
    owners.run()
    idle_began = owners.now
    owners.add(5, 10)
    assert owners.step() is None  # no slot
    wait = owners.scheduler.hold(owners.now)
    assert 0 < wait < owners.patience
    owners.now += wait
    assert owners.now > idle_began
    step = owners.step()
    assert step is not None
    assert [id for id, _ in step.preempted] == [1]
    assert [id for id, _ in step.admitted] == [5]
    owners.run()
    assert owners.scheduler.idle  # 1 wants nothing
    owners.remove(2)
    owners.scheduler.ask(1)
    owners.run()
    assert owners.sampled[1] == 1
    assert owners.scheduler.counters.recomputed_rows == 9


def test_who_relaxes_computes_no_more() -> None:
    owners = Owners()
    owners.add(1, 100)
    owners.scheduler.ask(1)
    owners.step()
    owners.scheduler.relax(1)
    assert owners.scheduler.idle
    assert owners.cells == {1: 32}
    owners.scheduler.ask(1)
    owners.run()
    assert owners.sampled == {1: 1}


def test_requests_are_not_interactive() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(1, 5, 5, arrival=0.0)
    with pytest.raises(ValueError, match="is not interactive"):
        scheduler.ask(1)


def test_a_view_made_up_knows_which_is_idle() -> None:
    owners = Owners()
    owners.add(1, 5)
    owners.add(2, 5)
    owners.run()
    owners.scheduler.ask(1)
    real = owners.scheduler.view(0.0)
    made = StepView.of(LIMITS, real.running)
    assert made.decoding == real.decoding == {1}
    assert list(made.prefilling) == list(real.prefilling) == []


def test_deadlines() -> None:
    deadlines = Deadlines()
    for id, time in ((1, 5.0), (2, 3.0), (3, 4.0), (4, 3.0)):
        deadlines.add(id, time)
    deadlines.remove(3)
    deadlines.remove(9)
    assert deadlines.next == 3.0
    assert deadlines.due(2.9) == []
    assert deadlines.due(4.5) == [2, 4]
    assert deadlines.next == 5.0
    deadlines.remove(1)
    assert deadlines.next is None
    assert deadlines.due(99.0) == []


ACTIONS = st.tuples(
    st.sampled_from(["add", "extend", "ask", "relax", "trim", "remove", "step", "wait"]),
    st.integers(0, 5),
    st.integers(1, 60),
)


@given(st.lists(ACTIONS, max_size=60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_cells_and_counters_agree_whatever_the_owners_do(
    actions: list[tuple[str, int, int]], unified: bool
) -> None:
    limits = Limits(32, 8, 3, 96, 96 if unified else 32, unified)
    owners = Owners(limits, patience=0.3)
    ids = iter(range(1, 1000))
    for what, which, n in actions:
        names = sorted(owners.known)
        id = names[which % len(names)] if names else 0
        try:
            if what == "add":
                owners.add(next(ids), n)
            elif what == "step":
                owners.step()
            elif what == "wait":
                owners.now += owners.scheduler.hold(owners.now)
            elif not id:
                continue
            elif what == "extend":
                owners.extend(id, n)
            elif what == "trim":
                owners.trim(id, min(n, owners.known[id]))
            elif what == "remove":
                owners.remove(id)
            else:
                getattr(owners.scheduler, what)(id)
        except RequestTooLong:
            assert n + owners.known.get(id, 0) > limits.n_cells_seq
        owners.check()
    for id in sorted(owners.known):
        if owners.known[id] <= limits.n_cells_seq:
            before = owners.sampled[id]
            owners.scheduler.ask(id)
            owners.run()
            assert owners.sampled[id] == before + 1
