"""Prompts behind the rows that decode: where building a graph costs more than a step's wait."""

from dataclasses import replace

import pytest

from pyllamabatch.cost.step_cost import NewGraph
from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import ComposedPolicy, Invariance, KvOptions, Limits, Scheduler
from pyllamabatch.scheduler.policies.device_aware import Alternately
from tests.support.made_up_costs import Linear
from tests.support.scheduler_machine import STEP_SECONDS, Machine

STREAMS = Limits(64, 64, 8, 8 * 256, 256, unified=False)
NEVER = replace(STREAMS, behind=False)
POOL = Limits(64, 64, 8, 2048, 2048)


def steps_of(graph: float) -> Linear:
    return Linear(8e-3, new_graph=NewGraph(graph), unified=False)


def newcomer(graph: float, limits: Limits, n_others: int) -> list[tuple[int, int, bool]]:
    """Sequences decode; then one comes with a prompt of 10 tokens. Rows that decode, those of
    prompts, and whether these are behind: of its first two steps."""
    machine = Machine(limits, cost=steps_of(graph), sharing=Sharing(copy_whole=True, trim=True))
    for id in range(n_others):
        machine.add(id, 2, 40)
    for _ in range(4 if n_others else 0):
        machine.next_step()
    machine.add(9, 10, 40)
    steps = [machine.next_step() for _ in range(2)]
    return [(len(s.decode), s.n_rows - len(s.decode), s.behind) for s in steps]


@pytest.mark.parametrize(
    ("graph", "limits", "n_others", "steps"),
    [
        (3e-3, STREAMS, 4, [(4, 9, True), (5, 0, False)]),  # a wait of 2 ms for each
        (1e-3, STREAMS, 4, [(1, 9, False), (5, 0, False)]),
        (3e-3, POOL, 4, [(5, 9, False), (5, 0, False)]),
        (3e-3, NEVER, 4, [(1, 9, False), (5, 0, False)]),
        (9e-3, STREAMS, 0, [(1, 9, False), (1, 0, False)]),  # there are no others
    ],
)
def test_a_newcomer_waits_a_step_where_that_is_cheaper_than_a_graph(
    graph: float, limits: Limits, n_others: int, steps: list[tuple[int, int, bool]]
) -> None:
    assert newcomer(graph, limits, n_others) == steps


def test_a_long_prompt_is_behind_also_while_its_end_is_far() -> None:
    machine = Machine(STREAMS, cost=steps_of(3e-3), sharing=Sharing(copy_whole=True, trim=True))
    machine.add(0, 2, 40)
    machine.next_step()
    machine.add(9, 150, 40)
    steps = [machine.next_step() for _ in range(4)]
    # with one that decodes the last piece would wait longer than a graph takes
    assert [step.behind for step in steps] == [True, True, False, False]
    assert sum(step.n_rows - len(step.decode) for step in steps) == 149


def all_at_once(graph: float) -> Machine:
    """Its newcomers join in one step, unlike the default's."""
    policy = ComposedPolicy(mix=Alternately())
    sharing = Sharing(copy_whole=True, trim=True)
    return Machine(STREAMS, policy, cost=steps_of(graph), sharing=sharing)


@pytest.mark.parametrize(("n_new", "n_moved"), [(2, 1), (3, 0)])
def test_none_moves_away_for_newcomers_that_are_computed_apart(n_new: int, n_moved: int) -> None:
    """Four decode, one slot between each two. Prompts of three that end would make these wait
    longer than a graph takes: none is behind the rows that decode, and filled up."""
    machine = all_at_once(5e-3)
    for id in range(8):
        machine.add(id, 2, 40)
    machine.next_step()
    for id in range(0, 8, 2):
        machine.remove(id)
    for id in range(10, 10 + n_new):
        machine.add(id, id, 40)
    step = machine.next_step()
    assert len(step.admitted) == n_new
    assert (step.behind, len(step.moved)) == (n_new == 2, n_moved)
    assert step.n_fill == n_moved


def test_prompts_that_would_wait_longer_together_than_a_graph_takes_come_first() -> None:
    """Each alone would be computed behind the others."""
    machine = all_at_once(5e-3)
    for id in range(4):
        machine.add(id, 2, 40)
    for _ in range(4):
        machine.next_step()
    for id in range(5, 8):
        machine.add(id, 10, 40)
    steps = [machine.next_step() for _ in range(2)]
    assert [(len(s.decode), len(s.chunks), s.behind) for s in steps] == [
        (3, 3, False),
        (7, 0, False),
    ]


def test_nor_do_first_tokens_wait_where_rows_may_have_no_neighbours() -> None:
    kv = KvOptions(Sharing(trim=True, grid=64), invariance=Invariance.assumed(64, 8))
    scheduler = Scheduler(STREAMS, kv=kv, cost=steps_of(9e-3))
    for id in range(4):
        scheduler.add(id, 2, 40, arrival=0.0)
    for i in range(4):
        step = scheduler.plan(i * STEP_SECONDS)
        assert step is not None
        scheduler.advance(step, 1, (i + 1) * STEP_SECONDS)
    scheduler.add(9, 10, 40, arrival=4 * STEP_SECONDS)
    step = scheduler.plan(4 * STEP_SECONDS)
    assert step is not None
    assert (len(step.decode), len(step.chunks)) == (1, 1)
