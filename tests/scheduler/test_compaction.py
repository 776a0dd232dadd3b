"""Sequences in high slots go on in empty low ones, once the gaps between them have cost as much."""

from dataclasses import replace

import numpy as np
import pytest

from pyllamabatch.cost.step_cost import NewGraph, StepCost
from pyllamabatch.kv import Sharing, SwapChoice
from pyllamabatch.scheduler import Limits
from pyllamabatch.scheduler.drafting import Drafted
from tests.support.made_up_costs import Linear
from tests.support.scheduler_machine import Machine

STREAMS = Limits(64, 64, 8, n_cells=8 * 256, n_cells_seq=256, unified=False)
POOL = Limits(64, 64, 8, n_cells=2048, n_cells_seq=2048)
COPIES = Sharing(copy_whole=True, trim=True)
ENDS = {0: 10, 3: 10}  # the first to end; the others later


def parts(graph: float = 0.0) -> Linear:
    """10 ms for each part of a step, and 1 ms a row; so much for a graph."""
    return Linear(10e-3, 1e-3, new_graph=NewGraph(graph), unified=False)


def machine_of(
    *,
    limits: Limits = STREAMS,
    sharing: Sharing = COPIES,
    stream_seconds: float = 15e-3,
    cost: StepCost | None = None,
) -> Machine:
    swap = SwapChoice("recompute", stream_seconds=stream_seconds)
    machine = Machine(limits, cost=cost or parts(), sharing=sharing, retain=False, swap=swap)
    for id in range(8):
        machine.add(id, 4, 60, end=ENDS.get(id, 50))
    while len(machine.done) < len(ENDS):
        machine.next_step()
    return machine


def moves_of(machine: Machine) -> dict[int, list[tuple[int, int, int]]]:
    """To the end: by the number of the step."""
    found = {i: list(step.moved) for i, step in enumerate(machine.steps()) if step.moved}
    assert set(machine.done) == set(machine.tokens)
    return found


def test_gaps_are_closed_when_they_have_cost_as_much() -> None:
    # Slots 1, 2 and 4 to 7: two parts, 10 ms more than one. Two copies of 15 ms: three steps.
    assert moves_of(machine_of()) == {3: [(7, 7, 0), (6, 6, 3)]}
    # With a graph's price there are eight rows instead, 2 ms more than six, and two graphs to pay.
    assert moves_of(machine_of(cost=parts(graph=5e-3))) == {20: [(7, 7, 0), (6, 6, 3)]}


def test_the_one_that_moved_knows_all_and_goes_on() -> None:
    machine = machine_of()
    before = {id: list(tokens) for id, tokens in machine.tokens.items()}
    for _ in range(4):
        step = machine.next_step()
    assert step.decode.tolist() == [0, 1, 2, 3, 4, 5]
    assert {id: machine.scheduler.slot(id) for id in (6, 7)} == {6: 3, 7: 0}
    assert machine.scheduler.counters.preemptions == 0
    for id in (6, 7):
        assert machine.tokens[id][: len(before[id])] == before[id]
        assert machine.scheduler.sequence(id).generated == machine.generated[id]


def test_one_that_holds_nothing_moves_as_well() -> None:
    """An interactive sequence of which one token is left: it is computed when it is asked."""
    swap = SwapChoice("recompute", stream_seconds=15e-3)
    machine = Machine(STREAMS, cost=parts(), sharing=COPIES, retain=False, swap=swap)
    for id in range(7):
        machine.add(id, 4, 60, end=ENDS.get(id, 50))
    machine.next_step()
    machine.add_interactive(7, 3)
    machine.next_step()
    machine.trim(7, 1)
    slot = machine.scheduler.slot(7)
    assert slot is not None
    assert (slot, machine.scheduler.accounting.held(slot)) == (7, 0)
    moved = next(step.moved for step in machine.steps() if step.moved)
    assert moved == ((7, 7, 0), (6, 6, 3))
    machine.scheduler.interactive.ask(7)
    machine.run()
    assert machine.generated[7] == 1


def test_what_is_known_of_its_drafts_goes_with_it() -> None:
    machine = machine_of(limits=replace(STREAMS, n_draft_max=2))
    drafting, running = machine.scheduler.drafting, machine.scheduler.sequences.running
    assert drafting is not None
    slots, shares = running.decode_slots, np.arange(16.0).reshape(8, 2)
    drafted = Drafted(slots, 6, 0, 0, shares, shares / 2, 0.1, np.zeros(9, int), np.zeros(9))
    drafting.observe(slots, running.owner[slots], drafted, 5, 0.0, None)
    while not machine.next_step().moved:
        pass
    seen = machine.scheduler.view(machine.now).drafts
    assert seen is not None
    drafts = seen()
    assert drafts.ids == [7, 1, 2, 6, 4, 5]
    assert drafts.n_seen.tolist() == [5] * 6
    assert np.array_equal(drafts.found, shares[drafts.ids])
    assert np.array_equal(drafts.right, shares[drafts.ids] / 2)


def test_a_copy_that_costs_more_than_is_left_is_not_made() -> None:
    assert moves_of(machine_of(stream_seconds=10.0)) == {}


def test_what_comes_takes_the_empty_slots() -> None:
    machine = machine_of()
    for id in (8, 9):
        machine.add(id, 4, 60, end=50)
    assert machine.next_step().admitted == ((8, 0), (9, 3))
    for _ in range(30):
        assert not machine.next_step().moved


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param(lambda: machine_of(limits=POOL), id="a pool"),
        pytest.param(lambda: machine_of(sharing=Sharing(trim=True)), id="no copies"),
        pytest.param(
            lambda: machine_of(cost=Linear(row_s=1e-3, unified=False)), id="gaps cost nothing"
        ),
    ],
)
def test_where_it_gains_nothing_none_moves(machine: object) -> None:
    assert callable(machine)
    assert moves_of(machine()) == {}


def test_an_idle_interactive_sequence_stays_where_it_is_until_it_is_high() -> None:
    machine = machine_of(stream_seconds=1e-3)
    machine.add_interactive(20, 5)
    slots = [machine.next_step() and machine.scheduler.slot(20) for _ in range(20)]
    assert set(slots) == {0}
    assert machine.held[0] == machine.tokens[20][:4]
