"""The scheduler under a virtual clock."""

from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pyllamabatch.cost.step_cost import NewGraph, StepCost
from pyllamabatch.errors import ArgumentError, PlanError
from pyllamabatch.kv import Sharing, SwapChoice
from pyllamabatch.scheduler import (
    Plan,
    Policy,
    StepView,
    device_aware,
    fair,
    fcfs,
    make_policy,
    policy_names,
    sarathi,
    slo,
    width,
)
from pyllamabatch.scheduler.router import ROUTERS, ReplicaView, RoundRobin
from pyllamabatch.sim import (
    EngineSpec,
    Outcome,
    Simulated,
    SimulationStuck,
    TraceRequest,
    draw,
    simulate,
)
from pyllamabatch.sim.replica import SimulatedReplica
from tests.support.made_up_costs import Linear


def linear(cell_s: float = 1e-6) -> Linear:
    return Linear(10e-3, 1e-3, cell_s)


def machine(new_graph: NewGraph | None = None, latency: float = 0.0, **options: Any) -> EngineSpec:
    cost = options.pop("cost", linear(0.0))
    made = EngineSpec.of(cost, **{"n_seq_max": 4, "n_cells": 4096, "overhead": 0.0, **options})
    return replace(made, new_graph=new_graph or made.new_graph, latency=latency)


def one(id: int, arrival: float, n_prompt: int, n_output: int, **more: Any) -> TraceRequest:
    return TraceRequest(
        id, arrival, n_prompt, n_output, ((2 * id, n_prompt),), 2 * id + 1, **more
    )  # fmt: skip


def outcomes(
    requests: list[TraceRequest], policy: str | Callable[[], Policy] = fcfs, **options: Any
) -> list[Outcome]:
    """By id."""
    found = simulate(requests, machine(**options), policy).outcomes
    return sorted(found, key=lambda o: o.id)


def ttft(outcome: Outcome) -> float:
    assert outcome.ttft is not None
    return outcome.ttft


def with_pool() -> EngineSpec:
    """Streams of 1,024 cells that may become a pool."""
    return replace(machine(unified=False), pool=machine())


def test_a_budget_that_no_stream_has_delays_no_other_request() -> None:
    requests = [one(i, 0.0, 900, 100) for i in range(3)]
    small, large = (one(9, 5.0, 2, 5, max_tokens=n) for n in (0, 3000))
    times = [
        [(o.first, o.end, o.preemptions) for o in simulate([*requests, r], with_pool()).outcomes]
        for r in (small, large)
    ]
    assert times[0] == times[1]


def test_streams_become_a_pool_for_an_answer_that_outgrows_its_own() -> None:
    requests = [one(0, 0.0, 900, 2000), one(1, 0.0, 2, 60)]
    run = simulate(requests, with_pool())
    assert {o.id: o.preemptions for o in run.outcomes} == {0: 1, 1: 0}
    assert all(o.end > o.first for o in run.outcomes)
    assert run.loads[0].n_cells == 4096
    assert run.loads[0].kv_peak > 2000


def test_a_pool_that_is_slower_is_streams_again_for_those_that_come_after() -> None:
    """Streams take a millisecond a row; the pool as much for ten cells besides."""
    streams = replace(machine(unified=False), cost=Linear(row_s=1e-3, unified=False))
    spec = replace(streams, pool=replace(machine(), cost=Linear(row_s=1e-3, cell_s=1e-4)))
    requests = [one(0, 0.0, 2000, 2), *(one(i, 10.0 + i, 100, 100) for i in range(1, 20))]
    run = simulate(requests, spec)
    assert run.loads[0].counters.layout_changes == 2
    first, last = (next(o for o in run.outcomes if o.id == id) for id in (1, 19))
    assert last.end - last.arrival == pytest.approx(0.2, abs=0.02)
    assert first.end - first.arrival > 2 * (last.end - last.arrival)


def test_one_request_and_the_overhead_of_a_call() -> None:
    (o,) = outcomes([one(1, 2.0, 90, 11)])
    assert (o.arrival, o.admitted) == (2.0, 2.0)
    assert o.first == pytest.approx(2.0 + 0.100)
    assert o.end == pytest.approx(2.0 + 0.100 + 10 * 0.011)
    assert o.longest_itl == pytest.approx(0.011)
    (o,) = outcomes([one(1, 0.0, 90, 11)], overhead=0.5)
    assert o.end == pytest.approx(0.5 + 0.100 + 0.5 + 10 * 0.011)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize(
    ("n_output", "seconds"),
    [(1, 10), (2, 20), (3, 21), (249, 21), (250, 31), (251, 32)],  # 249: 8 and 248 cells
)
def test_a_new_graph_costs_once_and_again_where_the_cells_grow(
    unified: bool, n_output: int, seconds: float
) -> None:
    """A prompt's step and the first one behind it have graphs of their own; then 256 more cells."""
    ends = [
        outcomes([one(0, 0.0, 8, n_output)], unified=unified, new_graph=new)[0].end
        for new in (NewGraph(10.0, 1.0), NewGraph())
    ]
    assert ends[0] - ends[1] == pytest.approx(seconds)


class OneByOne:
    def __init__(self, name: str = "fcfs") -> None:
        self._policy = make_policy(name)

    def plan(self, view: StepView) -> Plan:
        return self._policy.plan(view)._replace(repeat=1)


def test_what_settles_behind_a_new_graph_may_be_the_next_call() -> None:
    """Calls of one step, as the policy asks: the third one is behind the first one that decodes."""
    for n, seconds in ((1, 10), (2, 20), (3, 21), (4, 21)):
        (new,) = outcomes([one(0, 0.0, 8, n)], OneByOne, new_graph=NewGraph(10.0, 1.0))
        (plain,) = outcomes([one(0, 0.0, 8, n)], OneByOne)
        assert new.end - plain.end == pytest.approx(seconds)


def test_a_graph_that_takes_nothing_more_settles_too() -> None:
    """As that of a pool on a CPU with AMX."""
    ends = [outcomes([one(0, 0.0, 8, 4)], new_graph=NewGraph(0.0, s))[0].end for s in (1.0, 0.0)]
    assert ends[0] - ends[1] == pytest.approx(1.0)


def test_nor_is_it_lost_where_a_newcomer_ends_the_call_before() -> None:
    """It comes within the step with the new graph, and waits for the only slot."""
    ends = []
    for new in (NewGraph(10.0, 1.0), NewGraph()):
        first = one(0, 0.0, 8, 4)
        prompt = outcomes([first], n_seq_max=1, new_graph=new)[0].first
        newcomer = one(1, prompt + 0.005, 8, 1)
        ends.append(outcomes([first, newcomer], n_seq_max=1, new_graph=new)[0].end)
    assert ends[0] - ends[1] == pytest.approx(21)


def test_where_a_prompt_is_behind_each_part_that_decodes_has_a_graph() -> None:
    """The second of three ends. In its slot a newcomer's prompt is computed behind the others,
    which are no neighbours: two ubatches. Its own graph is built meanwhile."""
    requests = [one(0, 0.0, 2, 40), one(1, 0.0, 2, 3), one(2, 0.0, 2, 40), one(3, 8.0, 9, 2)]
    cost = Linear(1.0, 0.1, new_graph=NewGraph(10.0), unified=False)
    spec = machine(cost=cost, unified=False, gap_max=0, prefix_cache=False)
    spec = replace(spec, sharing=Sharing())  # nothing fills the gap, and no slot is moved
    new, plain = (
        simulate(requests, replace(spec, new_graph=graph), OneByOne).outcomes
        for graph in (NewGraph(0.25), NewGraph())
    )
    took = {a.id: a.end - b.end for a, b in zip(new, plain, strict=True)}
    # Prompts and decode of three: one each. Three steps of the two: two each. Again of three: one.
    assert took[1] == pytest.approx(2 * 0.25)
    assert took[3] == pytest.approx((2 + 3 * 2 + 1) * 0.25)


def test_a_call_in_streams_reads_the_cells_of_its_own_sequences() -> None:
    """The prompt of the second one does not attend to the first, which holds 1,000 cells."""

    cost = Linear(1.0, cell_s=1.0, unified=False)
    found = outcomes([one(0, 0.0, 1000, 3), one(1, 1.5, 8, 1)], cost=cost, unified=False)
    # The first's prompt, and a step of 1,000 cells, in which the second one comes; its prompt, with
    # no cells before it, and a step of 1,001.
    second = 1 + 1001 + 1
    assert [o.end for o in found] == pytest.approx([second + 1002, second])


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
    seen: list[list[float]] = []
    plain, masking = (
        outcomes(requests, Seen, cost=cost, prefix_cache=False)[1].end
        for cost in (linear(), Masking(10e-3, 1e-3, 1e-6))
    )
    assert seen == [[0, 1100, 101], [0, 1100, 1102]]
    assert masking - plain == pytest.approx(1e-6 * sum(1102 - (101 + k) for k in range(29)))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"unified": True}, 0.012),
        ({"unified": False}, 0.013),
        ({"unified": False, "gap_max": 0}, 2 * 0.011),
        ({"unified": False, "gap_max": 0, "new_graph": NewGraph(0.5)}, 2 * 0.511 + 0.5),
    ],
)
def test_streams_that_are_no_neighbours_cost_what_is_computed(
    options: dict[str, Any], first: float
) -> None:
    """Of three the one in the middle ends: its row is computed on where gaps are filled, else the
    others need two ubatches. After one step they are neighbours."""
    _, middle, last = outcomes(
        [one(0, 0.0, 8, 31), one(1, 0.0, 8, 11), one(2, 0.0, 8, 31)], **options
    )
    assert last.end - middle.end == pytest.approx(first + 19 * 0.012)


def test_others_in_the_same_rows_cost_a_switch() -> None:
    """Where the cells are shared; two of three take turns of three steps: the others' round and
    two switches are as long as the wide step then."""

    class Costs(StepCost):
        edges = (2,)
        switch = 0.001

        def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
            return 0.010 if rows <= 2 or prefill else 0.050

    requests = [one(i, 0.0, 8, 301) for i in range(3)]
    made = machine(cost=Costs(), new_graph=NewGraph(1e-9))
    run = simulate(requests, made, lambda: width(itl=0.03))
    counters = run.loads[0].counters
    turns, wide = counters.fill[2], counters.fill[3] - 1  # the prompts' step samples three, too
    assert turns > 400
    computed = 0.010 * (counters.steps - wide) + 0.050 * wide
    assert max(o.end for o in run.outcomes) - computed == pytest.approx(
        0.001 * turns / 3, abs=0.003
    )


def test_a_token_reaches_its_reader_later() -> None:
    requests = [one(0, 0.0, 8, 3), replace(one(1, 2.0, 8, 1), after=0)]
    at_once, later = (outcomes(requests, latency=latency) for latency in (0.0, 0.5))
    for a, b, wait in zip(at_once, later, (0.5, 1.0), strict=True):
        assert b.first - a.first == pytest.approx(wait)
        assert b.end - a.end == pytest.approx(wait)
        assert b.tpot == (None if a.tpot is None else pytest.approx(a.tpot))


def test_a_newcomer_waits_for_the_step_that_goes_on_and_no_longer() -> None:
    first, second = outcomes([one(1, 0.0, 90, 1000), one(2, 0.105, 40, 1)])
    assert second.admitted == pytest.approx(0.111)  # the first decode begins at 0.1, takes 11 ms
    assert second.first == second.end == pytest.approx(0.111 + 0.010 + 0.041)
    assert first.longest_itl == pytest.approx(0.051)
    assert first.end == pytest.approx(0.1 + 998 * 0.011 + 0.051)


def test_cells_make_steps_longer() -> None:
    (o,) = outcomes([one(1, 0.0, 100, 101)], cost=linear(1e-5))
    assert o.end == pytest.approx(0.110 + 100 * 0.011 + 1e-5 * sum(range(100, 200)))


def test_an_end_of_text_before_the_budget() -> None:
    run = simulate([one(1, 0.0, 10, 5, max_tokens=50), one(2, 0.0, 10, 20)], machine())
    assert [(o.id, o.n_output) for o in run.outcomes] == [(1, 5), (2, 20)]
    assert run.outcomes[0].end == pytest.approx(0.030 + 4 * 0.012)


def test_queueing_and_a_closed_loop() -> None:
    requests = [one(1, 0.0, 10, 3), one(2, 0.0, 10, 3), one(3, 0.5, 10, 3, after=1)]
    a, b, c = outcomes(requests, n_seq_max=1)
    assert b.queueing == pytest.approx(a.end)
    assert c.arrival == pytest.approx(a.end + 0.5)


@pytest.mark.parametrize("policy", [device_aware, slo])
def test_a_target_brings_the_first_token_sooner(policy: Callable[[], Policy]) -> None:
    """A short prompt behind a long one, of which a step takes 500 tokens."""

    def first(**short: float) -> tuple[float, float, float]:
        requests = [one(1, 0.0, 2000, 5), one(2, 0.1, 50, 5, **short)]
        long, late = outcomes(requests, policy, n_batch=500)
        return round(ttft(late), 3), round(ttft(long), 3), max(late.end, long.end)

    plain, long, end = first()
    aimed, delayed, last = first(ttft_target=0.6)
    assert plain == 2.001  # behind four steps
    assert 0.5 < aimed <= 0.561  # in one that is shorter
    assert 0 < delayed - long < 0.2
    assert last < end + 0.1
    assert first(ttft_target=2.0)[0] > aimed  # there is time for more


def test_a_flood_of_targets_does_not_hold_back_one_without_for_ever() -> None:
    flood = draw("closed:clients=8,n=300,prompt=100,output=20", 1)
    late = [replace(request, ttft_target=0.5) for request in flood]
    alone = one(1000, 1.0, 50, 5)
    found = {o.id: o for o in simulate([*late, alone], machine(), device_aware).outcomes}
    assert ttft(found[1000]) < 11.0
    assert max(o.end for o in found.values()) > 30.0


def test_a_long_prompt_without_a_target_leaves_those_with_one_half_of_the_rows() -> None:
    """Also when it has waited for so long that it goes before them."""
    soon = [one(i, 2.0 * i, 50, 5, ttft_target=2.5) for i in range(6, 16)]
    requests = [one(1000, 0.0, 30_000, 5), *soon]
    run = simulate(requests, machine(n_cells=40_000), device_aware)
    found = {o.id: o for o in run.outcomes}
    assert max(ttft(found[request.id]) for request in soon) < 2.5
    assert ttft(found[1000]) < 34.0


def test_what_can_never_fit_is_rejected_and_the_rest_goes_on() -> None:
    requests = [one(1, 0.0, 5000, 5), one(2, 0.25, 10, 5, after=1), one(3, 0.0, 10, 5)]
    run = simulate(requests, machine())
    assert [(o.id, o.rejected) for o in run.outcomes] == [(1, True), (3, False), (2, False)]
    assert run.outcomes[-1].arrival == 0.25
    assert run.summary()["rejected"] == 1


def test_a_router_is_not_asked_about_what_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of its prompt may be 4 GiB."""
    sizes: list[int] = []

    class Asking(RoundRobin):
        def choose(self, prompt: Any, replicas: Mapping[Any, ReplicaView], key: str = "") -> Any:
            sizes.append(len(prompt()))
            return super().choose(prompt, replicas, key)

    monkeypatch.setitem(ROUTERS, "asking", Asking)
    simulate([one(1, 0.0, 5000, 5), one(2, 0.0, 10, 5)], machine(), router="asking")
    assert sizes == [10]


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("speculate", [True, False])
def test_a_deadline_ends_what_runs_and_what_waits(unified: bool, speculate: bool) -> None:
    """After the step that it falls into, as in a live engine; one after another arrives then."""
    requests = [one(i, 0.0, 8, 400, deadline=0.5, acceptance=0.7) for i in range(6)]
    later = one(9, 0.25, 8, 3, after=0, deadline=9.0)
    run = simulate([*requests, later], machine(unified=unified, speculate=speculate), fcfs)
    found = {o.id: o for o in run.outcomes}
    ended = [found[i] for i in range(6)]
    assert {o.deadline for o in ended} == {True}
    assert len({o.end for o in ended}) == 1
    assert 0.5 <= ended[0].end < 0.55
    assert all(10 < o.n_output < 100 for o in ended[:4])
    assert [(o.n_output, o.ttft, o.queueing) for o in ended[4:]] == [(0, None, ended[0].end)] * 2
    assert (found[9].arrival, found[9].n_output, found[9].deadline) == (
        ended[0].end + 0.25,
        3,
        False,
    )
    figures = run.summary({"e2el": 9.0})
    assert figures["deadlines"] == 6
    assert figures["slo_share"] == pytest.approx(1 / 7)
    n_tokens = sum(o.n_output for o in run.outcomes)
    assert figures["tokens_per_s"] == pytest.approx(n_tokens / figures["duration"])
    assert run.loads[0].counters.tokens == n_tokens


def test_a_prefix_is_computed_once() -> None:
    """Of prompts of 100 tokens in common and 20 of their own, when the first has been computed; a
    conversation goes on with its own answer, of which the token sampled last is in no cell."""
    requests = [TraceRequest(i, i, 120, 3, ((0, 100), (10 + i, 20)), 20 + i) for i in range(3)]
    run = simulate(requests, machine())
    assert [o.prefix for o in run.outcomes] == [0, 100, 100]
    assert [round(ttft(o), 6) for o in run.outcomes] == [0.130, 0.030, 0.030]
    assert run.summary()["prefix_share"] == pytest.approx(200 / 360)
    assert [o.prefix for o in outcomes(requests, prefix_cache=False)] == [0, 0, 0]
    first = TraceRequest(1, 0.0, 100, 50, ((0, 100),), 1)
    second = TraceRequest(2, 1.0, 170, 5, ((0, 100), (1, 50), (2, 20)), 3, after=1)
    assert outcomes([first, second])[1].prefix == 149


def test_preemption() -> None:
    run = simulate([one(i, 0.0, 100, 150) for i in range(4)], machine(n_cells=600))
    found = run.summary()
    assert found["preemptions"] > 0
    assert all(o.preemption > 0 for o in run.outcomes if o.preemptions)
    assert found["kv_peak"] <= 1


def test_a_preempted_sequence_comes_back_from_the_host_where_that_is_cheaper() -> None:
    """A state of 100 KB a token, 2 GB a second: a twentieth of computing a token again."""
    requests = [one(i, 0.0, 100, 150) for i in range(4)]
    found = {}
    for mode in ("recompute", "auto", "swap"):
        swap = SwapChoice(mode, bytes_per_token=1e5)
        spec = replace(machine(n_cells=600, prefix_cache=False), swap=swap)
        first, again = simulate(requests, spec, "fcfs"), simulate(requests, spec, "fcfs")
        assert everything(first) == everything(again)  # what one has learnt is not the next one's
        found[mode] = first
    counters = {mode: run.loads[0].counters for mode, run in found.items()}
    assert counters["recompute"].preemptions > 0
    assert counters["recompute"].loaded_tokens == 0
    assert counters["auto"].loaded_tokens == counters["swap"].loaded_tokens > 100
    free = replace(machine(n_cells=600, prefix_cache=False), swap=SwapChoice("swap"))
    seconds = {mode: max(o.end for o in run.outcomes) for mode, run in found.items()}
    copied = seconds["swap"] - max(o.end for o in simulate(requests, free, "fcfs").outcomes)
    assert copied == pytest.approx(2 * counters["swap"].loaded_tokens * 1e5 / 2e9)
    assert seconds["auto"] == seconds["swap"] < seconds["recompute"]


def test_a_copy_of_a_stream_takes_its_time() -> None:
    """The second one's prompt begins with all of the first one's, which is cached."""
    first = TraceRequest(1, 0.0, 100, 50, ((0, 100),), 1)
    second = TraceRequest(2, 1.0, 170, 5, ((0, 100), (1, 50), (2, 20)), 3, after=1)
    ends = []
    for seconds in (0.0, 1e-4):
        swap = SwapChoice("recompute", stream_seconds=seconds)
        run = simulate([first, second], replace(machine(unified=False), swap=swap), n_trace=1000)
        assert [o.prefix for o in run.outcomes] == [0, 149]
        ends.append(run.outcomes[1].end - run.outcomes[0].end)
        (trace,) = run.traces
        assert (trace["t_start_ns"][-1] + trace["decode_ns"][-1]) * 1e-9 == pytest.approx(
            run.outcomes[1].end
        )
    assert ends[1] - ends[0] == pytest.approx(2e-4)  # out of the way, and back


def test_replicas_share_the_traffic() -> None:
    requests = draw("closed:clients=16,n=200,prompt=50,output=40-80,prefix=40,prefixes=4", 0)
    alone = simulate(requests, machine()).summary()["duration"]
    for router in ("round-robin", "least-outstanding", "prefix-affinity"):
        run = simulate(requests, machine(), n_replicas=4, router=router)
        assert {o.replica for o in run.outcomes} == {0, 1, 2, 3}
        assert run.summary()["duration"] < 0.4 * alone
        assert [bool(load.points) for load in run.loads] == [True] * 4


def test_affinity_finds_more_in_the_cache() -> None:
    requests = draw("poisson:rate=20,n=400,prompt=300,output=10,prefix=250,prefixes=16", 0)
    turns, affinity = (
        simulate(requests, machine(n_cells=2048), n_replicas=4, router=router).summary()
        for router in ("round-robin", "prefix-affinity")
    )
    assert affinity["prefix_share"] > 1.3 * turns["prefix_share"]


def test_a_router_knows_what_replicas_said_up_to_a_second_ago(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    class Watching(RoundRobin):
        def choose(self, prompt: Any, replicas: Mapping[Any, ReplicaView], key: str = "") -> Any:
            waits.append(replicas[0].wait)
            return super().choose(prompt, replicas, key)

    monkeypatch.setitem(ROUTERS, "watching", Watching)
    requests = [one(i, 0.25 * i, 500, 100) for i in range(40)]
    simulate(requests, machine(n_seq_max=2, n_cells=4096), n_replicas=2, router="watching")
    seconds = [set(waits[i : i + 4]) for i in range(0, len(waits), 4)]
    assert [len(values) for values in seconds] == [1] * 10
    assert len(set(waits)) > 4


def test_a_replica_says_how_long_a_request_waits() -> None:
    replica = SimulatedReplica(machine(n_seq_max=2), make_policy("fcfs"), lambda outcome: None)
    replica.report()
    row_seconds = replica.seen.row_seconds
    assert replica.seen == ReplicaView(0, 0.0, row_seconds)
    assert row_seconds > 0
    waits: list[float] = []
    now = 0.0
    for i in range(6):
        replica.submit(one(i, now, 50, 20), now)
        replica.step(now)
        now = replica.next
        assert replica.seen.wait == (waits or [0.0])[-1]  # what it said last
        replica.report()
        waits.append(replica.seen.wait)
    assert waits[:2] == [0, 0]  # a slot is free
    assert waits[-1] > 4 * 50 * row_seconds


def test_curves_are_thinned_out() -> None:
    run = simulate(draw("poisson:rate=100,n=3000,prompt=5,output=5", 0), machine())
    times = [t for t, *_ in run.loads[0].points]
    assert 1000 <= len(times) <= 2000
    assert times == sorted(times)


def everything(run: Simulated) -> list[tuple[object, ...]]:
    return [astuple(o) for o in run.outcomes]


drawn_requests = st.lists(
    st.tuples(
        st.floats(0, 2), st.integers(1, 120), st.integers(1, 60), st.integers(0, 2), st.booleans()
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, phases=[Phase.reuse, Phase.generate])  # shrinking: minutes
@given(
    drawn_requests, st.sampled_from(sorted(policy_names())), st.sampled_from([300, 1000]),
    st.booleans(), st.booleans(),
)  # fmt: skip
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
    assert run.loads[0].counters.steps > 0
    assert everything(simulate(requests, how, policy)) == everything(run)
    if policy in ("fcfs", "sarathi", "static", "prefill-first") and not cache:
        slow = simulate(requests, how, lambda: OneByOne(policy))
        for a, b in zip(run.outcomes, slow.outcomes, strict=True):
            assert a.id == b.id
            assert (a.first, a.end) == pytest.approx((b.first, b.end))


class Later:
    def plan(self, view: StepView) -> Plan:
        return Plan(wake=view.now + 1) if view.now < 3 else Plan({1: 1})


@pytest.mark.parametrize("unified", [True, False])
def test_cells_that_are_held_are_those_of_running_sequences(unified: bool) -> None:
    """Cached ones are not, nor the streams that these lie in."""
    requests = [one(i, 0.0, 100, 50) for i in range(9)]
    for cache in (True, False):
        run = simulate(requests, machine(unified=unified, prefix_cache=cache), "fcfs")
        held = [cells for *_, cells in run.loads[0].points]
        assert (held[0], min(held), max(held)) == (0, 0, 400)
        assert run.loads[0].kv_peak == 4 * 149


def test_a_policy_may_wait() -> None:
    (o,) = outcomes([one(1, 0.0, 1, 1)], Later)
    assert o.admitted == 3.0
    (o,) = outcomes([one(1, 0.0, 1, 1, deadline=1.5)], Later)
    assert (o.end, o.n_output, o.deadline) == (1.5, 0, True)


class Polls:
    def plan(self, view: StepView) -> Plan:
        return Plan(wake=view.now + 1)


class Bad:
    def plan(self, view: StepView) -> Plan:
        return Plan({7: 1})


@pytest.mark.parametrize(
    ("requests", "options", "error", "says"),
    [
        ([one(1, 0.0, 1, 1)], {"policy": Bad}, PlanError, "known-sequence"),
        ([one(1, 0.0, 1, 1)] * 2, {}, ArgumentError, "every id once"),
        ([one(1, 0.0, 1, 1)], {"policy": Polls}, SimulationStuck, "Polls leaves 1 request"),
        ([], {"policy": 3}, ArgumentError, "policy=3: must have plan"),
        ([], {"n_replicas": 0}, ArgumentError, "replicas"),
        ([], {"n_replicas": 1.5}, ArgumentError, "n_replicas"),
        ([], {"n_trace": -1}, ArgumentError, "n_trace"),
        ([], {"router": "random"}, ArgumentError, "router"),
        ([], {"policy": "none"}, ArgumentError, "policy"),
        ([one(1, 0, 5, 5), one(2, 0, 5, 5, after=9)], {}, ArgumentError, "after=9"),
        ([one(1, 0, 5, 5, after=1)], {}, SimulationStuck, "1 request"),
    ],
)
def test_a_bad_plan_and_bad_arguments(
    requests: list[TraceRequest], options: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        simulate(requests, machine(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"n_seq_max": 0}, {"n_seq_max": 2.5}, {"n_seq_max": 257}, {"n_cells": 0}, {"n_cells": 1e4},
        {"n_ubatch": 0}, {"n_batch": 3}, {"unified": "auto"}, {"overhead": float("nan")},
        {"overhead": -1.0}, {"cost": None}, {"cost": "m2-ultra"},
    ],
)  # fmt: skip
def test_an_engine_that_can_not_be(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ArgumentError, match=name):
        machine(**options)


def test_targets_have_names() -> None:
    run = simulate([one(1, 0.0, 5, 5)], machine())
    with pytest.raises(ArgumentError, match="slo='speed': one of ttft"):
        run.summary({"speed": 1.0})


def test_a_policy_object_is_made_for_each_replica() -> None:
    made: list[Policy] = []

    def make() -> Policy:
        made.append(sarathi())
        return made[-1]

    requests = draw("poisson:rate=9,n=20", 0)
    run = simulate(requests, machine(), make, n_replicas=3)
    assert len(made) == 3
    assert run.policy == "make"
    for policy in (fair(), device_aware()):  # objects that have a state
        run, again = (simulate(requests, machine(), policy, n_replicas=3) for _ in range(2))
        assert everything(run) == everything(again)
        assert run.policy == "ComposedPolicy"
