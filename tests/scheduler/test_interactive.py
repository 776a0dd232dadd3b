"""Interactive sequences among the others: what is computed when, and which of them a step waits
for. No model, no clock."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.errors import PlanError, RequestTooLong
from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import (
    ComposedPolicy,
    Limits,
    Plan,
    Scheduler,
    StepView,
    Window,
    prefill_first,
    static,
)
from pyllamabatch.scheduler.deadlines import Deadlines
from tests.support.scheduler_machine import Machine

LIMITS = Limits(n_batch=32, n_ubatch=8, n_seq_max=4, n_cells=256, n_cells_seq=256)
WINDOW = 0.2
UNIFIED = Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=4)


def owners(*prompts: int, patience: float = 5.0) -> Machine:
    """Sequences 1, 2, ... with prompts of so many tokens, all but the last of each computed."""
    machine = Machine(LIMITS, gather=Window(WINDOW), patience=patience)
    for id, n in enumerate(prompts, 1):
        machine.add_interactive(id, n)
    machine.run()
    return machine


def cells(machine: Machine) -> dict[int, int]:
    return {id: machine.memory.held(slot) for slot, id in machine.owner.items()}


def test_all_of_a_prompt_but_its_last_token_is_computed_until_a_token_is_asked_for() -> None:
    machine = owners(10)
    assert (cells(machine), machine.generated) == ({1: 9}, {1: 0})
    machine.scheduler.interactive.ask(1)
    machine.run()
    assert (cells(machine), machine.generated, len(machine.tokens[1])) == ({1: 10}, {1: 1}, 11)
    machine.scheduler.interactive.ask(1)
    assert machine.scheduler.view(0.0).decoding == {1}
    machine.run()
    assert (cells(machine), machine.generated) == ({1: 11}, {1: 2})
    machine.extend(1, 40)
    machine.run()
    assert (cells(machine), machine.generated) == ({1: 51}, {1: 2})


def test_it_arrives_anew_when_its_owner_asks() -> None:
    """Else one that was opened long ago would go before all others for ever."""
    machine = owners(10)
    interactive = machine.scheduler.interactive
    interactive.ask(1, 100.0)
    assert machine.scheduler.sequence(1).arrival == 100.0
    machine.run()
    interactive.extend(1, 0, 200.0)
    assert machine.scheduler.sequence(1).arrival == 200.0


def test_a_prompt_of_one_token_has_nothing_to_compute_at_first() -> None:
    machine = owners(1)
    assert machine.scheduler.idle
    assert machine.scheduler.plan(0.0) is None
    machine.scheduler.interactive.ask(1)
    machine.run()
    assert (cells(machine), machine.generated) == ({1: 1}, {1: 1})


def test_a_step_waits_for_those_who_were_there_until_the_window_ends() -> None:
    machine = owners()
    scheduler = machine.scheduler
    for id in (1, 2, 3):
        machine.add_interactive(id, 2)
    assert scheduler.hold(0.0) == 0  # none has been here before
    machine.run()
    scheduler.interactive.ask(1)
    assert scheduler.hold(10.0) == pytest.approx(WINDOW)
    scheduler.interactive.ask(2)
    assert scheduler.hold(10.15) == pytest.approx(WINDOW - 0.15)
    scheduler.interactive.ask(3)
    assert scheduler.hold(10.16) == 0
    machine.run()
    assert scheduler.counters.fill[3] == 1
    scheduler.interactive.ask(1)
    scheduler.interactive.ask(2)
    assert scheduler.hold(20.0) > 0
    assert scheduler.hold(20.0 + WINDOW) == 0  # 3 does not come
    machine.run()
    scheduler.interactive.ask(2)
    assert scheduler.hold(30.0) > 0
    scheduler.interactive.ask(1)
    assert scheduler.hold(30.0) == 0  # and is not waited for until it does


def test_who_is_alone_or_gone_is_not_waited_for() -> None:
    machine = owners(2)
    scheduler = machine.scheduler
    scheduler.interactive.ask(1)
    assert scheduler.hold(1.0) == 0
    machine.add_interactive(2, 3)
    machine.run()
    scheduler.interactive.ask(1)
    assert scheduler.hold(2.0) > 0
    machine.remove(2)
    assert scheduler.hold(2.0) == 0


def test_requests_run_for_many_steps_while_others_are_idle() -> None:
    machine = owners(5)
    machine.add(2, 5, 50)
    machine.step()
    assert machine.plan().repeat > 1
    machine.scheduler.interactive.ask(1)
    both = machine.plan()
    assert (both.n_rows, both.repeat) == (2, 1)


def test_trimmed_tokens_give_their_cells_back_and_the_last_is_computed_again() -> None:
    machine = owners(20)
    machine.trim(1, 8)
    machine.check()
    assert cells(machine) == {1: 7}
    machine.scheduler.interactive.ask(1)
    machine.run()
    assert (cells(machine), len(machine.tokens[1])) == ({1: 8}, 9)
    with pytest.raises(ValueError, match="0 tokens are to stay of 9"):
        machine.scheduler.interactive.trim(1, 0)


def half_computed() -> Machine:
    """Sequence 1 knows 60 tokens, as all may, and has computed 32 of them."""
    machine = Machine(LIMITS, sharing=UNIFIED)
    machine.add_interactive(1, 60, alike=60)
    machine.next_step()
    assert cells(machine) == {1: 32}
    return machine


@pytest.mark.parametrize(("left", "hit"), [(40, 32), (33, 32), (20, 19)])
def test_none_starts_from_tokens_that_were_trimmed_before_they_were_computed(
    left: int, hit: int
) -> None:
    """Others are computed in their place."""
    machine = half_computed()
    machine.trim(1, left)
    machine.extend(1, 40)
    machine.run()
    machine.add(2, 60, alike=60)
    assert machine.scheduler.sequence(2).prefix.hit == hit
    machine.run()
    assert machine.done == [2]


@pytest.mark.parametrize("left", [60, 50])
def test_none_waits_for_tokens_that_are_not_computed_any_more(left: int) -> None:
    """As where the owner's call is cancelled: what was to be computed is not."""
    machine = half_computed()
    machine.add(2, 60, alike=60)
    assert machine.scheduler.sequence(2).prefix.pending == 59
    machine.trim(1, left)
    assert machine.next_step().chunks[0].start == 32


def test_one_whose_tokens_are_not_known_is_trimmed_too() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(1, 20, 1, arrival=0.0, interactive=True)
    step = scheduler.plan(0.0)
    assert step is not None
    scheduler.advance(step)
    assert scheduler.interactive.trim(1, 8) == scheduler.accounting.used == 7


def test_a_sequence_that_can_not_grow_any_more_says_so_and_stays() -> None:
    machine = owners(250)
    with pytest.raises(RequestTooLong):
        machine.scheduler.interactive.extend(1, 7)
    machine.extend(1, 6)
    machine.scheduler.interactive.ask(1)
    machine.run()
    assert len(machine.tokens[1]) == 257
    with pytest.raises(RequestTooLong):
        machine.scheduler.interactive.ask(1)
    machine.check()


def test_which_is_idle_too_long_is_preempted_and_comes_back() -> None:
    machine = owners(10, 10, 10, 10)
    scheduler = machine.scheduler
    machine.add_interactive(5, 10)
    assert scheduler.plan(machine.now) is None  # no slot
    assert 0 < scheduler.hold(machine.now) < 5
    assert [id for id, _ in machine.next_step().preempted] == [1]
    assert [id for id, _ in machine.next_step().admitted] == [5]
    machine.run()
    assert scheduler.idle  # 1 wants nothing
    machine.remove(2)
    scheduler.interactive.ask(1)
    machine.run()
    assert machine.generated[1] == 1
    assert scheduler.counters.recomputed_rows == 9


def test_a_bad_plan_changes_nothing_where_one_is_idle_too_long() -> None:
    """What is idle too long is preempted by a step of its own, and that is told."""

    class Forgets:
        def plan(self, view: StepView) -> Plan:
            return Plan() if len(view.running) == 1 else Plan({9: 1})

    machine = Machine(replace(LIMITS, n_seq_max=1), patience=0.1)
    machine.add_interactive(1, 10)
    machine.run()
    machine.add(2, 10, 5)
    machine.scheduler.policy = Forgets()
    step = machine.next_step()
    assert (step.preempted, step.n_rows) == (((1, 0),), 0)
    with pytest.raises(PlanError, match="known-sequence"):
        machine.step()
    machine.check()


@pytest.mark.parametrize("policy", [prefill_first(), static()])
def test_first_tokens_where_no_cell_is_left(policy: ComposedPolicy) -> None:
    """Prompts go first, and the first of them takes the cells of the other one."""
    machine = Machine(replace(LIMITS, n_cells=19, n_cells_seq=19), policy)
    for id, n in ((1, 8), (2, 10)):
        machine.add_interactive(id, n)
    machine.run()
    machine.extend(1, 3)
    machine.run()
    assert machine.scheduler.view(0.0).kv.free == 0
    for id in (1, 2):
        machine.scheduler.interactive.ask(id)
    assert machine.next_step().preempted == ((2, 1),)
    machine.remove(1)
    machine.run()
    assert machine.generated == {1: 1, 2: 1}


def test_requests_are_not_interactive() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.add(1, 5, 5, arrival=0.0)
    with pytest.raises(ValueError, match="is not interactive"):
        scheduler.interactive.ask(1)


def test_a_view_made_up_knows_which_is_idle() -> None:
    machine = owners(5, 5)
    machine.scheduler.interactive.ask(1)
    real = machine.scheduler.view(0.0)
    made = StepView.of(LIMITS, real.running)
    assert made.decoding == real.decoding == {1}
    assert list(made.prefilling) == list(real.prefilling) == []


def swapped() -> Machine:
    """With one interactive sequence, of whose 40 tokens 39 are saved."""
    machine = Machine(LIMITS, sharing=UNIFIED, swap="swap")
    machine.add_interactive(1, 40)
    machine.run()
    machine.preempt(1)
    assert len(machine.memory.saved[1]) == 39
    return machine


@pytest.mark.parametrize(("left", "loads"), [(45, 1), (20, 0)])
def test_one_that_is_swapped_and_trimmed(left: int, loads: int) -> None:
    """What comes behind the cut may be other tokens than those in the saved state."""
    machine = swapped()
    machine.extend(1, 10)
    machine.trim(1, left)
    machine.extend(1, 30)
    step = machine.plan()
    machine.carry_out(step.kv_operations)
    assert (machine.moved["load"], machine.moved["discard"]) == (loads, 1 - loads)
    assert step.chunks[0].start == 39 * loads


def test_it_is_asked_when_less_is_left_than_it_had_begun_with() -> None:
    """It waited, would have begun with 39 tokens, and was trimmed to 5: all of them are to do."""
    machine = swapped()
    machine.extend(1, 10)
    assert machine.scheduler.sequence(1).prefix.hit == 39
    machine.trim(1, 5)
    machine.scheduler.interactive.ask(1)
    assert machine.scheduler.sequence(1).remaining == 5
    step = machine.plan()
    assert [(chunk.start, chunk.n) for chunk in step.chunks] == [(0, 4)]
    assert len(step.decode) == 1


def test_one_that_has_lost_what_it_began_with_computes_it() -> None:
    machine = swapped()
    scheduler = machine.scheduler
    scheduler.interactive.ask(1)
    machine.plan()
    assert scheduler.sequence(1).prefix.hit == 39
    scheduler.preempt(1, worth=False)
    scheduler.interactive.extend(1, 0)
    assert scheduler.sequence(1).remaining == 39


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
    st.sampled_from(["add", "extend", "ask", "trim", "remove", "step", "wait"]),
    st.integers(0, 5),
    st.integers(1, 60),
)


@given(
    st.lists(ACTIONS, max_size=60),
    st.booleans(),
    st.sampled_from([Sharing(), UNIFIED, Sharing(copy_whole=True, n_cached=2)]),
    st.sampled_from(["recompute", "swap"]),
)
@settings(max_examples=200)
def test_cells_and_counters_agree_whatever_the_owners_do(
    actions: list[tuple[str, int, int]], unified: bool, sharing: Sharing, swap: str
) -> None:
    limits = Limits(32, 8, 3, 96, 96)
    if not unified:
        limits = Limits(32, 8, 3, 96, 32, unified=False)
        sharing = replace(sharing, copy_part=False)
    machine = Machine(limits, sharing=sharing, swap=swap, gather=Window(WINDOW), patience=0.3)
    scheduler, tokens = machine.scheduler, machine.tokens
    left: list[int] = []
    for what, which, n in actions:
        id = left[which % len(left)] if left else 0
        try:
            if what == "add":
                machine.add_interactive(len(tokens) + 1, n, alike=n // 2)
                left.append(len(tokens))
            elif what == "step":
                machine.step()
            elif what == "wait":
                machine.now += scheduler.hold(machine.now)
            elif not id:
                continue
            elif what == "extend":
                machine.extend(id, n)
            elif what == "trim":
                machine.trim(id, min(n, len(tokens[id])))
            elif what == "remove":
                machine.remove(id)
                left.remove(id)
            else:
                scheduler.interactive.ask(id)
        except RequestTooLong:
            assert n + len(tokens.get(id, ())) > limits.n_cells_seq
        machine.check()
    for id in left:
        if len(tokens[id]) <= limits.n_cells_seq:
            before = machine.generated[id]
            scheduler.interactive.ask(id)
            machine.run()
            assert machine.generated[id] == before + 1


def test_it_is_computed_when_it_is_preempted_with_less_than_it_had_begun_with() -> None:
    """It runs, has begun with 39 tokens, is trimmed to 20 and asked, and gives its slot up."""
    machine = swapped()
    machine.extend(1, 10)
    machine.run()
    assert machine.scheduler.sequence(1).prefix.hit == 39
    machine.trim(1, 20)
    machine.scheduler.interactive.ask(1)
    machine.preempt(1)
    assert machine.scheduler.n_waiting == 1
    machine.run()
    assert (cells(machine), machine.generated, len(machine.tokens[1])) == ({1: 20}, {1: 1}, 21)
