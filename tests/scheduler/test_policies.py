"""Every policy that is registered, and parts put together at random: no plan breaks a rule, all
sequences finish whatever happens and every cell comes back, the same arrivals give the same steps,
and a plan that repeats is what would have been planned at each step."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import (
    ComposedPolicy,
    Limits,
    PlanBuilder,
    Policy,
    SequenceView,
    Step,
    Verdict,
    make_policy,
    policy_names,
)
from pyllamabatch.scheduler.policies.device_aware import Alternately
from pyllamabatch.scheduler.policies.fair import LeastServed
from pyllamabatch.scheduler.policies.mlfq import Feedback, Levels
from pyllamabatch.scheduler.policies.parts import (
    Aged,
    LastRanked,
    MostUrgent,
    Ranked,
    TokenBudget,
    UntilDue,
    WhenItFits,
    all_that_is_left,
    first_come,
    newest_first,
    soonest_due,
    whole_batch,
)
from pyllamabatch.scheduler.policies.shortest import Remaining
from pyllamabatch.scheduler.policies.slo import Deadline
from pyllamabatch.scheduler.policy import Mix
from tests.support.scheduler_machine import Machine, limits

each_policy = pytest.mark.parametrize(
    "spec",
    [
        *policy_names(), "static:size=2,wait=3", "sarathi:budget=5", "slo:itl=0.5,ttft=9,least=3",
        "shortest:patience=6", "mlfq:quantum=2,levels=4,prompt_rows=3,patience=15",
        "fair:prompt=3.0,budget=4", "prefix:patience=4",
    ],
)  # fmt: skip


class Cost(StepCost):
    """A made-up device: 10 ms a step, 40 ms per tile of 8 rows."""

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        assert rows >= prefill >= 0
        assert kv >= 0
        return 0.01 + 0.04 * -(-rows // 8) + 1e-4 * kv + 1e-3 * n_seqs


class Arrival(NamedTuple):
    n_prompt: int
    max_tokens: int
    end: int
    after: int  # steps after the one before it
    facts: dict[str, Any]
    then: str  # what happens behind it


facts = st.fixed_dictionaries(
    {
        "priority": st.integers(-1, 1),
        "tenant": st.sampled_from("abc"),
        "deadline": st.none() | st.floats(0, 50),
        "ttft_target": st.none() | st.floats(0.01, 1),
        "itl_target": st.none() | st.floats(0.01, 1),
        "space": st.sampled_from([None, None, "a", "b"]),
        "alike": st.integers(0, 60),
    }
)
arrivals = st.lists(
    st.builds(
        Arrival,
        st.integers(1, 70),
        st.integers(1, 30),
        st.integers(1, 30),
        st.integers(0, 6),
        facts,
        st.sampled_from([*[""] * 6, "cancel", "drop cached", "lose a step", "shed"]),
    ),
    max_size=16,
)


class Memory(NamedTuple):
    limits: Limits
    sharing: Sharing = Sharing()
    retain: bool = True
    swap: str = "recompute"


def memory_of(limits: Limits, sharing: Sharing, retain: bool, swap: str) -> Memory:
    """Streams for the slots of what is cached, too."""
    n_slots = limits.n_seq_max + sharing.n_cached
    if not limits.unified:
        limits = replace(limits, n_cells=limits.n_cells_seq * n_slots)
        sharing = replace(sharing, copy_part=False)
    return Memory(limits, sharing, retain, swap)


memories = st.builds(
    memory_of,
    limits,
    st.sampled_from(
        [
            Sharing(),
            Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=4),
            Sharing(copy_part=True, copy_whole=True, trim=True, window=24, n_cached=3),
            Sharing(copy_whole=True, n_cached=4),
            Sharing(copy_whole=True, trim=True),
            Sharing(copy_whole=True),
            Sharing(trim=True, window=24),
        ]
    ),
    st.booleans(),
    st.sampled_from(["recompute", "swap"]),
)


def machine_of(policy: Policy, memory: Memory) -> Machine:
    limits, sharing, retain, swap = memory
    return Machine(limits, policy, sharing=sharing, retain=retain, swap=swap, cost=Cost())


def arrive(machine: Machine, arrival: Arrival) -> int:
    id, most = len(machine.tokens), machine.limits.n_cells_seq
    n_prompt = min(arrival.n_prompt, most)
    max_tokens = min(arrival.max_tokens, most - n_prompt + 1)
    machine.add(id, n_prompt, max_tokens, arrival.end, arrival=machine.now, **arrival.facts)
    return id


def happen(machine: Machine, what: str, id: int) -> None:
    if what == "cancel":
        machine.step()
        if id not in machine.done:
            machine.remove(id)
    elif what == "drop cached":
        machine.drop_cached()
    elif what == "lose a step":  # planned and placed, but the device refused it
        step = machine.scheduler.plan(machine.now)
        if step is not None:
            machine.place(step)
    elif what == "shed":
        shed = machine.scheduler.preempt_newest()
        if shed is not None:
            assert machine.owner[shed[1]] == shed[0]
            machine.leave(shed[1])


def live(policy: Policy, memory: Memory, arrivals: list[Arrival], repeats: bool) -> list[object]:
    """All of it, to the end; the shapes of the steps behind the last arrival. PlanError fails the
    test, and so does a run without an end. `repeats`: several steps at once until then."""
    machine = machine_of(policy, memory)
    stayed = []
    for arrival in arrivals:
        for _ in range(arrival.after):
            if repeats:
                machine.step_many(7)
            else:
                machine.step()
        id = arrive(machine, arrival)
        happen(machine, arrival.then, id)
        if arrival.then != "cancel":
            stayed.append(id)
    shapes = [shape(step) for step in machine.steps()]
    assert set(stayed) <= set(machine.done)
    assert all(machine.generated[id] == machine.ends[id] for id in machine.done)
    scheduler, counters = machine.scheduler, machine.scheduler.counters
    assert scheduler.idle
    assert scheduler.accounting.free == scheduler.accounting.n_cells
    assert machine.memory.saved == {}
    assert not scheduler.admission._spaces
    assert not scheduler.admission._alike
    assert counters.rows == counters.decode_rows + counters.prefill_rows
    assert counters.tokens == sum(machine.generated.values())
    assert counters.recomputed_rows <= counters.prefill_rows
    machine.drop_cached()
    assert scheduler.accounting.used == 0
    assert machine.memory.slots == {}
    return shapes


@each_policy
@settings(max_examples=60)
@given(memory=memories, arrivals=arrivals, repeats=st.booleans())
def test_all_finishes_and_the_same_again(
    spec: str, memory: Memory, arrivals: list[Arrival], repeats: bool
) -> None:
    lives = [live(make_policy(spec), memory, arrivals, repeats) for _ in range(2)]
    assert lives[0] == lives[1]


class OddOnesLater:
    """Skips every other one while any runs."""

    fits = WhenItFits()

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        if seq.id % 2 and builder.n_running:
            return Verdict.SKIP
        return self.fits(builder, seq)


FEEDBACK = Feedback(Levels(quantum=2, n=4, prompt_rows=3), 20)
composed = st.builds(
    ComposedPolicy,
    order=st.one_of(
        st.just(first_come),
        st.just(Aged(Ranked(Remaining()), 7)),
        st.just(MostUrgent(Deadline())),
        st.just(soonest_due),
        st.builds(LeastServed).map(lambda least_served: least_served.order),
        st.just(FEEDBACK.order),
    ),
    admit=st.builds(WhenItFits, st.floats(0, 0.3)) | st.builds(OddOnesLater),
    budget=st.just(whole_batch)
    | st.builds(TokenBudget, st.integers(1, 9))
    | st.just(UntilDue(whole_batch)),
    chunk=st.sampled_from([all_that_is_left, lambda builder, seq: 3]),
    victim=st.sampled_from([newest_first, LastRanked(Remaining()), FEEDBACK.victim]),
    mix=st.sampled_from(Mix) | st.builds(Alternately),
)


@settings(max_examples=150)
@given(composed, memories, arrivals)
def test_any_parts_together_keep_the_rules_and_finish(
    policy: ComposedPolicy, memory: Memory, arrivals: list[Arrival]
) -> None:
    live(policy, memory, arrivals, False)


@each_policy
@settings(max_examples=40)
@given(limits=limits, arrivals=arrivals, most=st.integers(2, 40))
def test_a_plan_stands_for_as_long_as_it_says(
    spec: str, limits: Limits, arrivals: list[Arrival], most: int
) -> None:
    """One machine makes all the steps of a plan at once, the other one asks at each of them."""
    one, many = (machine_of(make_policy(spec), Memory(limits)) for _ in range(2))
    for arrival in [*arrivals, None]:
        n_left = arrival.after if arrival else 10**9
        while n_left and (did := many.step_many(min(most, n_left))) is not None:
            step, n = did
            for _ in range(n):
                assert shape(one.next_step()) == shape(step)
            assert one.scheduler.counters == many.scheduler.counters
            assert one.held == many.held
            many.now = one.now
            n_left -= n
        if arrival:
            for machine in (one, many):
                arrive(machine, arrival)
    assert one.step() is None
    assert one.done == many.done


def shape(step: Step) -> object:
    return step.decode.tolist(), step.chunks, step.admitted, step.preempted
