"""The scheduler under a virtual clock."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pyllamabatch.cost.step_cost import NewGraph, StepCost
from pyllamabatch.errors import ArgumentError, PlanError
from pyllamabatch.scheduler import (
    Plan,
    Policy,
    StepView,
    fcfs,
    make_policy,
    policy_names,
    sarathi,
    width,
)
from pyllamabatch.sim import EngineSpec, Simulated, SimulationStuck, TraceRequest, draw, simulate


@dataclass(frozen=True)
class Linear(StepCost):
    """10 ms a step, 1 ms a row, 1 us a cell."""

    cell: float = 1e-6

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        return 0.010 + 0.001 * rows + self.cell * kv


def machine(**options: object) -> EngineSpec:
    given: dict[str, object] = {"n_seq_max": 4, "n_cells": 4096, "overhead": 0.0, **options}
    return EngineSpec.of(given.pop("cost", Linear(0.0)), **given)  # type: ignore[arg-type]


def one(id: int, arrival: float, n_prompt: int, n_output: int, **more: object) -> TraceRequest:
    content = ((2 * id, n_prompt),)
    return TraceRequest(id, arrival, n_prompt, n_output, content, 2 * id + 1, **more)  # type: ignore[arg-type]


def test_one_request() -> None:
    (o,) = simulate([one(1, 2.0, 90, 11)], machine()).outcomes
    assert (o.arrival, o.admitted) == (2.0, 2.0)
    assert o.first == pytest.approx(2.0 + 0.100)
    assert o.end == pytest.approx(2.0 + 0.100 + 10 * 0.011)
    assert o.longest_itl == pytest.approx(0.011)


def test_overhead_is_paid_once_a_call() -> None:
    (o,) = simulate([one(1, 0.0, 90, 11)], machine(overhead=0.5)).outcomes
    assert o.end == pytest.approx(0.5 + 0.100 + 0.5 + 10 * 0.011)


def test_a_new_graph_costs_once_and_again_where_the_cells_grow() -> None:
    """A prompt's step and the first one behind it have graphs of their own; then 256 more cells."""

    def ends(n_output: int, **options: object) -> float:
        made = machine(overhead=0.0, **options)
        made = replace(made, new_graph=NewGraph(10.0, 1.0))
        plain = replace(made, new_graph=NewGraph())
        requests = [one(0, 0.0, 8, n_output)]
        times = [simulate(requests, m).outcomes[0].end for m in (made, plain)]
        return times[0] - times[1]

    for unified in (True, False):
        assert ends(1, unified=unified) == pytest.approx(10)
        assert ends(2, unified=unified) == pytest.approx(20)
        assert ends(3, unified=unified) == pytest.approx(21)
        assert ends(249, unified=unified) == pytest.approx(21)  # 8 and 248 cells
        assert ends(250, unified=unified) == pytest.approx(31)
        assert ends(251, unified=unified) == pytest.approx(32)


def test_what_settles_behind_a_new_graph_may_be_the_next_call() -> None:
    """Calls of one step, as the policy asks: the third one is behind the first one that decodes."""

    class OneByOne:
        def plan(self, view: StepView) -> Plan:
            return replace(fcfs().plan(view), repeat=1)

    made = replace(machine(), new_graph=NewGraph(10.0, 1.0))
    ends = [simulate([one(0, 0.0, 8, n)], made, OneByOne).outcomes[0].end for n in (1, 2, 3, 4)]
    plain = [simulate([one(0, 0.0, 8, n)], machine()).outcomes[0].end for n in (1, 2, 3, 4)]
    assert [a - b for a, b in zip(ends, plain, strict=True)] == pytest.approx([10, 20, 21, 21])


def test_a_call_in_streams_reads_the_cells_of_its_own_sequences() -> None:
    """The prompt of the second one does not attend to the first, which holds 1,000 cells."""

    class Cells(StepCost):
        unified = False

        def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
            return 1.0 + kv

    made = machine(cost=Cells(), unified=False)
    requests = [one(0, 0.0, 1000, 3), one(1, 1.5, 8, 1)]
    ends = {o.id: o.end for o in simulate(requests, made).outcomes}
    # The first's prompt, two steps of 1,000 and 1,001 cells; the second comes in the first of them.
    assert ends[1] == pytest.approx(1 + 1001 + 1002 + 1)
    assert ends[0] == pytest.approx(1 + 1001 + 1002)


def test_free_cells_cost_where_kernels_compute_them() -> None:
    """A long one leaves; the other's cells are behind it, and it fills the hole in 29 steps by
    little."""

    class Masking(Linear):
        computes_masked = True

    class Seen:
        def __init__(self) -> None:
            self.cells: list[float] = []
            seen.append(self.cells)

        def plan(self, view: StepView) -> Plan:
            self.cells.append(view.kv.attended)
            return fcfs().plan(view)

    requests = [one(0, 0.0, 1000, 2), one(1, 0.0, 100, 31)]
    ends: list[float] = []
    seen: list[list[float]] = []
    for cost in (Linear(), Masking()):
        made = machine(cost=cost, prefix_cache=False)
        ends.append(simulate(requests, made, Seen).outcomes[1].end)
    assert seen == [[0, 1100, 101], [0, 1100, 1102]]
    assert ends[1] - ends[0] == pytest.approx(1e-6 * sum(1102 - (101 + k) for k in range(29)))


def test_streams_that_are_no_neighbours_cost_what_is_computed() -> None:
    """Of three the one in the middle ends: its row is computed on where gaps are filled, else the
    others need two ubatches."""
    requests = [one(0, 0.0, 8, 31), one(1, 0.0, 8, 11), one(2, 0.0, 8, 31)]

    def tail(**options: object) -> float:
        ends = {o.id: o.end for o in simulate(requests, machine(**options)).outcomes}
        return ends[2] - ends[1]

    assert tail(unified=True) == pytest.approx(20 * 0.012)
    assert tail(unified=False) == pytest.approx(20 * 0.013)
    assert tail(unified=False, gap_max=0) == pytest.approx(20 * 2 * 0.011)
    made = machine(unified=False, gap_max=0)
    new = replace(made, new_graph=NewGraph(0.5))
    ends = {o.id: o.end for o in simulate(requests, new).outcomes}
    assert ends[2] - ends[1] == pytest.approx(20 * 2 * (0.011 + 0.5))


def test_others_in_the_same_rows_cost_a_switch() -> None:
    """Where the cells are shared; two of three take turns of three steps: the others' round and
    two switches are as long as the wide step then."""

    class Costs(Linear):
        edges = (2,)
        switch = 0.001

        def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
            return 0.010 if rows <= 2 or prefill else 0.050

    requests = [one(i, 0.0, 8, 301) for i in range(3)]
    made = replace(machine(cost=Costs()), new_graph=NewGraph(1e-9))
    run = simulate(requests, made, lambda: width(itl=0.03))
    (load,) = run.loads
    turns, wide, steps = load.rows[2], load.rows[3], sum(load.rows.values())
    assert turns > 400
    end = max(o.end for o in run.outcomes)
    computed = 0.010 * (steps - wide) + 0.050 * wide
    assert end - computed == pytest.approx(0.001 * turns / 3, abs=0.003)


def test_a_token_reaches_its_reader_later() -> None:
    requests = [one(0, 0.0, 8, 3), replace(one(1, 2.0, 8, 1), after=0)]
    made = machine(overhead=0.0)
    at_once = simulate(requests, made).outcomes
    later = simulate(requests, replace(made, latency=0.5)).outcomes
    for a, b, wait in zip(at_once, later, (0.5, 1.0), strict=True):
        assert b.first - a.first == pytest.approx(wait)
        assert b.end - a.end == pytest.approx(wait)
        assert b.tpot == (None if a.tpot is None else pytest.approx(a.tpot))


def test_a_newcomer_waits_for_the_step_that_goes_on_and_no_longer() -> None:
    run = simulate([one(1, 0.0, 90, 1000), one(2, 0.105, 40, 1)], machine())
    first, second = sorted(run.outcomes, key=lambda o: o.id)
    assert second.admitted == pytest.approx(0.111)  # the first decode begins at 0.1, takes 11 ms
    assert second.first == second.end == pytest.approx(0.111 + 0.010 + 0.041)
    assert first.longest_itl == pytest.approx(0.051)
    assert first.end == pytest.approx(0.1 + 998 * 0.011 + 0.051)


def test_cells_make_steps_longer() -> None:
    (o,) = simulate([one(1, 0.0, 100, 101)], machine(cost=Linear(1e-5))).outcomes
    cells = sum(range(100, 200))
    assert o.end == pytest.approx(0.110 + 100 * 0.011 + 1e-5 * cells)


def test_an_end_of_text_before_the_budget() -> None:
    run = simulate([one(1, 0.0, 10, 5, max_tokens=50), one(2, 0.0, 10, 20)], machine())
    assert [(o.id, o.n_output) for o in run.outcomes] == [(1, 5), (2, 20)]
    assert run.outcomes[0].end == pytest.approx(0.030 + 4 * 0.012)


def test_queueing_and_a_closed_loop() -> None:
    requests = [one(1, 0.0, 10, 3), one(2, 0.0, 10, 3), one(3, 0.5, 10, 3, after=1)]
    run = simulate(requests, machine(n_seq_max=1))
    a, b, c = sorted(run.outcomes, key=lambda o: o.id)
    assert b.queueing == pytest.approx(a.end)
    assert c.arrival == pytest.approx(a.end + 0.5)


def test_what_can_never_fit_is_rejected_and_the_rest_goes_on() -> None:
    requests = [one(1, 0.0, 5000, 5), one(2, 0.25, 10, 5, after=1), one(3, 0.0, 10, 5)]
    run = simulate(requests, machine())
    assert [(o.id, o.rejected) for o in run.outcomes] == [(1, True), (3, False), (2, False)]
    assert run.outcomes[-1].arrival == 0.25
    assert run.summary()["rejected"] == 1


def test_a_prefix_is_computed_once() -> None:
    """Of prompts of 100 tokens in common and 20 of their own, when the first has been computed."""
    requests = [
        TraceRequest(i, float(i), 120, 3, ((0, 100), (10 + i, 20)), 20 + i, None) for i in range(3)
    ]
    run = simulate(requests, machine())
    assert [o.prefix for o in run.outcomes] == [0, 100, 100]
    assert [round(o.ttft, 6) for o in run.outcomes] == [0.130, 0.030, 0.030]
    assert run.summary()["prefix_share"] == pytest.approx(200 / 360)
    alone = simulate(requests, machine(prefix_cache=False))
    assert [o.prefix for o in alone.outcomes] == [0, 0, 0]


def test_a_conversation_starts_from_its_own_answer() -> None:
    first = TraceRequest(1, 0.0, 100, 50, ((0, 100),), 1)
    second = TraceRequest(2, 1.0, 170, 5, ((0, 100), (1, 50), (2, 20)), 3, after=1)
    run = simulate([first, second], machine())
    assert run.outcomes[1].prefix == 149  # the token that was sampled last is in no cell


def test_preemption() -> None:
    requests = [one(i, 0.0, 100, 150) for i in range(4)]
    run = simulate(requests, machine(n_cells=600))
    found = run.summary()
    assert found["preemptions"] > 0
    preempted = [o for o in run.outcomes if o.preemptions]
    assert all(o.preemption > 0 for o in preempted)
    assert found["kv_peak"] <= 1


def test_replicas_share_the_traffic() -> None:
    requests = draw("closed:clients=16,n=200,prompt=50,output=40-80,prefix=40,prefixes=4", 0)
    single = simulate(requests, machine())
    for router in ("round-robin", "least-outstanding", "prefix-affinity"):
        run = simulate(requests, machine(), n_replicas=4, router=router)
        assert {o.replica for o in run.outcomes} == {0, 1, 2, 3}
        assert run.summary()["duration"] < 0.4 * single.summary()["duration"]
        assert len(run.loads) == 4
        assert all(load.points for load in run.loads)


def test_affinity_finds_more_in_the_cache() -> None:
    requests = draw("poisson:rate=20,n=400,prompt=300,output=10,prefix=250,prefixes=16", 0)
    share = {
        router: simulate(requests, machine(n_cells=2048), n_replicas=4, router=router).summary()
        for router in ("round-robin", "prefix-affinity")
    }
    assert share["prefix-affinity"]["prefix_share"] > 1.3 * share["round-robin"]["prefix_share"]


def test_curves_are_thinned_out() -> None:
    run = simulate(draw("poisson:rate=100,n=3000,prompt=5,output=5", 0), machine())
    points = run.loads[0].points
    assert 1000 <= len(points) <= 2000
    times = [t for t, *_ in points]
    assert times == sorted(times)


def everything(run: Simulated) -> list[tuple[object, ...]]:
    return [astuple(o) for o in run.outcomes]


class OneByOne:
    """Plans every step by itself."""

    def __init__(self, name: str) -> None:
        self._policy = make_policy(name)

    def plan(self, view: StepView) -> Plan:
        return replace(self._policy.plan(view), repeat=1)


requests_ = st.lists(
    st.tuples(
        st.floats(0, 2), st.integers(1, 120), st.integers(1, 60), st.integers(0, 2), st.booleans()
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=60, deadline=None, phases=[Phase.reuse, Phase.generate]
)  # shrinking: minutes
@given(
    requests_,
    st.sampled_from(sorted(policy_names())),
    st.sampled_from([300, 1000]),
    st.booleans(),
    st.booleans(),
)
def test_every_policy_serves_every_request(
    drawn: list[tuple[float, int, int, int, bool]],
    policy: str,
    n_cells: int,
    unified: bool,
    cache: bool,
) -> None:
    """Every request is served, times add up, a second run is the same, and many steps for one plan
    are what they are one by one (not with a prefix cache, where room is made for all at once)."""
    requests = []
    for i, (arrival, n_prompt, n_output, begin, follows) in enumerate(drawn):
        content = ((begin, n_prompt),) if begin else ((100 + 2 * i, n_prompt),)
        after = i - 1 if follows and i else None
        # Steps last whole milliseconds: an arrival at the very end of one would be before or after
        # it by rounding alone, so each is a little off in its own way.
        arrival += 2**i * 1e-8
        requests.append(
            TraceRequest(
                i, arrival, n_prompt, n_output, content, 101 + 2 * i, after, itl_target=0.05
            )
        )
    how = machine(n_cells=n_cells * (1 if unified else 4), unified=unified, prefix_cache=cache)
    run = simulate(requests, how, policy)
    assert sorted(o.id for o in run.outcomes) == list(range(len(drawn)))
    for o in run.outcomes:
        assert o.arrival <= o.admitted < o.first <= o.end
        assert o.execution >= 0
        assert (o.preemptions > 0) == (o.preemption > 0) or o.preemption == 0
        assert o.longest_itl <= o.end - o.first + 1e-9
    assert sum(n for n in run.loads[0].rows.values()) > 0
    assert everything(simulate(requests, how, policy)) == everything(run)
    if policy in ("fcfs", "sarathi", "static", "prefill-first") and not cache:
        slow = simulate(requests, how, lambda: OneByOne(policy))
        for a, b in zip(run.outcomes, slow.outcomes, strict=True):
            assert a.id == b.id
            assert (a.first, a.end) == pytest.approx((b.first, b.end))


class Later:
    """Plans nothing before the third second."""

    def plan(self, view: StepView) -> Plan:
        return Plan(wake=view.now + 1) if view.now < 3 else Plan({1: 1})


def test_a_policy_may_wait() -> None:
    (o,) = simulate([one(1, 0.0, 1, 1)], machine(), Later).outcomes
    assert o.admitted == 3.0


def test_a_bad_plan_and_bad_arguments() -> None:
    class Bad:
        def plan(self, view: StepView) -> Plan:
            return Plan({7: 1})

    with pytest.raises(PlanError, match="known-sequence"):
        simulate([one(1, 0.0, 1, 1)], machine(), Bad)
    with pytest.raises(ArgumentError, match="every id once"):
        simulate([one(1, 0.0, 1, 1)] * 2, machine())
    with pytest.raises(ArgumentError, match="replicas"):
        simulate([], machine(), n_replicas=0)
    with pytest.raises(ArgumentError, match="router"):
        simulate([], machine(), router="random")
    with pytest.raises(ArgumentError, match="policy"):
        simulate([], machine(), "none")


def test_a_request_after_an_unknown_one_is_an_error() -> None:
    with pytest.raises(SimulationStuck, match="1 request"):
        simulate([one(1, 0.0, 5, 5), one(2, 0.0, 5, 5, after=9)], machine())


def test_a_policy_object_is_made_for_each_replica() -> None:
    made: list[Policy] = []

    def make() -> Policy:
        made.append(sarathi())
        return made[-1]

    run = simulate(draw("poisson:rate=9,n=20", 0), machine(), make, n_replicas=3)
    assert len(made) == 3
    assert run.policy == "make"
