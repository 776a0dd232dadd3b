"""The scheduler alone, driven through whole lives of sequences by a plain-Python executor."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.scheduler import Limits, fcfs
from tests.support.scheduler_machine import Machine, limits

operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 60), st.integers(1, 30), st.integers(1, 30)),
        st.tuples(st.just("step"), st.integers(1, 8)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("lost step")),
        st.tuples(st.just("shed")),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(limits, operations)
def test_whatever_happens_every_request_finishes_and_every_cell_comes_back(
    limits: Limits, operations: list[tuple[object, ...]]
) -> None:
    machine = Machine(limits, fcfs())
    expected, removed = [], set()
    for name, *numbers in operations:
        n = [int(str(number)) for number in numbers]
        if name == "add":
            id = len(machine.prompts)
            n_prompt = min(n[0], limits.n_cells_seq)
            max_tokens = min(n[1], limits.n_cells_seq - n_prompt + 1)
            machine.add(id, n_prompt, max_tokens, n[2])
            expected.append(id)
        elif name == "step":
            for _ in range(n[0]):
                machine.step()
        elif name == "remove" and n[0] in machine.prompts and n[0] not in machine.done:
            if n[0] not in removed:
                machine.remove(n[0])
                removed.add(n[0])
        elif name == "lost step":  # planned and placed, but the device refused it
            step = machine.scheduler.plan(0.0)
            if step is not None:
                machine.place(step)
        elif name == "shed":
            shed = machine.scheduler.preempt_newest()
            if shed is not None:
                assert machine.owner[shed[1]] == shed[0]
                machine.leave(shed[1])
    machine.run()
    assert sorted(machine.done) == [id for id in expected if id not in removed]
    assert all(machine.generated[id] == machine.ends[id] for id in machine.done)
    assert machine.scheduler.idle
    assert machine.scheduler.accounting.used == 0
    counters = machine.scheduler.counters
    assert counters.rows == counters.decode_rows + counters.prefill_rows
    assert counters.tokens == sum(machine.generated.values())
    assert counters.recomputed_rows <= counters.prefill_rows
    assert machine.first_rows == sorted(machine.first_rows)  # none overtakes under FCFS


@settings(max_examples=200, deadline=None)
@given(
    limits,
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 30)), max_size=12),
    st.integers(2, 40),
)
def test_several_steps_at_once_are_the_steps_that_would_have_been_planned(
    limits: Limits, requests: list[tuple[int, int, int]], most: int
) -> None:
    """FCFS says that its plan stands; asked at every step it plans just that."""
    one, many = Machine(limits, fcfs()), Machine(limits, fcfs())
    for machine in (one, many):
        for id, (a, b, end) in enumerate(requests):
            n_prompt = min(a, limits.n_cells_seq)
            machine.add(id, n_prompt, min(b, limits.n_cells_seq - n_prompt + 1), end)
    while (did := many.step_many(most)) is not None:
        step, n = did
        for i in range(n):
            same = one.step()
            assert same is not None
            assert same.decode.tolist() == step.decode.tolist()
            assert same.chunks == step.chunks
            assert (same.admitted, same.preempted) == (step.admitted, step.preempted)
            assert same.repeat == step.repeat - i
        assert one.scheduler.counters == many.scheduler.counters
        assert one.held == many.held
    assert one.step() is None
    assert one.done == many.done


def test_a_plan_stands_until_a_budget_or_the_cells_end() -> None:
    machine = Machine(Limits(n_batch=64, n_ubatch=64, n_seq_max=3, n_cells=64, n_cells_seq=64))
    scheduler = machine.scheduler
    machine.add(0, 10, 9, 9)
    machine.add(1, 10, 30, 30)
    first = machine.step()
    assert first is not None
    assert first.repeat == 1  # prompts
    step = scheduler.plan(0.0)
    assert step is not None
    assert step.repeat == 8
    for n in (0, 9, -1):
        with pytest.raises(ValueError, match="1 to 8 times"):
            scheduler.advance(step, n)
    scheduler.advance(step, 3)
    assert [s.generated for s in scheduler.view(0.0).running] == [4, 4]
    assert scheduler.accounting.used == 26
    counters = scheduler.counters
    assert (counters.steps, counters.rows, counters.decode_rows, counters.tokens) == (4, 26, 6, 8)
    scheduler.remove(0)
    step = scheduler.plan(0.0)
    assert step is not None
    assert step.repeat == 26
    scheduler.add(2, 60, 5, arrival=0.0)  # has a slot, but no cells: the plan still stands
    step = scheduler.plan(0.0)
    assert step is not None
    assert (step.admitted, step.repeat) == ((), 26)
    scheduler.add(3, 10, 40, arrival=0.0)
    scheduler.remove(2)
    step = scheduler.plan(0.0)
    assert step is not None
    assert [id for id, _ in step.admitted] == [3]
    assert step.repeat == 1
    scheduler.advance(step)
    step = scheduler.plan(0.0)
    assert step is not None
    assert step.repeat == (64 - 13 - 11) // 2  # cells


def test_a_lone_request_step_by_step() -> None:
    machine = Machine(Limits(n_batch=8, n_ubatch=4, n_seq_max=2, n_cells=32, n_cells_seq=32))
    machine.add(0, 10, 3, 3)
    shapes = []
    while (step := machine.step()) is not None:
        shapes.append((step.decode.tolist(), [(c.start, c.n, c.last) for c in step.chunks]))
    assert shapes == [
        ([], [(0, 8, False)]),
        ([], [(8, 2, True)]),
        ([0], []),
        ([0], []),
    ]
    assert machine.scheduler.counters.tokens == 3


def test_preempted_sequences_are_computed_again_and_go_first() -> None:
    machine = Machine(Limits(n_batch=64, n_ubatch=64, n_seq_max=4, n_cells=40, n_cells_seq=40))
    for id in range(4):
        machine.add(id, 8, 20, 20)
    preempted: list[int] = []
    while (step := machine.step()) is not None:
        preempted += [id for id, _ in step.preempted]
    assert preempted
    assert set(preempted) <= {1, 2, 3}  # the oldest is never preempted
    assert machine.done[0] == 0
    counters = machine.scheduler.counters
    assert counters.preemptions == len(preempted)
    assert counters.recomputed_rows > 0
    assert counters.tokens == 4 * 20


def test_a_recomputed_sequence_decodes_as_soon_as_one_token_is_left() -> None:
    machine = Machine(Limits(n_batch=7, n_ubatch=4, n_seq_max=2, n_cells=32, n_cells_seq=32))
    machine.add(0, 13, 7, 7)
    machine.add(1, 13, 3, 3)
    machine.run()
    assert machine.scheduler.counters.preemptions == 1
    assert machine.done == [0, 1]


def test_long_prompts_do_not_starve_among_short_ones() -> None:
    machine = Machine(Limits(n_batch=16, n_ubatch=16, n_seq_max=3, n_cells=64, n_cells_seq=64))
    machine.add(0, 4, 12, 12)
    machine.step()
    machine.add(1, 60, 2, 2)
    for id in range(2, 60):
        machine.add(id, 3, 4, 4)
    machine.run()
    assert machine.first_rows[:2] == [0, 1]
    assert machine.done.index(1) == 1


def test_after_a_shed_none_is_admitted_until_one_ends() -> None:
    machine = Machine(Limits(n_batch=16, n_ubatch=16, n_seq_max=4, n_cells=64, n_cells_seq=64))
    for id in range(3):
        machine.add(id, 4, 4, 4)
    machine.step()
    assert machine.scheduler.preempt_newest() == (2, 2)
    machine.leave(2)
    machine.add(3, 1, 1, 1)
    while not machine.done:
        step = machine.step()
        assert step is not None
        assert step.admitted == ()
    step = machine.step()
    assert step is not None
    assert [id for id, _ in step.admitted] == [2, 3]
    machine.run()
    assert sorted(machine.done) == [0, 1, 2, 3]


def test_shed_leaves_the_last_one() -> None:
    machine = Machine(Limits(n_batch=16, n_ubatch=16, n_seq_max=4, n_cells=64, n_cells_seq=64))
    assert machine.scheduler.preempt_newest() is None
    machine.add(0, 4, 4, 4)
    machine.step()
    assert machine.scheduler.preempt_newest() is None


def test_views_are_values() -> None:
    machine = Machine(Limits(n_batch=16, n_ubatch=16, n_seq_max=4, n_cells=64, n_cells_seq=64))
    machine.add(0, 4, 4, 4)
    machine.add(1, 3, 4, 4)
    machine.step()
    before = machine.scheduler.sequence(0)
    machine.step()
    after = machine.scheduler.sequence(0)
    assert (before.generated, after.generated) == (1, 2)
    assert machine.scheduler.sequence(0) is after  # made once, cached until it changes
    view = machine.scheduler.view(0.0)
    assert [view.running[0].id, view.running[-1].id] == [0, 1]
    assert [s.id for s in view.running[::-1]] == [s.id for s in reversed(view.running)] == [1, 0]
    with pytest.raises(AttributeError):
        after.generated = 5  # type: ignore[misc]
    with pytest.raises(KeyError):
        machine.scheduler.sequence(9)
    with pytest.raises(KeyError):
        machine.scheduler.remove(9)


def test_the_cost_model_is_asked_for_what_is_computed_at_once() -> None:
    """Of five in slots 0 to 4 some go: gaps are filled up to gap_max, else the batch is cut."""

    def shapes(unified: bool, gap_max: int, gone: list[int]) -> list[tuple[int, int, float, int]]:
        machine = Machine(Limits(64, 64, 8, 800, 100, unified=unified, gap_max=gap_max), fcfs())
        for id in range(5):
            machine.add(id, 3, 50, 50)
        machine.step()
        for id in gone:
            machine.remove(id)
        step = machine.scheduler.plan(0.0)
        assert step is not None
        return machine.scheduler.attention.shapes(step, 30.0)

    assert shapes(True, 0, [1]) == [(4, 0, 30.0, 4)]
    assert shapes(False, 1, []) == [(5, 0, 30.0, 5)]
    assert shapes(False, 1, [1]) == [(5, 0, 30.0, 5)]
    assert shapes(False, 0, [1]) == [(1, 0, 7.5, 1), (3, 0, 22.5, 3)]
    assert shapes(False, 1, [1, 3]) == [(5, 0, 30.0, 5)]
    assert shapes(False, 1, [1, 2]) == [(1, 0, 10.0, 1), (2, 0, 20.0, 2)]


def test_a_filled_part_is_not_taken_for_the_whole() -> None:
    """Slots 0, 2 and 5: three rows for the first two, and one more apart."""
    machine = Machine(Limits(64, 64, 8, 800, 100, unified=False, gap_max=1), fcfs())
    for id in range(6):
        machine.add(id, 3, 50, 50)
    machine.step()
    for id in (1, 3, 4):
        machine.remove(id)
    step = machine.scheduler.plan(0.0)
    assert step is not None
    assert step.decode.tolist() == [0, 2, 5]
    assert machine.scheduler.attention.shapes(step, 30.0) == [(3, 0, 20.0, 3), (1, 0, 10.0, 1)]
