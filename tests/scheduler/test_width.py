"""Turns: who decodes in a step where fewer rows at a time are faster."""

import sys
from collections import Counter
from itertools import pairwise
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.cost.step_cost import NewGraph, StepCost
from pyllamabatch.scheduler import Limits, SequenceView, StepView, make_policy, sarathi
from pyllamabatch.scheduler.policies.rotation import Windows
from pyllamabatch.scheduler.policies.width import TRIAL, Turns, best_split
from tests.support.scheduler_machine import Machine

LIMITS = Limits(n_batch=64, n_ubatch=64, n_seq_max=20, n_cells=20000, n_cells_seq=20000)
APART = Limits(64, 64, 20, 20000, 1000, unified=False)


class Edge(StepCost):
    """One row as fast as `edge` rows; one more takes `jump` as long as these."""

    calibrated = True
    error = (0.01, 0.05)

    def __init__(
        self, edge: int = 8, jump: float = 2.1, seconds: float = 0.02, switch: float | None = 0.0
    ) -> None:
        self.edge, self.jump, self.seconds, self.switch = edge, jump, seconds, switch
        self.edges = (edge,)
        self.new_graph = NewGraph()

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return self.seconds * (1.0 if rows <= self.edge else self.jump) * (1 + 1e-9 * kv)


def decoding(n: int, **facts: Any) -> list[SequenceView]:
    return [
        SequenceView(i, 0.0, 10, computed=10, generated=1, max_tokens=9999, running=True, **facts)
        for i in range(n)
    ]


def split(n: int, cost: Any, itl: float = 0.1, limits: Limits = LIMITS, **facts: Any) -> Any:
    return best_split(StepView.of(limits, decoding(n, **facts), cost=cost), itl, 0.04)


class Longer(Edge):
    """8 rows are 3% faster than 7, and two steps of them take 4% longer than one of 9."""

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return {7: 0.018, 8: 0.02}.get(rows, 0.018 if rows < 7 else 0.0385)


class Prior(Edge):
    calibrated = False


class Rough(Edge):
    error = (0.5, 1.0)


@pytest.mark.parametrize(
    ("n", "cost", "options", "width"),
    [
        (8, Edge(), {}, None),
        (9, Edge(), {}, 8),
        (16, Edge(jump=1.9), {}, None),  # 16 rows in 1.9 are more than 8 in 1
        (17, Edge(edge=16), {}, 16),
        # a wait is no longer than the wide step, or the target
        (9, Edge(jump=1.9), {}, 8),
        (9, Edge(jump=1.9), {"itl": 0.039}, None),
        (9, Edge(jump=1.9), {"itl_target": 0.039}, None),
        (9, Edge(jump=2.1), {"itl": 0.001}, 8),
        (9, Longer(), {}, 8),
        (9, Longer(), {"itl": 0.039}, 7),
        # what nothing has measured, or a gain within the error
        (9, None, {}, None),
        (9, Prior(), {}, None),
        (9, Rough(), {}, None),
    ],
)
def test_the_width_is_where_tokens_per_second_are_most(
    n: int, cost: Edge | None, options: dict[str, Any], width: int | None
) -> None:
    found = split(n, cost, **options)
    assert (found and found.width) == width


def test_the_gain_is_stated() -> None:
    found = split(9, Edge())
    assert found[:2] == (8, 1)
    assert found.gain == pytest.approx(8 / 9 * 2.1, rel=1e-6)


def test_windows_of_slots_do_not_overlap() -> None:
    found = split(9, Edge(jump=2.2), limits=APART)
    assert found[:2] == (5, 1)  # 5 and 4, not 8 and 1
    assert found.gain == pytest.approx(2.2 / 2)
    assert split(17, Edge(jump=2.2), limits=APART) is None  # 6, 6 and 5 take longer
    machine = machine_of(9, Edge(jump=2.2), max_tokens=200, limits=APART)
    steps = [had for who, had in run(machine, 80) if len(who) == 9][TRIAL : TRIAL + 40]
    assert steps[:4] == [set(range(5)), set(range(5, 9))] * 2
    assert steps == steps[:2] * 20
    machine.remove(2)  # a window of the rest, and its slot is a gap
    machine.remove(7)
    assert len(run(machine, 1)[0][1]) == 7


def test_windows_go_on_behind_the_last_slot() -> None:
    windows = Windows()
    view = StepView.of(APART, decoding(10))
    windows.follow(view)
    seen = []
    for _ in range(4):
        seen.append(set(view.decoding) - windows.out(4))
        windows.turn(4)
    assert seen == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9}, {0, 1, 2, 3}]
    windows.follow(StepView.of(APART, decoding(5)))
    assert windows.out(4) == {0, 1, 2, 3}  # slot 4 is next


def test_a_round_is_held_for_as_long_as_a_switch_needs() -> None:
    assert split(9, Edge(jump=1.9, seconds=0.003, switch=0.0003)).hold == 10  # 1%
    held = split(9, Edge(seconds=0.003, switch=0.004))  # 134 steps would be, but for the target
    assert held.hold == int((0.1 - 0.003 - 2 * 0.004) / 0.003)
    assert held.gain == pytest.approx(8 / 9 * 2.1 * 0.003 / (0.003 + 0.004 / held.hold), rel=1e-3)
    assert split(9, Edge(seconds=0.003, switch=0.006)) is None  # 7% of the time
    assert split(9, Edge(seconds=0.02, switch=0.06)) is None  # a switch costs more than is won
    assert split(9, Edge(seconds=0.001, switch=None)).hold == 32  # none knows yet


def test_all_sits_out_once_before_the_first_ends() -> None:
    """Of 9 eight at a time, in nine rounds; of 16 in two."""
    cost = Edge(jump=4.0, seconds=0.003, switch=0.0015)
    for n, left, hold in ((9, 9 * 9, 9), (9, 9 * 10 - 1, 9), (16, 2 * 9, 9)):
        known = [s._replace(max_tokens=1 + left) for s in decoding(n)]
        view = StepView.of(LIMITS, known, cost=cost)
        found = best_split(view, 0.1, 0.0)
        assert found is not None
        assert (found.width, found.hold) == (8, hold)
    view = StepView.of(LIMITS, [s._replace(max_tokens=9) for s in decoding(9)], cost=cost)
    dear = Edge(jump=2.1, seconds=0.003, switch=0.006)  # more, at each step, than it wins
    assert best_split(StepView.of(LIMITS, view.running, cost=dear), 0.1, 0.0) is None
    free = StepView.of(LIMITS, view.running, cost=Edge())
    assert best_split(free, 0.1, 0.0)[:2] == (8, 1)  # type: ignore[index]
    asked = [s._replace(n_prompt=11, max_tokens=1, generated=0, goal=11) for s in decoding(9)]
    assert best_split(StepView.of(LIMITS, asked, cost=cost), 0.1, 0.0) == split(9, cost)


def run(machine: Machine, n_steps: int) -> list[tuple[set[int], set[int]]]:
    """Who decodes, and who of them has a row, at each step."""
    found = []
    for _ in range(n_steps):
        who = set(machine.scheduler.view(0.0).decoding)
        step = machine.step()
        if step is None:
            break
        found.append((who, {machine.owner[s] for s in step.decode.tolist() if s in machine.owner}))
    return found


def machine_of(
    n: int, cost: Any, spec: str = "width", max_tokens: int = 500, limits: Limits = LIMITS
) -> Machine:
    machine = Machine(limits, make_policy(spec), cost=cost)
    for id in range(n):
        machine.add(id, 3, max_tokens)
    return machine


@settings(max_examples=12)
@given(
    n=st.integers(9, 16),
    seconds=st.sampled_from([0.001, 0.02]),
    switch=st.sampled_from([0.0, 1e-4, 5e-4]),
)
def test_all_get_the_same_share(n: int, seconds: float, switch: float) -> None:
    cost = Edge(jump=2.6, seconds=seconds, switch=switch)
    machine = machine_of(n, cost, max_tokens=5000)
    found = split(n, cost)
    assert found is not None
    steps = [(who, had) for who, had in run(machine, 180 + 2 * found.hold) if len(who) == n]
    n_first = max(TRIAL, found.hold - 1)  # none has come or gone since
    first, steps = steps[:n_first], steps[n_first:]
    assert all(len(had) == n for _, had in first)
    rows = Counter(id for _, had in steps for id in had)
    assert all(len(had) == found.width for _, had in steps)
    assert max(rows.values()) - min(rows.values()) <= found.hold * (-(-n // found.width) - 1)
    most = (-(-n // found.width) - 1) * found.hold + 1  # steps from a row to the next one
    for id in range(n):
        at = [i for i, (_, had) in enumerate(steps) if id in had]
        assert max(after - before for before, after in pairwise(at)) <= most


@settings(max_examples=25)
@given(
    start=st.integers(6, 12),
    changes=st.lists(st.tuples(st.integers(1, 7), st.booleans()), max_size=25),
    switch=st.sampled_from([0.0, 3e-4]),
)
def test_none_starves_while_others_come_and_go(
    start: int, changes: list[tuple[int, bool]], switch: float
) -> None:
    cost = Edge(seconds=0.003, switch=switch)
    machine = machine_of(start, cost)
    last: dict[int, int] = {}
    n_step = 0
    for n_steps, leaves in [*changes, (60, False)]:
        for who, had in run(machine, n_steps):
            n_step += 1
            for id in who:
                last.setdefault(id, n_step - 1)
            last.update(dict.fromkeys(had, n_step))
            # Each window of others is held for `hold`; who joins meanwhile is behind.
            most = 3 * 10 * -(-LIMITS.n_seq_max // 8)
            assert all(n_step - last[id] <= most for id in who)
        ids = machine.scheduler.running_ids()
        if leaves and len(ids) > 1:
            machine.remove(ids[0])
        elif len(ids) < LIMITS.n_seq_max:
            machine.add(len(machine.tokens), 3, 500)


def test_without_a_cost_model_it_is_sarathi() -> None:
    for spec in ("width", "device-aware"):
        for n in (1, 9, 16):
            view = StepView.of(LIMITS, decoding(n), [SequenceView(99, 0.0, 40)])
            plan, usual = make_policy(spec).plan(view), sarathi().plan(view)
            assert plan == usual
            steady = StepView.of(LIMITS, decoding(n))
            assert make_policy(spec).plan(steady)._replace(repeat=1) == (
                sarathi().plan(steady)._replace(repeat=1)
            )
            assert make_policy(spec).plan(steady).repeat > 1


def test_a_steady_batch_stays_in_the_native_loop() -> None:
    machine = machine_of(8, Edge())
    for _ in range(3):
        machine.step()
    assert machine.plan().repeat > 400


def test_where_prompts_come_all_decode() -> None:
    view = StepView.of(LIMITS, decoding(9), [SequenceView(99, 0.0, 40)], cost=Edge())
    assert len(make_policy("device-aware").plan(view).advances(view)) == 10
    policy = make_policy("device-aware")
    assert isinstance(policy.width, Turns)  # type: ignore[attr-defined]
    alone = [StepView.of(LIMITS, decoding(9), cost=Edge(), step=i) for i in range(TRIAL + 2)]
    assert [len(policy.plan(view).advances(view)) for view in alone] == [9] * TRIAL + [8, 8]


def first_turn(machine: Machine, n: int, n_steps: int = 300) -> int | None:
    """For how many steps all of n decode before they take turns."""
    steps = [had for who, had in run(machine, n_steps) if len(who) == n]
    narrow = [i for i, had in enumerate(steps) if len(had) < n]
    return narrow[0] if narrow else None


def test_the_graph_of_other_rows_must_pay() -> None:
    """A narrow step of 3 ms and its share of the others' rows take 3.375 ms for a token of
    all, a wide one 6.3: a graph of 60 ms pays in 21 steps."""

    cost = Edge(seconds=0.003)
    cost.new_graph = NewGraph(0.02, 0.04)
    found = split(9, cost)
    assert (found.width, found.lasting) == (8, ceil(0.06 / (0.0063 - 0.003375)))
    assert first_turn(machine_of(9, cost), 9) == found.lasting > TRIAL
    short = [s._replace(max_tokens=found.lasting) for s in decoding(9)]
    assert best_split(StepView.of(LIMITS, short, cost=cost), 0.1, 0.04) is None
    # where others come and go sooner there are none, and later they begin at once
    begun = best_split(StepView.of(LIMITS, short, cost=cost), 0.1, 0.04, begun=True)
    assert begun is not None
    assert begun.lasting == 0  # the graph is there
    machine = machine_of(9, cost, max_tokens=1500)
    for id in range(20, 40):
        assert first_turn(machine, 9, found.lasting - 2) is None
        machine.remove(machine.scheduler.running_ids()[0])
        machine.add(id, 3, 1500)
    for id in range(40, 50):
        run(machine, 100)
        machine.remove(machine.scheduler.running_ids()[0])
        machine.add(id, 3, 1500)
    assert first_turn(machine, 9) == 0


class Learned(Edge):
    """Says that the wide step takes `jump`, until it has seen more than six of them."""

    def __init__(self, really: float, switch: float = 0.0) -> None:
        super().__init__(switch=switch)
        self.really, self.seen = really, 0

    def see(self, rows: int) -> None:
        self.seen += rows > self.edge
        if self.seen > 6:
            self.jump = self.really


def live(machine: Machine, cost: Learned, n_steps: int) -> list[int]:
    """How many have a row at each step, of which the cost model learns."""
    found = []
    for _ in range(n_steps):
        step = machine.next_step()
        if not step.chunks:
            found.append(len(step.decode))
            cost.see(len(step.decode))
    return found


@pytest.mark.parametrize("switch", [0.0, 3e-4])
def test_the_wide_step_is_tried_before_turns(switch: float) -> None:
    """A profile that was measured while the machine was slow says 2.1; it is 1.05."""
    cost = Learned(1.05, switch)
    assert split(9, cost).width == 8
    machine = machine_of(9, cost, max_tokens=5000)
    found = live(machine, cost, 400)
    assert set(found[9:]) == {9}
    right = Learned(2.1, switch)
    machine = machine_of(9, right, max_tokens=5000)
    found = live(machine, right, 400)
    assert found.count(9) == TRIAL
    assert set(found[40:]) == {8}


def test_a_trial_is_made_for_each_number_of_sequences_and_again_when_old(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[Turns.__module__], "RENEW", 200)
    cost = Learned(2.1)
    machine = machine_of(9, cost, max_tokens=5000)
    live(machine, cost, 60)
    machine.remove(8)
    machine.remove(7)
    for id in (20, 21, 22):
        machine.add(id, 3, 5000)
    ten = live(machine, cost, 60)
    assert ten.count(10) == TRIAL
    machine.remove(22)
    assert live(machine, cost, 60) == [8] * 60  # nine are known
    later = live(machine, cost, 340)
    assert 1 <= later.count(9) / TRIAL <= 2
    assert set(later) == {8, 9}


@settings(max_examples=8)
@given(
    most=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    start=st.integers(9, 13),
    switch=st.sampled_from([0.0, 3e-4, None]),
    new_graph=st.sampled_from([NewGraph(), NewGraph(0.002, 0.006)]),
    limits=st.sampled_from([LIMITS, APART]),
)
def test_asked_at_each_step_it_says_the_same(
    most: list[int], start: int, switch: float | None, new_graph: NewGraph, limits: Limits
) -> None:
    cost = Edge(seconds=0.003, jump=2.3, switch=switch)
    cost.new_graph = new_graph
    one, many = (machine_of(start, cost, "device-aware", 90, limits) for _ in range(2))
    for i, n_most in enumerate([*most, *[1] * 5]):
        if i == len(most):
            one.add(99, 3, 60)
            many.add(99, 3, 60)
        did = many.step_many(n_most)
        assert did is not None
        step, n = did
        for _ in range(n):
            same = one.next_step()
            assert (same.decode.tolist(), same.chunks) == (step.decode.tolist(), step.chunks)
