"""Plans at random, requests and interactive sequences: one that keeps the rules is carried out, one
that breaks a rule changes nothing, and in the end a policy that ships finishes all."""

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.errors import PlanError, RequestTooLong
from pyllamabatch.scheduler import Plan, Policy, StepView, Window, make_policy, policy_names
from tests.scheduler.test_policies import Cost, Memory, happen, memories
from tests.support.scheduler_machine import Machine

BROKEN = (
    {"tokens": {10**6: 1}},
    {"preempt": (10**6,)},
    {"repeat": 0},
    {"sit_out": {10**6}, "decode_all": True},
)


class AtRandom:
    """Some that run are preempted, some sit out, others advance by any number of tokens, and some
    that wait come in: as far as rows, cells and slots go. `broken`: one of a few plans breaks a
    rule."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.broken = False

    def plan(self, view: StepView) -> Plan:
        random, running = self.random, [*view.running]
        preempt = {seq.id for seq in running if random.random() < 0.1}
        rows, cells = view.limits.n_batch, view.kv.free + view.kv.freed_by(*preempt)
        sit_out = {id for id in view.decoding if random.random() < 0.2} - preempt
        n = len(view.decoding - preempt - sit_out)
        decode_all = random.random() < 0.5 and n <= min(rows, cells)
        if decode_all:
            rows, cells = rows - n, cells - n
        slots = view.limits.n_seq_max - len(running) + len(preempt)
        tokens: dict[int, int] = {}
        for seq in random.sample([*running, *view.waiting], len(running) + len(view.waiting)):
            starts = 0 if seq.running else seq.prefix.cells
            n = min(seq.remaining, rows, cells - starts, random.randint(0, 40))
            decodes = decode_all and seq.id in view.decoding
            if n < 1 or decodes or seq.id in preempt or not (seq.running or slots):
                continue
            tokens[seq.id] = n
            rows, cells, slots = rows - n, cells - starts - n, slots - (not seq.running)
        plan = Plan(tokens, tuple(preempt), decode_all, frozenset(sit_out if decode_all else ()))
        if rows < view.limits.n_batch and not preempt and tokens.keys() <= view.decoding:
            plan = plan._replace(repeat=random.choice((1, 3, 2**31)))
        elif rows == view.limits.n_batch and not preempt:
            plan = plan._replace(wake=view.now + 1)
        self.broken = random.random() < 0.05
        return plan._replace(**random.choice(BROKEN)) if self.broken else plan


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [*["step"] * 8, "request", "interactive", "ask", "extend", "trim", "remove", "wait",
             "drop cached", "lose a step", "shed"]
        ),
        st.integers(0, 9),
        st.integers(1, 60),
    ),
    min_size=30,
    max_size=120,
)  # fmt: skip


@settings(max_examples=200)
@given(st.integers(0, 2**32).map(Random), memories, ACTIONS, st.sampled_from(policy_names()))
def test_a_plan_that_keeps_the_rules_is_carried_out(
    random: Random, memory: Memory, actions: list[tuple[str, int, int]], then: str
) -> None:
    policy = AtRandom(random)
    run(policy, policy, memory, actions, then)


@pytest.mark.parametrize("spec", policy_names())
@settings(max_examples=40)
@given(memories, ACTIONS)
def test_requests_beside_interactive_sequences(
    spec: str, memory: Memory, actions: list[tuple[str, int, int]]
) -> None:
    run(make_policy(spec), None, memory, actions, spec)


def run(
    policy: Policy,
    at_random: AtRandom | None,
    memory: Memory,
    actions: list[tuple[str, int, int]],
    then: str,
) -> None:
    limits, sharing, retain, swap = memory
    facts: dict[str, Any] = {"sharing": sharing, "retain": retain, "swap": swap, "cost": Cost()}
    machine = Machine(limits, policy, gather=Window(0.2), patience=0.3, **facts)
    scheduler, most = machine.scheduler, limits.n_cells_seq
    here: dict[bool, list[int]] = {False: [], True: []}  # interactive or not
    for what, which, n in actions:
        id, mine = len(machine.tokens), here[what != "remove" or which % 2 == 0]
        one = mine[which % len(mine)] if mine else -1
        try:
            if what == "request":
                n = min(n, most)
                machine.add(id, n, min(20, most - n + 1), 1 + which, alike=n // 2)
                here[False].append(id)
            elif what == "interactive":
                machine.add_interactive(id, n, alike=n // 2)
                here[True].append(id)
            elif what == "step":
                machine.step_many(which + 1)
            elif what == "wait":
                machine.now += scheduler.hold(machine.now)
            elif one < 0 or what in ("drop cached", "lose a step", "shed"):
                happen(machine, what, -1)
            elif what == "remove":
                if one not in machine.done:
                    machine.remove(one)
                mine.remove(one)
            elif what == "extend":
                machine.extend(one, n)
            elif what == "trim":
                machine.trim(one, min(n, len(machine.tokens[one])))
            else:
                scheduler.interactive.ask(one)
        except RequestTooLong:
            assert n + len(machine.tokens.get(one, ())) > most
        except PlanError:
            assert at_random is not None
            assert at_random.broken
            machine.carry_out()  # checkpoints, which are made before the policy is asked
        machine.check()
    scheduler.policy = make_policy(then)
    asked = {id: machine.generated[id] for id in here[True] if len(machine.tokens[id]) <= most}
    for id in asked:
        scheduler.interactive.ask(id)
    machine.run()
    assert {*here[False]} <= {*machine.done}
    assert all(machine.generated[id] == n + 1 for id, n in asked.items())
