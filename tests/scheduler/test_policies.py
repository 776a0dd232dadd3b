"""Every policy that is registered: no plan breaks a rule, all finish, the same arrivals
give the same steps, and a plan that repeats is what would have been planned at each step."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.scheduler import Limits, Step, make_policy, policy_names
from tests.support.scheduler_machine import Machine, limits

SPECS = [
    *policy_names(),
    "static:size=2,wait=3",
    "sarathi:budget=5",
    "slo:itl=0.5,ttft=9,least=3",
    "shortest:patience=6",
    "mlfq:quantum=2,levels=4,prompt_rows=3,patience=15",
    "fair:prompt=3.0,budget=4",
    "prefix:patience=4",
]
each_policy = pytest.mark.parametrize("spec", SPECS)


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
    alike: int  # tokens that it begins with as the others do
    cancelled: bool


facts = st.fixed_dictionaries(
    {
        "priority": st.integers(-1, 1),
        "tenant": st.sampled_from("abc"),
        "deadline": st.none() | st.floats(0, 50),
        "itl_target": st.none() | st.floats(0.01, 1),
    }
)
arrivals = st.lists(
    st.builds(
        Arrival,
        st.integers(1, 60),
        st.integers(1, 30),
        st.integers(1, 30),
        st.integers(0, 6),
        facts,
        st.integers(0, 60),
        st.sampled_from([False] * 5 + [True]),
    ),
    max_size=16,
)


def machine_of(spec: str, limits: Limits) -> Machine:
    machine = Machine(limits, make_policy(spec))
    machine.scheduler.cost = Cost()
    return machine


def arrive(machine: Machine, arrival: Arrival) -> int:
    id = len(machine.prompts)
    n_prompt = min(arrival.n_prompt, machine.limits.n_cells_seq)
    max_tokens = min(arrival.max_tokens, machine.limits.n_cells_seq - n_prompt + 1)
    machine.add(
        id,
        n_prompt,
        max_tokens,
        arrival.end,
        arrival=machine.now,
        alike=arrival.alike,
        **arrival.facts,
    )
    return id


def live(spec: str, limits: Limits, arrivals: list[Arrival]) -> tuple[Machine, list[Step]]:
    """All of it, to the end. PlanError fails the test, and so does a run without an end."""
    machine = machine_of(spec, limits)
    steps = []
    for arrival in arrivals:
        for _ in range(arrival.after):
            step = machine.step()
            machine.now += 0.1
            if step is not None:
                steps.append(step)
        id = arrive(machine, arrival)
        if arrival.cancelled:
            machine.step()
            if id not in machine.done:
                machine.remove(id)
    most = 50 + 400 * sum(machine.prompts[id] + machine.ends[id] for id in machine.prompts)
    while (step := machine.step()) is not None:
        steps.append(step)
        machine.now += 0.1
        assert len(steps) < most, "it never ends"
    return machine, steps


@each_policy
@settings(max_examples=40, deadline=None)
@given(limits=limits, arrivals=arrivals)
def test_all_finishes_and_the_same_again(
    spec: str, limits: Limits, arrivals: list[Arrival]
) -> None:
    machine, steps = live(spec, limits, arrivals)
    stayed = [id for id, arrival in enumerate(arrivals) if not arrival.cancelled]
    assert set(stayed) <= set(machine.done)
    assert all(machine.generated[id] == machine.ends[id] for id in machine.done)
    assert machine.scheduler.idle
    assert machine.scheduler.accounting.used == 0
    _, again = live(spec, limits, arrivals)
    assert [shape(step) for step in steps] == [shape(step) for step in again]


@each_policy
@settings(max_examples=40, deadline=None)
@given(limits=limits, arrivals=arrivals, most=st.integers(2, 40))
def test_a_plan_stands_for_as_long_as_it_says(
    spec: str, limits: Limits, arrivals: list[Arrival], most: int
) -> None:
    """One machine makes all the steps of a plan at once, the other one asks at each of them."""
    one, many = machine_of(spec, limits), machine_of(spec, limits)
    for arrival in [*arrivals, None]:
        n_left = arrival.after if arrival else 10**9
        while n_left and (did := many.step_many(min(most, n_left))) is not None:
            step, n = did
            for _ in range(n):
                same = one.step()
                assert same is not None
                assert shape(same) == shape(step)
                one.now += 0.1
            many.now = one.now
            n_left -= n
        if arrival:
            for machine in (one, many):
                arrive(machine, arrival)
    assert one.step() is None
    assert one.scheduler.counters == many.scheduler.counters
    assert one.done == many.done


def shape(step: Step) -> object:
    return step.decode.tolist(), step.chunks, step.admitted, step.preempted
