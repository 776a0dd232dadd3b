"""The scheduler alone, driven through whole lives of sequences by a plain-Python executor."""

import pytest

from pyllamabatch.scheduler import Limits, fcfs
from tests.support.scheduler_machine import Machine

SMALL = Limits(n_batch=16, n_ubatch=16, n_seq_max=4, n_cells=64, n_cells_seq=64)


def machine_of(n: int, n_prompt: int, max_tokens: int, limits: Limits = SMALL) -> Machine:
    machine = Machine(limits)
    for id in range(n):
        machine.add(id, n_prompt, max_tokens)
    return machine


def test_a_plan_stands_until_a_budget_or_the_cells_end() -> None:
    machine = Machine(Limits(n_batch=64, n_ubatch=64, n_seq_max=3, n_cells=64, n_cells_seq=64))
    scheduler = machine.scheduler
    machine.add(0, 10, 9)
    machine.add(1, 10, 30)
    assert machine.next_step().repeat == 1  # prompts
    step = machine.plan()
    assert step.repeat == 8
    for n in (0, 9, -1):
        with pytest.raises(ValueError, match="1 to 8 times"):
            scheduler.advance(step, n)
    scheduler.advance(step, 3)
    assert [s.generated for s in scheduler.view(0.0).running] == [4, 4]
    assert scheduler.accounting.used == 26
    counters = scheduler.counters
    assert (counters.steps, counters.rows, counters.decode_rows, counters.tokens) == (4, 26, 8, 8)
    scheduler.remove(0)
    assert machine.plan().repeat == 26
    scheduler.add(2, 60, 5, arrival=0.0)  # has a slot, but no cells: the plan still stands
    step = machine.plan()
    assert (step.admitted, step.repeat) == ((), 26)
    scheduler.add(3, 10, 40, arrival=0.0)
    scheduler.remove(2)
    step = machine.plan()
    assert ([id for id, _ in step.admitted], step.repeat) == ([3], 1)
    scheduler.advance(step)
    assert machine.plan().repeat == (64 - 13 - 11) // 2  # cells


def test_a_lone_request_step_by_step() -> None:
    machine = machine_of(1, 10, 3, Limits(8, 4, 2, n_cells=32, n_cells_seq=32))
    shapes = [
        (step.decode.tolist(), [(c.start, c.n) for c in step.chunks]) for step in machine.steps()
    ]
    assert shapes == [([], [(0, 8)]), ([0], [(8, 1)]), ([0], []), ([0], [])]
    assert machine.scheduler.counters.tokens == 3


def test_preempted_sequences_are_computed_again_and_go_first() -> None:
    machine = machine_of(4, 8, 20, Limits(64, 64, 4, n_cells=40, n_cells_seq=40))
    preempted = [id for step in machine.steps() for id, _ in step.preempted]
    assert preempted
    assert set(preempted) <= {1, 2, 3}  # the oldest is never preempted
    assert machine.done[0] == 0
    counters = machine.scheduler.counters
    assert counters.preemptions == len(preempted)
    assert counters.recomputed_rows > 0
    assert counters.tokens == 4 * 20


def test_a_recomputed_sequence_decodes_as_soon_as_one_token_is_left() -> None:
    machine = Machine(Limits(n_batch=7, n_ubatch=4, n_seq_max=2, n_cells=32, n_cells_seq=32))
    machine.add(0, 13, 7)
    machine.add(1, 13, 3)
    machine.run()
    assert machine.scheduler.counters.preemptions == 1
    assert machine.done == [0, 1]


@pytest.mark.parametrize("policy", [None, fcfs()])
def test_long_prompts_do_not_starve_among_short_ones(policy: object) -> None:
    machine = Machine(Limits(16, 16, 3, n_cells=64, n_cells_seq=64), policy)  # type: ignore[arg-type]
    machine.add(0, 4, 12)
    machine.step()
    machine.add(1, 60, 2)
    for id in range(2, 60):
        machine.add(id, 3, 4)
    machine.run()
    assert machine.first_rows == list(range(60))
    assert machine.done.index(1) == 1


def test_after_a_shed_none_is_admitted_until_one_ends() -> None:
    machine = machine_of(3, 4, 4)
    machine.step()
    assert machine.scheduler.preempt_newest() == (2, 2)
    machine.leave(2)
    machine.add(3, 1, 1)
    while not machine.done:
        assert machine.next_step().admitted == ()
    assert [id for id, _ in machine.next_step().admitted] == [2, 3]
    machine.run()
    assert sorted(machine.done) == [0, 1, 2, 3]


def test_shed_leaves_the_last_one() -> None:
    machine = machine_of(0, 0, 0)
    assert machine.scheduler.preempt_newest() is None
    machine.add(0, 4, 4)
    machine.step()
    assert machine.scheduler.preempt_newest() is None


def test_views_are_values() -> None:
    machine = machine_of(2, 4, 4)
    scheduler = machine.scheduler
    machine.step()
    before = scheduler.sequence(0)
    machine.step()
    after = scheduler.sequence(0)
    assert (before.generated, after.generated) == (1, 2)
    assert scheduler.sequence(0) is after  # made once, cached until it changes
    running = scheduler.view(0.0).running
    assert [running[0].id, running[-1].id] == [0, 1]
    assert [s.id for s in running[::-1]] == [s.id for s in reversed(running)] == [1, 0]
    with pytest.raises(AttributeError):
        after.generated = 5  # type: ignore[misc]
    for unknown in (scheduler.sequence, scheduler.remove):
        with pytest.raises(KeyError):
            unknown(9)


@pytest.mark.parametrize(
    ("unified", "gap_max", "left", "shapes"),
    [
        (True, 0, [0, 2, 3, 4], [(4, 0, 30.0, 4)]),
        (False, 1, [0, 1, 2, 3, 4], [(5, 0, 30.0, 5)]),
        (False, 1, [0, 2, 3, 4], [(5, 0, 30.0, 5)]),
        (False, 0, [0, 2, 3, 4], [(1, 0, 7.5, 1), (3, 0, 22.5, 3)]),
        (False, 1, [0, 2, 4], [(5, 0, 30.0, 5)]),
        (False, 1, [0, 3, 4], [(1, 0, 10.0, 1), (2, 0, 20.0, 2)]),
        (False, 1, [0, 2, 5], [(3, 0, 20.0, 3), (1, 0, 10.0, 1)]),  # not taken for the whole
    ],
)
def test_the_cost_model_is_asked_for_what_is_computed_at_once(
    unified: bool, gap_max: int, left: list[int], shapes: list[tuple[int, int, float, int]]
) -> None:
    """Of those in slots 0 to 5 some go: gaps are filled up to gap_max, else the batch is cut."""
    machine = machine_of(6, 3, 50, Limits(64, 64, 8, 800, 100, unified=unified, gap_max=gap_max))
    machine.step()
    for id in {*range(6)} - {*left}:
        machine.remove(id)
    step = machine.plan()
    assert step.decode.tolist() == left
    assert machine.scheduler.attention.shapes(step, 30.0) == shapes
