"""Where sequences start: shared prefixes, saved states, and what becomes of the preempted, on a
machine that refuses what a memory would refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.kv import Sharing, SwapChoice
from pyllamabatch.scheduler import Limits, Plan, StepView, make_policy
from tests.support.scheduler_machine import Known, Machine

UNIFIED = Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=4)
STATES = Sharing(copy_whole=True, n_cached=4)
LIMITS = Limits(n_batch=64, n_ubatch=32, n_seq_max=4, n_cells=400, n_cells_seq=400)
STREAMS = replace(LIMITS, n_cells=1600, unified=False)


def machine(sharing: Sharing = UNIFIED, limits: Limits = LIMITS, **options: Any) -> Machine:
    return Machine(limits, make_policy("sarathi"), sharing=sharing, **options)


def prefill_rows(machine: Machine) -> int:
    return machine.scheduler.counters.prefill_rows


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
        one.add(id, 110, 5, 5, alike=100)
    one.run()
    assert len(one.done) == 8
    assert prefill_rows(one) == 100 + 8 * 10
    counters = one.scheduler.counters
    assert (counters.known_tokens, counters.prefix_tokens) == (8 * 110, 7 * 100)


def test_samples_of_one_prompt_compute_it_once() -> None:
    one = machine(retain=False)
    for id in range(4):
        one.add(id, 100, 5, 5, alike=100, space="group")
    one.add(4, 100, 5, 5, alike=100)
    one.run()
    assert prefill_rows(one) == 100 + 3 + 100
    assert one.scheduler.accounting.used == 0


def test_the_next_turn_of_a_conversation_goes_on() -> None:
    one = machine()
    one.add(1, 40, 20, 20)
    one.run()
    history = one.tokens[1]
    one.add(2, 90, 5, 5)
    one.scheduler.remove(2)
    one.tokens[3] = [*history, *range(50)]
    one.prompts[3], one.generated[3], one.ends[3] = 110, 0, 5
    one.scheduler.add(3, 110, 5, arrival=0.0, tokens=Known(one.tokens, 3))
    assert one.scheduler.sequence(3).prefix.hit == 59  # the last sampled one was never computed
    before = prefill_rows(one)
    one.run()
    assert prefill_rows(one) - before == 51


def test_one_waits_for_who_computes_the_same_but_not_for_others() -> None:
    one = machine()
    one.add(1, 200, 5, 5, alike=195)
    one.step()
    one.add(2, 200, 5, 5, alike=195)
    one.add(3, 30, 5, 5)
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
    one.add(1, 200, 5, 5, alike=150)
    one.step()
    one.add(2, 200, 5, 5, alike=150)
    assert one.scheduler.sequence(2).prefix.pending == 150
    one.remove(1)
    step = one.step()
    assert step is not None
    assert step.admitted[0][0] == 2
    assert one.scheduler.sequence(2).prefix.hit == 64
    one.run()


class Eager:
    """All at once, whatever they could wait for."""

    def plan(self, view: StepView) -> Plan:
        running = [s for s in view.running if s.remaining]
        tokens = {s.id: 1 for s in [*running, *view.waiting]}
        return Plan(tokens)


def test_a_policy_may_start_them_all_the_same() -> None:
    one = machine()
    one.scheduler.policy = Eager()
    one.add(1, 30, 2, 2, alike=30)
    one.add(2, 30, 2, 2, alike=30)
    step = one.step()
    assert step is not None
    assert [id for id, _ in step.admitted] == [1]  # both in one plan: the second one waits
    step = one.step()
    assert step is not None
    assert [id for id, _ in step.admitted] == [2]
    one.run()
    assert prefill_rows(one) == 60


def test_cached_cells_never_make_a_sequence_wait() -> None:
    one = machine()
    for id in range(3):
        one.add(id, 100, 20, 20)
        one.run()
    assert one.scheduler.accounting.cached > 300
    for id in range(3, 6):
        one.add(id, 120, 10, 10)
    for _ in range(6):
        one.step()
    assert len(one.scheduler.running_ids()) == 3
    one.run()
    assert one.scheduler.counters.preemptions == 0


def test_what_a_preempted_one_held_is_used_again_while_it_is_there() -> None:
    one = machine(limits=replace(LIMITS, n_cells=160, n_cells_seq=160))
    one.add(1, 50, 60, 60)
    one.add(2, 50, 60, 60)
    one.run()
    counters = one.scheduler.counters
    assert counters.preemptions > 0
    assert counters.prefix_tokens > 0
    assert one.moved["trim"] > 0
    assert counters.recomputed_rows < counters.preemptions * 50


@pytest.mark.parametrize("sharing", [UNIFIED, Sharing()])
def test_a_swapped_one_goes_on_from_its_saved_state(sharing: Sharing) -> None:
    limits = replace(LIMITS, n_cells=128, n_cells_seq=128)
    one = machine(sharing, limits, swap=SwapChoice("swap"))
    one.add(1, 50, 60, 60)
    one.add(2, 50, 60, 60)
    one.run()
    counters = one.scheduler.counters
    assert one.moved["save"] == one.moved["load"] == counters.preemptions > 0
    assert counters.recomputed_rows == 0
    assert counters.loaded_tokens >= 50


def test_a_saved_state_is_discarded_with_its_sequence() -> None:
    one = machine(swap=SwapChoice("swap"))
    for id in (1, 2):
        one.add(id, 50, 60, 60)
    for _ in range(4):
        one.step()
    slot = one.scheduler.preempt(2)
    one.leave(slot)
    assert 2 in one.saved
    one.remove(2)
    assert one.moved["discard"] == 1
    assert one.saved == {}
    one.run()


def swapped_interactive() -> Machine:
    """With one interactive sequence, of whose 40 tokens 39 are saved."""
    one = machine(swap=SwapChoice("swap"))
    one.tokens[1] = list(range(40))
    tokens = Known(one.tokens, 1)
    one.scheduler.add(1, 40, 1, arrival=0.0, interactive=True, tokens=tokens)
    step = one.scheduler.plan(0.0)
    assert step is not None
    one.place(step)
    one.scheduler.advance(step)
    one.cells[0] = [(token, object()) for token in range(39)]
    one.leave(one.scheduler.preempt(1))
    assert len(one.saved[1]) == 39
    return one


@pytest.mark.parametrize(("left", "loads"), [(45, 1), (20, 0)])
def test_an_interactive_one_that_is_swapped_and_trimmed(left: int, loads: int) -> None:
    """What comes behind the cut may be other tokens than those in the saved state."""
    one = swapped_interactive()
    one.tokens[1] += range(500, 510)
    one.scheduler.extend(1, 10)
    del one.tokens[1][left:]
    one.scheduler.trim(1, left)
    one.tokens[1] += range(900, 930)
    one.scheduler.extend(1, 30)
    step = one.scheduler.plan(0.0)
    assert step is not None
    one.carry_out(step.kv_operations)
    assert one.moved["load"] == loads
    assert one.moved["discard"] == 1 - loads
    assert step.chunks[0].start == 39 * loads


def test_an_interactive_one_is_asked_when_less_is_left_than_it_had_begun_with() -> None:
    """It waited, would have begun with 39 tokens, and was trimmed to 5: all of them are to do."""
    one = swapped_interactive()
    one.tokens[1] += range(500, 510)
    one.scheduler.extend(1, 10)
    assert one.scheduler.sequence(1).prefix.hit == 39
    del one.tokens[1][5:]
    one.scheduler.trim(1, 5)
    one.scheduler.ask(1)
    assert one.scheduler.sequence(1).remaining == 5
    step = one.scheduler.plan(0.0)
    assert step is not None
    assert [(chunk.start, chunk.n, chunk.last) for chunk in step.chunks] == [(0, 5, True)]


def test_an_interactive_one_that_has_lost_what_it_began_with_computes_it() -> None:
    one = swapped_interactive()
    one.scheduler.ask(1)
    assert one.scheduler.plan(0.0) is not None
    assert one.scheduler.sequence(1).prefix.hit == 39
    one.scheduler.relax(1)
    one.scheduler.preempt(1, worth=False)
    one.scheduler.extend(1, 0)
    assert one.scheduler.sequence(1).remaining == 39


def test_a_sequence_may_come_with_a_saved_state() -> None:
    one = machine()
    one.saved[1] = list(range(40))
    one.add(1, 50, 5, 5, alike=50, saved=40)
    assert one.scheduler.sequence(1).prefix.hit == 40
    one.run()
    assert prefill_rows(one) == 10


def test_nothing_is_cached_of_what_has_failed() -> None:
    one = machine()
    one.add(1, 50, 60, 60)
    one.step()
    slot = one.scheduler.slot(1)
    assert slot is not None
    one.scheduler.remove(1, worth=False)
    one.leave(slot)
    assert one.scheduler.accounting.used == 0


mixes = st.lists(
    st.tuples(
        st.integers(1, 70),  # prompt
        st.integers(1, 30),  # max_tokens
        st.integers(0, 60),  # alike
        st.integers(0, 5),  # steps before it
        st.sampled_from([None, None, "a", "b"]),  # space
        st.sampled_from(["", "", "", "cancel", "drop"]),
    ),
    max_size=16,
)
kinds = st.sampled_from(
    [
        (UNIFIED, True),
        (UNIFIED, True),
        (STATES, True),
        (STATES, False),
        (Sharing(copy_whole=True, trim=True), False),
        (Sharing(copy_whole=True), False),
        (Sharing(trim=True, window=24), True),
        (Sharing(copy_part=True, copy_whole=True, trim=True, window=24, n_cached=3), True),
        (Sharing(), True),
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    spec=st.sampled_from(["sarathi", "static:size=2,wait=3", "prefix:patience=4", "mlfq", "fair"]),
    kind=kinds,
    retain=st.booleans(),
    mode=st.sampled_from(["recompute", "swap"]),
    n_cells=st.integers(70, 200),
    n_batch=st.integers(3, 80),
    mix=mixes,
    repeats=st.booleans(),
)
def test_any_mix_on_any_memory(
    spec: str,
    kind: tuple[Sharing, bool],
    retain: bool,
    mode: Any,
    n_cells: int,
    n_batch: int,
    mix: list[tuple[int, int, int, int, str | None, str]],
    repeats: bool,
) -> None:
    sharing, unified = kind
    n_slots = 3 + sharing.n_cached
    one = Machine(
        Limits(n_batch, 8, 3, n_cells if unified else n_cells * n_slots, n_cells, unified),
        make_policy(spec),
        sharing=sharing,
        retain=retain,
        swap=SwapChoice(mode),
    )
    stayed = []
    for id, (n_prompt, max_tokens, alike, after, space, what) in enumerate(mix):
        for _ in range(after):
            if repeats:
                one.step_many(7)
            else:
                one.step()
            one.now += 0.1
        max_tokens = min(max_tokens, n_cells - n_prompt + 1)
        one.add(id, n_prompt, max_tokens, max_tokens, alike=alike, space=space, arrival=one.now)
        if what == "cancel":
            one.step()
            if id not in one.done:
                one.remove(id)
        else:
            stayed.append(id)
        if what == "drop":
            one.scheduler.drop_cached()
            one.carry_out()
    most = 500 + 1000 * len(mix)
    while one.step() is not None:
        one.now += 0.1
        most -= 1
        assert most, "it never ends"
    assert set(stayed) <= set(one.done)
    assert all(one.generated[id] == one.ends[id] for id in one.done)
    assert one.scheduler.accounting.free == one.scheduler.accounting.n_cells
    assert one.saved == {}
    assert not one.scheduler.admission._spaces
    assert not one.scheduler.admission._alike
    one.scheduler.drop_cached()
    one.carry_out()
    assert one.scheduler.accounting.used == 0
    assert one.cells == {}
