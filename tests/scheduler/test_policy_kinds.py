"""What makes each policy itself, by views made up and by whole lives of sequences."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyllamabatch.scheduler import (
    ComposedPolicy,
    Limits,
    Policy,
    Prefix,
    SequenceView,
    device_aware,
    fair,
    fcfs,
    make_policy,
    mlfq,
    policy_names,
    prefill_first,
    prefix,
    sarathi,
    shortest,
    slo,
    static,
)
from pyllamabatch.scheduler.policies.fair import LeastServed
from pyllamabatch.scheduler.policies.mlfq import Levels
from tests.support.made_up_costs import Linear
from tests.support.scheduler_machine import Machine
from tests.support.views import LIMITS, decoding, prefilling, tokens, view_of, waiting

SIXTY = Limits(64, 16, 4, n_cells=60, n_cells_seq=60)


def test_fcfs_computes_whole_prompts_beside_the_decodes() -> None:
    assert tokens(fcfs(), decoding(1), waiting(2, 40), waiting(3, 40)) == {1: 1, 2: 40, 3: 23}


def test_prefill_first_lets_none_decode_while_there_is_a_prompt() -> None:
    assert tokens(prefill_first(), decoding(1), waiting(2, 40)) == {2: 40}
    assert tokens(prefill_first(), decoding(1), prefilling(2, 40, 30)) == {2: 10}
    full = [decoding(id) for id in range(4)]
    assert tokens(prefill_first(), *full, waiting(9)) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_priority_goes_before_arrival() -> None:
    line = [waiting(1, 60), waiting(2, 60, priority=1), waiting(3, 60, priority=1)]
    for policy in (fcfs(), prefill_first(), sarathi(), shortest(), slo(), prefix(), static()):
        assert tokens(policy, *line) == {2: 60, 3: 4}
    for policy in (mlfq(), fair()):  # which say that they don't look at it
        assert tokens(policy, *line) == {1: 60, 2: 4}


@pytest.mark.parametrize("spec", policy_names())
def test_of_the_lowest_priority_the_newest_is_preempted(spec: str) -> None:
    policy = make_policy(spec)
    running = [decoding(id, 20, priority=priority) for id, priority in ((1, 1), (2, 0), (3, 1))]
    plan = policy.plan(view_of(*running, limits=SIXTY))
    assert plan.preempt == ((3,) if spec in ("fair", "mlfq") else (2,))


def test_static_admits_until_the_batch_decodes_and_then_none() -> None:
    policy = static(size=3)
    assert tokens(policy, waiting(1, 60), waiting(2, 60)) == {1: 60, 2: 4}
    assert tokens(policy, decoding(1, 60), prefilling(2, 60, 4), waiting(3, 5)) == {2: 56, 3: 5}
    assert tokens(policy, decoding(1), decoding(2), waiting(3)) == {3: 10}
    assert tokens(policy, decoding(1), decoding(2, generated=2), waiting(3)) == {1: 1, 2: 1}
    full = [decoding(1), decoding(2), decoding(3)]
    assert tokens(policy, *full, waiting(4)) == {1: 1, 2: 1, 3: 1}


def test_static_batches_follow_each_other() -> None:
    machine = Machine(LIMITS, static(size=2))
    for id in range(6):
        machine.add(id, 5, 9, end=2 + id)
    machine.run()
    assert machine.done == [0, 1, 2, 3, 4, 5]
    assert machine.scheduler.counters.steps == 3 + 5 + 7  # the longest of each


def test_static_waits_for_its_batch_but_not_for_ever() -> None:
    policy = static(size=2, wait=5.0)
    plan = policy.plan(view_of(waiting(1), now=3.0))
    assert (dict(plan.tokens), plan.wake) == ({}, 6.0)
    assert tokens(policy, waiting(1), now=6.0) == {1: 10}
    assert tokens(policy, waiting(1), waiting(2), now=3.0) == {1: 10, 2: 10}
    machine = Machine(LIMITS, policy)
    machine.add(0, 5, 3, end=3)
    assert machine.scheduler.plan(1.0) is None
    assert machine.scheduler.hold(1.0) == 4.0
    machine.add(1, 5, 3, end=3)
    assert machine.scheduler.hold(1.0) == 0.0  # the batch is full
    assert [id for id, _ in machine.plan().admitted] == [0, 1]


LONG = prefilling(1, 200, 50)
COST = Linear(1.0, 0.1)


@pytest.mark.parametrize("policy", [device_aware(), slo()])
def test_the_first_token_that_is_due_soonest_comes_first(policy: Policy) -> None:
    late, soon = waiting(2, 20, ttft_target=8.5), waiting(3, 20, ttft_target=6.0)
    assert tokens(policy, LONG, late, soon) == {3: 20, 2: 20, 1: 24}
    assert tokens(policy, LONG, waiting(4, 20)) == {1: 64}
    assert tokens(policy, late, soon, waiting(4, 20, priority=1)) == {4: 20, 3: 20, 2: 20}


def test_one_that_was_preempted_is_not_overtaken() -> None:
    again = waiting(4, 20, generated=3, ttft_target=0.1)
    assert tokens(device_aware(), again, waiting(5, 60, ttft_target=0.1)) == {4: 23, 5: 41}
    assert tokens(device_aware(), waiting(5, 60, ttft_target=0.1), again) == {4: 23, 5: 41}


@pytest.mark.parametrize("policy", [device_aware(), slo()])
def test_nothing_else_is_computed_that_would_make_a_first_token_late(policy: Policy) -> None:
    soon = waiting(2, 20, ttft_target=6.3)  # due at 8.3
    assert tokens(policy, LONG, soon, cost=COST, now=2.0) == {2: 20, 1: 20}  # 5 of 6.3 s
    assert tokens(policy, LONG, soon, cost=COST, now=4.5) == {2: 20}  # 3 s
    assert tokens(policy, LONG, soon, cost=COST, now=4.6) == {2: 20, 1: 44}  # late in any case
    assert tokens(policy, LONG, soon) == {2: 20, 1: 44}


@pytest.mark.parametrize("policy", [device_aware(), slo()])
def test_what_can_not_start_yet_holds_nothing_up(policy: Policy) -> None:
    soon = waiting(2, 20, ttft_target=6.3)
    pending = soon._replace(prefix=Prefix(pending=15))
    assert tokens(policy, LONG, pending, cost=COST, now=2.0) == {1: 64}
    full = LIMITS.__class__(64, 16, 4, n_cells=210, n_cells_seq=210)
    assert tokens(policy, LONG, soon, cost=COST, now=2.0, limits=full) == {1: 64}


def test_prompts_in_turn_with_decodes_leave_them_time_within_their_target() -> None:
    streams = Limits(64, 64, 8, 8 * 400, 400, unified=False)
    readers = [decoding(id, itl_target=5.0) for id in range(4)]
    found = tokens(device_aware(), *readers, waiting(9, 100), cost=COST, limits=streams)
    assert found == {9: 36}  # and then 4 more rows: 5 s


def test_a_first_token_that_is_due_keeps_the_targets_of_others() -> None:
    reader = decoding(1, itl_target=2.0)
    soon = waiting(2, 40, ttft_target=1.0)
    assert tokens(slo(least=1), reader, soon, cost=COST, now=2.0) == {1: 1, 2: 9}


@pytest.mark.parametrize(("target", "rows"), [(3.0, 18), (1.35, 2), (1.0, 2), (100.0, 40)])
def test_slo_takes_the_largest_chunk_within_the_smallest_target(target: float, rows: int) -> None:
    running = [decoding(1, itl_target=target), decoding(2, itl_target=200.0)]
    policy = slo(least=2)
    plan = tokens(policy, *running, waiting(3, 40, itl_target=0.1), cost=COST)
    assert plan == {1: 1, 2: 1, 3: rows}


OWN = decoding(1, itl_target=2.0)


@pytest.mark.parametrize(
    ("policy", "running", "cost", "rows"),
    [
        (slo(), decoding(1), COST, 15),
        (slo(itl=2.0, least=1), decoding(1), COST, 9),
        (slo(itl=1.5, least=1), decoding(1), COST, 4),
        (slo(itl=2.0), decoding(1, itl_target=1.0), None, 15),
        (slo(itl=1.5, least=1), OWN, COST, 9),  # which goes before `itl`
        (slo(margin=0.8, least=1), OWN, COST, 5),
        (slo(budget=5), decoding(1), None, 4),
    ],
)
def test_slo_without_a_target_or_a_model_has_a_token_budget(
    policy: Policy, running: SequenceView, cost: Linear | None, rows: int
) -> None:
    assert tokens(policy, running, waiting(3, 40), cost=cost) == {1: 1, 3: rows}


def test_slo_runs_the_earliest_deadline_first_begun_or_not() -> None:
    lax = prefilling(1, 100, 50, deadline=90.0)
    assert tokens(slo(), lax, waiting(2, 60, deadline=20.0), waiting(3)) == {2: 60, 1: 4}
    assert tokens(slo(), lax, waiting(2, 60)) == {1: 50, 2: 14}
    assert tokens(slo(ttft=10.0), lax, waiting(2, 60)) == {2: 60, 1: 4}


def test_slo_takes_cells_from_the_latest_deadline() -> None:
    running = [decoding(1, 20, deadline=9.0), decoding(2, 20, deadline=5.0), decoding(3, 20)]
    view = view_of(*running, limits=SIXTY)
    plan = slo().plan(view)
    assert (plan.preempt, plan.advances(view)) == ((3,), {1: 1, 2: 1})


def test_shortest_goes_by_what_is_predicted() -> None:
    line = [waiting(1, 30, max_tokens=50), waiting(2, 30, max_tokens=9), waiting(3, 20)]
    assert tokens(shortest(), *line) == {3: 20, 2: 30, 1: 14}
    predicted = {1: 3.0, 2: 40.0, 3: 30.0}
    by_oracle = shortest(predict=lambda seq: predicted[seq.id])
    assert tokens(by_oracle, *line) == {1: 30, 3: 20, 2: 14}


def test_the_longest_is_preempted() -> None:
    running = [decoding(id, 20, max_tokens=most) for id, most in ((1, 50), (2, 9), (3, 30))]
    assert shortest().plan(view_of(*running, limits=SIXTY)).preempt == (1,)


@pytest.mark.parametrize("policy", [shortest(patience=20), prefix(patience=20)])
def test_patience_ends(policy: Policy) -> None:
    """A long request against short ones that never end to come."""
    machine = Machine(Limits(64, 16, 1, 400, 400), policy)
    machine.add(0, 5, 3)
    machine.step()
    machine.add(1, 50, 90)
    for id in range(2, 40):
        machine.add(id, 10, 2)
        machine.step()
        machine.step()
    assert 1 in machine.first_rows[:12]
    machine.run()


def test_levels() -> None:
    levels = Levels(quantum=4, growth=2, n=4, prompt_rows=10)
    assert [levels(waiting(1, n)) for n in (1, 40, 41, 80, 81, 160, 161, 9999)] == [
        0, 0, 1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    sinks = [levels(waiting(1, 5, generated=n)) for n in (3, 4, 11, 12, 27, 28, 999)]
    assert sinks == [0, 1, 1, 2, 2, 3, 3]
    assert [levels(waiting(1, 50, generated=n)) for n in (7, 8, 23, 24)] == [1, 2, 2, 3]
    view = view_of(decoding(1, 5, 11), decoding(2, 50, 8), decoding(3, 9999, 9))
    assert levels.at(levels.of(view.running)).tolist() == [levels(s) for s in view.running]


def test_mlfq_gives_the_place_of_one_that_has_sunk_to_a_newcomer() -> None:
    policy = mlfq(quantum=4, prompt_rows=10)
    full = [decoding(1, generated=9), decoding(2, generated=30), decoding(3, generated=30)]
    newest = decoding(4, generated=40, turn=3)  # is in its turn
    view = view_of(*full, newest, waiting(9))
    plan = policy.plan(view)
    assert plan.preempt == (3,)
    assert plan.advances(view) == {1: 1, 2: 1, 4: 1, 9: 10}
    assert plan.reasons[3] == "preempted: sequence 9 takes its place"
    long = waiting(9, 9999)  # of the worst level
    assert policy.plan(view_of(*full, newest, long)).preempt == ()
    starved = view_of(*full, newest, waiting(9, 300, queued=5), step=2005)
    assert policy.plan(starved).preempt == (3,)


def test_mlfq_preempts_none_in_vain() -> None:
    """No victim has cells enough: none is preempted."""
    policy = mlfq(quantum=4)
    running = [decoding(1, 250, 3), decoding(2, 10, 40), decoding(3, 10, 40)]
    assert policy.plan(view_of(*running, waiting(9, 300))).preempt == ()


def test_mlfq_preempts_the_one_admitted_last() -> None:
    """Not the one that came last: sequence 1 was preempted before."""
    view = view_of(*(decoding(id, 4, 11) for id in (3, 2, 1)), limits=Limits(64, 64, 4, 40, 40))
    assert view.kv.free < 0
    assert mlfq().plan(view).preempt[0] == 1


def test_short_answers_overtake_long_ones() -> None:
    done = {}
    for policy in (sarathi(), mlfq(quantum=4)):
        machine = Machine(Limits(64, 16, 2, 400, 400), policy)
        for id, end in ((0, 80), (1, 80), (2, 3), (3, 3)):
            machine.add(id, 5, 100, end)
        machine.run()
        done[policy] = machine.done
    assert list(done.values()) == [[0, 1, 2, 3], [2, 3, 0, 1]]


@pytest.mark.parametrize(
    ("served", "advances"),
    [
        (decoding(1, 50, 20, tenant="a"), {1: 1, 3: 30, 4: 30, 2: 3}),
        # Once b has been charged for two prompts of 30 it is b's 60 against a's 50 + 2 * 2.
        (decoding(1, 50, 2, tenant="a"), {1: 1, 3: 30, 4: 30, 2: 3}),
        (decoding(1, 20, 2, tenant="a"), {1: 1, 3: 30, 2: 30, 4: 3}),
    ],
)
def test_the_tenant_that_was_served_least_is_next(
    served: SequenceView, advances: dict[int, int]
) -> None:
    line = [waiting(2, 30, tenant="a"), waiting(3, 30, tenant="b"), waiting(4, 30, tenant="b")]
    assert tokens(fair(budget=64), served, *line) == advances


def service(machine: Machine, tenant: str) -> float:
    policy = machine.scheduler.policy
    assert isinstance(policy, ComposedPolicy)
    served = policy.order.__self__.counters(machine.scheduler.view(0.0))  # type: ignore[attr-defined]
    return float(served[tenant])


def test_a_crowd_gets_no_more_than_a_single_tenant() -> None:
    """b has as much as a, who asks ten times as often: the bound of the paper, for one prompt and
    one batch of answers."""
    machine = Machine(Limits(64, 16, 4, 400, 400), fair())
    for id in range(60):
        machine.add(id, 10, 20, tenant="b" if id % 10 == 0 else "a")
    while any(seq.tenant == "b" for seq in machine.scheduler.view(0.0).waiting):
        machine.step()
        assert abs(service(machine, "a") - service(machine, "b")) <= 2 * 4 * (10 + 2 * 20)
    machine.run()


def test_who_comes_late_has_saved_nothing_up() -> None:
    machine = Machine(Limits(64, 16, 1, 400, 400), fair())
    for id in range(10):
        machine.add(id, 10, 40, tenant="a")
    while len(machine.done) < 6:
        machine.step()
    for id in range(10, 16):
        machine.add(id, 10, 40, tenant="b")
    while len(machine.done) < 12:
        machine.step()
    late = [id for id in machine.done[6:] if id >= 10]
    assert len(late) == 3  # half of what was served from then on, though b had had nothing


def test_tenants_that_run_and_do_not_wait_count_too() -> None:
    line = [waiting(id, 3, tenant=tenant) for id, tenant in enumerate("abcd", 2)]
    assert tokens(fair(), decoding(1, tenant="e"), *line)[1] == 1


def life(policy: ComposedPolicy, requests: list[tuple[int, int, str]]) -> list[int]:
    """In which order they run first, and end: two of each three come while others run."""
    machine = Machine(Limits(16, 8, 2, 90, 90), policy)
    for id, (n_prompt, n, tenant) in enumerate(requests):
        machine.add(id, n_prompt, n, tenant=tenant)
        for _ in range(0 if id % 3 else 4):
            machine.step()
    machine.run()
    return machine.first_rows + machine.done


ONCE_EACH = [(2 + i % 5, 1 + 7 * (i % 4), f"user {i}") for i in range(40)]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 20), st.sampled_from("abcd")), max_size=24
    )
)
@example(ONCE_EACH)
def test_forgetting_a_tenant_changes_nothing(requests: list[tuple[int, int, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LeastServed, "_forget", lambda *all: None)
        expected = life(fair(), requests)
    assert life(fair(), requests) == expected


def test_tenants_with_nothing_to_do_are_forgotten() -> None:
    policy = fair()
    machine = Machine(Limits(16, 8, 2, 90, 90), policy)
    for id in range(60):
        machine.add(id, 2 + id % 13, 1 + id % 5, tenant=f"user {id}")
        while machine.scheduler.n_waiting:
            machine.step()
    least_served = policy.order.__self__  # type: ignore[attr-defined]
    assert len(least_served._numbers) <= 16
    assert len(least_served._served) <= 32


def test_the_longest_hit_is_next() -> None:
    line = [waiting(1, 30), waiting(2, 40, prefix=Prefix(10)), waiting(3, 60, prefix=Prefix(35))]
    assert tokens(prefix(), *line) == {3: 25, 2: 30, 1: 9}
