"""Where sequences start: shared prefixes, saved states, and what becomes of the preempted, on a
machine that refuses what a memory would refuse."""

from dataclasses import replace
from typing import Any

import pytest

from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import Limits, Plan, StepView, make_policy
from tests.support.made_up_costs import Linear
from tests.support.scheduler_machine import Machine

UNIFIED = Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=4)
STATES = Sharing(copy_whole=True, n_cached=4)
LIMITS = Limits(n_batch=64, n_ubatch=32, n_seq_max=4, n_cells=400, n_cells_seq=400)
STREAMS = replace(LIMITS, n_cells=1600, unified=False)


def machine(sharing: Sharing = UNIFIED, limits: Limits = LIMITS, **options: Any) -> Machine:
    return Machine(limits, make_policy("sarathi"), sharing=sharing, **options)


def prompt_rows(machine: Machine) -> int:
    """Of sequences that are done: each token but its first has a row that decodes."""
    counters = machine.scheduler.counters
    return counters.rows - (counters.tokens - len(machine.done))


@pytest.mark.parametrize(
    ("sharing", "limits"),
    [
        (UNIFIED, LIMITS),
        (STATES, LIMITS),
        (Sharing(copy_whole=True, trim=True), STREAMS),
        (Sharing(copy_whole=True, n_cached=2), replace(STREAMS, n_cells=2400)),
    ],
)
def test_what_many_begin_with_is_computed_once(sharing: Sharing, limits: Limits) -> None:
    one = machine(sharing, limits)
    for id in range(8):
        one.add(id, 110, 5, alike=100)
    one.run()
    assert len(one.done) == 8
    assert prompt_rows(one) == 100 + 8 * 10
    counters = one.scheduler.counters
    assert (counters.known_tokens, counters.prefix_tokens) == (8 * 110, 7 * 100)


def test_samples_of_one_prompt_compute_it_once() -> None:
    one = machine(retain=False)
    for id in range(4):
        one.add(id, 100, 5, alike=100, space="group")
    one.add(4, 100, 5, alike=100)
    one.run()
    assert prompt_rows(one) == 100 + 3 + 100
    assert one.scheduler.accounting.used == 0


def test_the_next_turn_of_a_conversation_goes_on() -> None:
    one = machine()
    one.add(1, 40, 20)
    one.run()
    one.add(3, 110, 5, tokens=one.tokens[1])
    assert one.scheduler.sequence(3).prefix.hit == 59  # the last sampled one was never computed
    before = prompt_rows(one)
    one.run()
    assert prompt_rows(one) - before == 51


def test_one_waits_for_who_computes_the_same_but_not_for_others() -> None:
    one = machine()
    one.add(1, 200, 5, alike=195)
    one.step()
    one.add(2, 200, 5, alike=195)
    one.add(3, 30, 5)
    view = one.scheduler.sequence(2)
    assert (view.prefix.hit, view.prefix.pending) == (64, 195)
    for _ in range(3):
        one.step()
    assert one.scheduler.running_ids() == (1, 3)
    one.step()
    assert one.scheduler.running_ids() == (1, 3, 2)
    assert one.scheduler.sequence(2).prefix.hit == 195
    one.run()


def test_none_waits_for_who_has_left() -> None:
    one = machine()
    one.add(1, 200, 5, alike=150)
    one.step()
    one.add(2, 200, 5, alike=150)
    assert one.scheduler.sequence(2).prefix.pending == 150
    one.remove(1)
    assert one.next_step().admitted[0][0] == 2
    assert one.scheduler.sequence(2).prefix.hit == 64
    one.run()


class Eager:
    """All at once, whatever they could wait for."""

    def plan(self, view: StepView) -> Plan:
        running = [s for s in view.running if s.remaining]
        tokens = {s.id: 1 for s in [*running, *view.waiting]}
        return Plan(tokens)


def test_a_policy_may_start_them_all_the_same() -> None:
    one = Machine(LIMITS, Eager(), sharing=UNIFIED)
    one.add(1, 30, 2, alike=30)
    one.add(2, 30, 2, alike=30)
    for id in (1, 2):  # both in one plan: the second one waits
        assert [admitted for admitted, _ in one.next_step().admitted] == [id]
    one.run()
    assert prompt_rows(one) == 60


def test_cached_cells_never_make_a_sequence_wait() -> None:
    one = machine()
    for id in range(3):
        one.add(id, 100, 20)
        one.run()
    assert one.scheduler.accounting.cached > 300
    for id in range(3, 6):
        one.add(id, 120, 10)
    for _ in range(6):
        one.step()
    assert len(one.scheduler.running_ids()) == 3
    one.run()
    assert one.scheduler.counters.preemptions == 0


def test_what_a_preempted_one_held_is_used_again_while_it_is_there() -> None:
    one = machine(limits=replace(LIMITS, n_cells=160, n_cells_seq=160))
    one.add(1, 50, 60)
    one.add(2, 50, 60)
    one.run()
    counters = one.scheduler.counters
    assert counters.preemptions > 0
    assert counters.prefix_tokens > 0
    assert one.moved["trim"] > 0
    assert counters.recomputed_rows < counters.preemptions * 50


@pytest.mark.parametrize("sharing", [UNIFIED, Sharing()])
def test_a_swapped_one_goes_on_from_its_saved_state(sharing: Sharing) -> None:
    limits = replace(LIMITS, n_cells=128, n_cells_seq=128)
    one = machine(sharing, limits, swap="swap")
    one.add(1, 50, 60)
    one.add(2, 50, 60)
    one.run()
    counters = one.scheduler.counters
    assert one.moved["save"] == one.moved["load"] == counters.preemptions > 0
    assert counters.recomputed_rows == 0
    assert counters.loaded_tokens >= 50


def test_a_saved_state_is_discarded_with_its_sequence() -> None:
    one = machine(swap="swap")
    for id in (1, 2):
        one.add(id, 50, 60)
    for _ in range(4):
        one.step()
    one.preempt(2)
    assert 2 in one.memory.saved
    one.remove(2)
    assert one.moved["discard"] == 1
    assert one.memory.saved == {}
    one.run()


def test_a_sequence_may_come_with_a_saved_state() -> None:
    one = machine()
    one.memory.saved[1] = list(range(40))
    one.add(1, 50, 5, alike=50, saved=40)
    assert one.scheduler.sequence(1).prefix.hit == 40
    one.run()
    assert prompt_rows(one) == 10


@pytest.mark.parametrize(
    ("others", "at_once", "rows"),
    [(1, False, 10), (0, False, 50), (0, True, 10)],
    ids=["waits for a step", "is the only one", "copies are made at once"],
)
def test_no_state_is_loaded_where_a_copy_waits(others: int, at_once: bool, rows: int) -> None:
    """All slots but the one of what has ended are taken: it is cached, by a copy."""
    sharing = Sharing(copy_whole=True, trim=True, n_cached=1, at_once=at_once)
    one = machine(sharing, replace(STREAMS, n_seq_max=1 + others))
    for id in range(2, 2 + others):
        one.add(id, 20, 20)
    one.add(1, 30, 20, end=3)
    while 1 not in one.done:
        one.step()
    assert one.moved["copy"] == 1
    before = one.scheduler.counters.prefill_rows
    one.memory.saved[9] = list(range(40))
    one.add(9, 50, 5, alike=50, saved=40)
    one.run()
    assert one.scheduler.counters.prefill_rows - before == rows - 1
    assert one.moved["load"] == (rows == 10)


def test_nothing_is_cached_of_what_has_failed() -> None:
    one = machine()
    one.add(1, 50, 60)
    one.step()
    one.remove(1, worth=False)
    assert one.scheduler.accounting.used == 0


@pytest.mark.parametrize("cell_s", [0.0, 0.01])
def test_what_is_cached_in_a_pool_goes_when_it_has_cost_half_of_computing_it(cell_s: float) -> None:
    """A sequence that has nothing in common with it decodes beside it. Where cells cost nothing it
    stays until they are needed."""
    cost = Linear(row_s=1.0, cell_s=cell_s)
    one = machine(cost=cost)
    one.add(0, 50, 2, 2)
    one.run()
    one.add(1, 10, 300, 300)
    one.next_step()
    paid, n_ubatch = 0.0, LIMITS.n_ubatch
    while one.scheduler.accounting.cached and not one.done[1:]:
        if one.step() is None:
            break
        kv = one.scheduler.accounting.used
        paid += cell_s / (cost.predict(n_ubatch, n_ubatch, kv, 1) / n_ubatch)
    assert not cell_s or paid == pytest.approx(0.5, abs=0.05)
    assert (one.generated[1] == 300) == (not cell_s)
    one.run()
    assert one.scheduler.counters.preemptions == 0
