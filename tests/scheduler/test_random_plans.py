"""Plans at random, requests and interactive sequences: one that keeps the rules is carried out, one
that breaks a rule changes nothing, and in the end a policy that ships finishes all. Memory refuses
what it was asked for, streams become a pool, and a grid keeps the bits of each."""

from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.cost.step_cost import NewGraph, StepCost
from pyllamabatch.errors import PlanError, RequestTooLong
from pyllamabatch.kv import SwapChoice
from pyllamabatch.scheduler import (
    Invariance,
    Plan,
    Policy,
    StepView,
    Window,
    make_policy,
    policy_names,
)
from pyllamabatch.scheduler.kv_options import Pool
from tests.scheduler.test_policies import Cost, Memory, happen, memories
from tests.support.made_up_costs import Linear
from tests.support.scheduler_machine import Machine

CROWD = 6  # sequences: no more come, or most of them only wait
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
        most = random.choice((4, 40))
        for seq in random.sample([*running, *view.waiting], len(running) + len(view.waiting)):
            starts = 0 if seq.running else seq.prefix.cells
            n = min(seq.remaining, rows, cells - starts, random.randint(0, most))
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


def new_graphs(seconds: float) -> Linear:
    """Steps of streams where as much is worth to save a graph."""
    return Linear(step_s=8e-3, row_s=1e-3, tile=8, new_graph=NewGraph(seconds), unified=False)


class World(NamedTuple):
    """layout: streams may become a "pool", and go "back", or be batch-invariant ("grid"). room:
    times the cells of `memory`. at_once: copies between streams. alike: sequences with the same
    tokens sample the same."""

    memory: Memory
    cost: StepCost
    layout: str
    room: int
    at_once: bool
    alike: bool

    def machine(self, policy: Policy) -> Machine:
        limits, sharing, retain, swap = self.memory
        n_cells, n_cells_seq = self.room * limits.n_cells, self.room * limits.n_cells_seq
        limits = replace(limits, n_cells=n_cells, n_cells_seq=n_cells_seq, gap_max=self.room - 1)
        costs, pool, invariance = {}, None, None
        if not limits.unified:
            sharing = replace(sharing, at_once=self.at_once)
            if self.layout == "grid":
                invariance = Invariance.assumed(limits.n_ubatch, limits.n_seq_max)
                sharing = replace(sharing, grid=limits.n_ubatch, tries=sharing.window > 0)
                swap = "recompute" if sharing.window else swap  # a state has not all of its cells
            elif self.layout:
                n_cells -= sharing.n_cached * n_cells_seq
                pooled = replace(limits, n_cells=n_cells, n_cells_seq=n_cells, unified=True)
                whole = sharing.copy_whole or sharing.trim
                pool = Pool(pooled, replace(sharing, copy_part=sharing.trim, copy_whole=whole))
            if self.layout == "back":
                costs = {"pool": Linear(row_s=1.0, cell_s=0.1), "streams": self.cost}
        mode: Any = swap
        choice = SwapChoice(mode, bytes_per_token=100.0, stream_seconds=1e-3)
        machine = Machine(
            limits, policy, sharing=sharing, retain=retain, swap=choice, pool=pool, costs=costs,
            invariance=invariance, cost=self.cost, gather=Window(0.2), patience=0.3,
        )  # fmt: skip
        machine.alike = self.alike
        return machine


worlds = st.builds(
    World,
    memories,
    st.sampled_from([Cost(), new_graphs(3e-3), new_graphs(3e-2)]),
    st.sampled_from(["", "pool", "back", "grid", "grid", "grid"]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.booleans(),
)
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [*["step"] * 15, *["ask", "extend", "trim"] * 3, *["request", "interactive"] * 2,
             "remove", "wait", "drop cached", "lose a step", "shed", "cancel", "restore", "preempt",
             "refuse", "fresh context", "measure"]
        ),
        st.integers(0, 9),
        st.integers(1, 60),
    ),
    min_size=50,
    max_size=150,
)  # fmt: skip


@settings(max_examples=150)
@given(st.integers(0, 2**32).map(Random), worlds, ACTIONS, st.sampled_from(policy_names()))
def test_a_plan_that_keeps_the_rules_is_carried_out(
    random: Random, world: World, actions: list[tuple[str, int, int]], then: str
) -> None:
    policy = AtRandom(random)
    run(world.machine(policy), policy, actions, then)


@pytest.mark.parametrize("spec", policy_names())
@settings(max_examples=25)
@given(worlds, ACTIONS)
def test_requests_beside_interactive_sequences(
    spec: str, world: World, actions: list[tuple[str, int, int]]
) -> None:
    run(world.machine(make_policy(spec)), None, actions, spec)


def run(
    machine: Machine, at_random: AtRandom | None, actions: list[tuple[str, int, int]], then: str
) -> None:
    lives = Lives(machine)
    for what, which, n in actions:
        try:
            lives.act(what, which, n)
        except RequestTooLong:
            assert lives.too_long(which, n)
        except PlanError:
            assert at_random is not None
            assert at_random.broken
            machine.carry_out()  # checkpoints, which are made before the policy is asked
        machine.check()
    machine.scheduler.policy = make_policy(then)
    machine.refuses = 0
    lives.end()


class Lives:
    """Requests and interactive sequences, and what becomes of them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.most = machine.scheduler.most_cells
        self.requests: dict[int, int] = {}  # tokens of their prompts
        self.interactive: list[int] = []

    def act(self, what: str, which: int, n: int) -> None:
        machine, scheduler, most = self.machine, self.machine.scheduler, self.most
        id = 1 + len(machine.tokens)  # 0 in a KV operation: of no sequence
        if what in ("request", "interactive") and len([*scheduler.sequences.all()]) > CROWD:
            what = "step"
        facts: dict[str, Any] = {
            "alike": n if which > 3 else n * which // 4, "space": "a" if which % 7 == 0 else None,
            "priority": which % 3, "tenant": "ab"[which % 2],
            "ttft_target": which / 3 or None, "itl_target": which / 5 or None,
        }  # fmt: skip
        if what == "request":
            n = min(n, most)
            budget = min(20, most - n + 1)
            facts["deadline"] = machine.now + which if n % 4 == 0 else None
            machine.add(id, n, budget, 1 + 2 * which, arrival=machine.now, **facts)
            self.requests[id] = n
        elif what == "interactive":
            machine.add_interactive(id, n, **facts)
            self.interactive.append(id)
        elif what == "step" and which > 7:
            step = machine.step()
            if step is not None and step.stands > 1:
                machine.alone(step, min(step.stands - 1, n))
        elif what == "step":
            machine.step_many(which + 1)
        elif what == "wait":
            machine.now += scheduler.hold(machine.now)
            for id in scheduler.deadlines.due(machine.now):
                machine.remove(id)
                del self.requests[id]
        elif what == "refuse":
            machine.refuses = which % 4
        elif what == "fresh context":
            machine.fresh_context()
        elif what == "preempt":
            if scheduler.n_running:
                machine.preempt(scheduler.running_ids()[which % scheduler.n_running], worth=False)
        elif what == "measure":
            scheduler.prefilled(n, n, n * 1e-3)
            scheduler.copied(100 * n, which * 1e-4 * n, n)
        elif what in ("drop cached", "lose a step", "shed"):
            happen(machine, what, -1)
        elif what == "cancel":
            if open := [one for one in self.requests if one not in machine.done]:
                one = open[which % len(open)]
                machine.remove(one, worth=n % 5 > 0, wanted=n % 3 == 0)
                del self.requests[one]
        elif self.interactive:
            self.tell(what, self.one(which), n)

    def one(self, which: int) -> int:
        """Of the interactive sequences, mostly one that runs."""
        mine, slot = self.interactive, self.machine.scheduler.slot
        if which % 3:
            mine = [id for id in mine if slot(id) is not None] or mine
        return mine[which % len(mine)]

    def tell(self, what: str, one: int, n: int) -> None:
        """What the owner of an interactive sequence does."""
        machine, known = self.machine, len(self.machine.tokens[one])
        if what == "remove":
            machine.remove(one, worth=n % 5 > 0)
            self.interactive.remove(one)
        elif what == "extend":
            machine.extend(one, n, alike=n % 2 > 0)
        elif what == "trim":
            machine.trim(one, max(1, known - n) if n % 2 else min(n, known))
        elif what == "restore":
            machine.restore(one)
        else:
            machine.scheduler.interactive.ask(one, machine.now)

    def too_long(self, which: int, n: int) -> bool:
        known = len(self.machine.tokens[self.one(which)]) if self.interactive else 0
        return known + n > self.most

    def end(self) -> None:
        """All finish, and whose owner wants that has one token more."""
        machine, most = self.machine, self.most
        asked = {
            id: machine.generated[id] for id in self.interactive if len(machine.tokens[id]) <= most
        }
        for id in asked:
            machine.scheduler.interactive.ask(id)
        machine.run()
        assert self.requests.keys() <= {*machine.done}
        if machine.bits is not None:
            for id, n_prompt in self.requests.items():
                machine.bits.check_request(id, n_prompt)
        assert all(machine.generated[id] == n + 1 for id, n in asked.items())
