"""Newcomers that wait for the next one, so that their prompts are computed together."""

from dataclasses import dataclass, replace

import pytest

from pyllamabatch.cost.step_cost import NewGraph, StepCost
from pyllamabatch.scheduler import (
    ComposedPolicy,
    Limits,
    Plan,
    SequenceView,
    StepView,
    device_aware,
)
from pyllamabatch.scheduler.neighbours import MOST
from pyllamabatch.scheduler.policies.newcomers import GROUP_WAIT_SECONDS, InGroups
from pyllamabatch.scheduler.policies.parts import soonest_due, when_it_fits
from pyllamabatch.scheduler.view import Prefix

LIMITS = Limits(512, 512, 32, 32 * 256, 256, unified=False, fills=True)
N = 20  # sequences that decode
LAST_SLOT = replace(LIMITS, n_seq_max=N + 1)


DEAR = NewGraph(1.0)


@dataclass
class Calls(StepCost):
    """A call of prompts takes `call` seconds more than its rows."""

    call: float = 10e-3
    calibrated: bool = True
    new_graph: NewGraph = DEAR
    unified: bool = False

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return 2e-3 + 1e-5 * rows + (self.call if prefill else 0.0)


CALLS = Calls()
# a new graph is worth that four sequences decode a step later
FOUR_BEHIND = Calls(new_graph=NewGraph(4.5 * 2.2e-3 / N))


def newcomers(n: int, at: float, ttft_target: float | None = None) -> list[SequenceView]:
    """The last one arrives `at` this time, the others 10 ms before each other."""
    return [
        SequenceView(N + i, at - 0.01 * (n - 1 - i), 50, max_tokens=9, ttft_target=ttft_target)
        for i in range(n)
    ]


def plan(
    policy: ComposedPolicy,
    now: float,
    waiting: list[SequenceView],
    cost: StepCost | None,
    decoding: int = N,
    limits: Limits = LIMITS,
) -> Plan:
    running = [SequenceView(i, 0.0, 9, 10, 2, 99, running=True) for i in range(decoding)]
    return policy.plan(StepView.of(limits, running, waiting, now=now, cost=cost))


def expecting(every: float = 0.02) -> ComposedPolicy:
    """Newcomers came `every` so many seconds until 9.0, and each joined at once."""
    policy = ComposedPolicy(admit=InGroups(when_it_fits), order=soonest_due)
    for i in range(99, 0, -1):
        at = 9.0 - i * every
        plan(policy, at, [SequenceView(1000 + i, at, 50)], None)
    return policy


def joined(
    now: float = 9.0,
    n: int = 1,
    *,
    every: float = 0.02,
    ttft_target: float | None = None,
    cost: StepCost | None = CALLS,
    decoding: int = N,
    limits: Limits = LIMITS,
) -> int:
    """How many of n newcomers join, where others came `every` so many seconds until 9.0."""
    waiting = newcomers(n, 9.0, ttft_target)
    answer = plan(expecting(every), now, waiting, cost, decoding, limits)
    if not answer.tokens:
        assert answer.decode_all
        assert answer.repeat == 1  # it is asked again at the next step
    return len(answer.tokens)


def test_a_newcomer_waits_for_the_next_one() -> None:
    assert joined() == 0
    assert joined(n=2) == 0  # for a third: 23 sequences would gain 10 / 9 ms each, in 20 ms
    assert joined(n=3) == 3  # 24 would gain 10 / 18 ms
    assert joined(n=2, every=0.04) == 2


def test_not_where_it_gains_nothing() -> None:
    assert joined(cost=None) == 1
    assert joined(cost=Calls(calibrated=False)) == 1  # a guess
    assert joined(cost=Calls(call=1e-3)) == 1
    assert joined(cost=Calls(new_graph=NewGraph())) == 1  # they are not computed together
    assert joined(limits=Limits(512, 512, 32, 32 * 256, 256, unified=False)) == 1
    assert joined(limits=Limits(512, 512, 32, 32 * 256, 256)) == 0  # in a pool they are
    assert joined(limits=Limits(99, 99, 32, 32 * 256, 256, unified=False, fills=True)) == 1
    assert joined(decoding=0) == 1  # none decodes: the device would wait, too


def test_none_waits_for_long() -> None:
    assert joined(every=1.1 * GROUP_WAIT_SECONDS) == 1
    assert joined(9.025, cost=Calls(4e-3)) == 0  # 22 sequences would gain 4 / 3 ms each
    assert joined(9.035, cost=Calls(4e-3)) == 1  # the next one is late
    policy = ComposedPolicy(admit=InGroups(when_it_fits))
    since, longest = 0.0, 0.0
    for i in range(3000):  # there is always one that came just now, and is cancelled soon
        now = i / 1000
        first, next_one = SequenceView(N, since, 50), SequenceView(N + 1 + i, now, 50)
        if plan(policy, now, [first._replace(id=round(since * 1e6) + N), next_one], CALLS).tokens:
            longest, since = max(longest, now - since), now + 1 / 1000
    assert GROUP_WAIT_SECONDS / 2 < round(longest, 9) <= GROUP_WAIT_SECONDS


@pytest.mark.parametrize(("target", "n"), [(1.0, 0), (0.03, 0), (0.02, 1)])
def test_a_first_token_that_is_due_is_not_late_for_it(target: float, n: int) -> None:
    assert joined(ttft_target=target) == n


def one(
    id: int, at: float = 9.0, n_prompt: int = 50, *, priority: int = 0, due: float | None = None
) -> SequenceView:
    target = None if due is None else due - at
    return SequenceView(id, at, n_prompt, max_tokens=9, priority=priority, ttft_target=target)


def test_each_target_counts_and_each_prompt() -> None:
    assert not plan(expecting(), 9.0, [one(N, priority=1)], CALLS).tokens
    assert (
        len(plan(expecting(), 9.0, [one(N, priority=1), one(N + 1, due=9.02)], CALLS).tokens) == 2
    )
    wide = Limits(4096, 4096, 32, 32 * 4096, 4096, unified=False, fills=True)
    both = [one(N, 8.999, 2, due=9.05), one(N + 1, n_prompt=1000, due=9.05)]
    assert len(plan(expecting(), 9.0, both, CALLS, limits=wide).tokens) == 2
    assert not plan(expecting(), 9.0, [*both[:1], one(N + 1)], CALLS, limits=wide).tokens


@pytest.mark.parametrize(("seconds", "n"), [(1.0, 0), (0.03, 0), (0.02, 1)])
def test_nor_does_a_deadline_pass(seconds: float, n: int) -> None:
    waiting = [one(N)._replace(deadline=9.0 + seconds)]
    assert len(plan(expecting(), 9.0, waiting, CALLS).tokens) == n


def test_the_next_one_may_have_come_and_wait_for_a_slot() -> None:
    """No other comes any more, but one of those that decode will end."""
    waiting = [one(100 + i, 8.0) for i in range(20)]
    answer = plan(expecting(), 9.0, waiting, CALLS, decoding=31)
    assert answer.decode_all
    assert not answer.tokens
    assert len(plan(expecting(), 9.0, waiting[:1], CALLS, decoding=31).tokens) == 1


def test_not_for_a_call_that_has_no_rows_for_both() -> None:
    """Prompts are filled up to the longest one. A call has 480 rows beside those that decode."""
    for n_prompt, n in ((160, 0), (161, 2)):
        waiting = [one(N, n_prompt=10), one(N + 1, n_prompt=n_prompt)]
        assert len(plan(expecting(0.01), 9.0, waiting, CALLS).tokens) == n
    small = Limits(512, 90, 32, 32 * 256, 256, unified=False, fills=True)
    assert joined(limits=small) == 1


def test_each_waits_for_its_own_time() -> None:
    policy = expecting()
    assert not plan(policy, 9.0, [one(N)], CALLS).tokens
    assert not plan(policy, 9.09, [one(N + 1, 9.09)], CALLS).tokens  # the one before is cancelled
    policy = expecting()
    both = [one(N), one(N + 1)]
    assert not plan(policy, 9.0, both, CALLS).tokens
    assert len(plan(policy, 9.09, both, CALLS).tokens) == 2
    left = [both[1], one(N + 2, 9.09)]  # and has waited for as long
    assert len(plan(policy, 9.09, left, CALLS).tokens) == 2


def test_no_more_join_than_are_computed_together() -> None:
    """Of six that come at once."""
    for limits, n in ((LIMITS, 4), (replace(LIMITS, fills=False), 6)):
        answer = plan(expecting(), 9.0, [one(N + i) for i in range(6)], FOUR_BEHIND, limits=limits)
        assert len(answer.tokens) == n
        assert answer.decode_all
    for behind in (0.5, 1.5):  # none is computed together with another one
        few = Calls(new_graph=NewGraph(behind * 2.2e-3 / N))
        assert len(plan(expecting(), 9.0, [one(N + i) for i in range(6)], few).tokens) == 6


def test_the_last_slots_are_no_reason_to_join() -> None:
    """The next one comes as soon as one of those that decode ends."""
    assert joined(limits=LAST_SLOT) == 0


def cached(id: int) -> SequenceView:
    """One whose prompt is in the cache, but for its last token."""
    return one(id)._replace(prefix=Prefix(hit=49))


def test_one_that_was_preempted_after_its_first_token_does_not_wait() -> None:
    """Nor does it hide that another one's first token is due."""
    preempted = SequenceView(50, 8.9, 20, generated=5, max_tokens=9)
    for waiting in ([preempted], [preempted, one(N, due=9.02)]):
        assert len(plan(expecting(), 9.0, waiting, CALLS).tokens) == len(waiting)


def test_one_that_is_cached_joins_at_once() -> None:
    """Its row is one of those that decode: it is in no group."""
    for waiting in ([cached(60), one(N)], [one(N), cached(60)], [cached(i) for i in range(40, 46)]):
        answer = plan(expecting(), 9.0, waiting, FOUR_BEHIND)
        assert answer.tokens == {seq.id: 1 for seq in waiting if seq.prefix.hit}
    few = [cached(60), cached(61), one(N), one(N + 1)]
    assert plan(expecting(), 9.0, few, CALLS).tokens == {60: 1, 61: 1}  # two wait for a third
    both = [one(N), cached(60)]  # the last slot is the first one's
    assert not plan(expecting(), 9.0, both, CALLS, limits=LAST_SLOT).tokens


@pytest.mark.parametrize(("n_begun", "n"), [(1, 3), (3, 1), (4, 0), (5, 4)])
def test_prompts_that_were_begun_count(n_begun: int, n: int) -> None:
    """Four are computed behind those that decode. Five have a step of their own, and those that
    come join it."""
    decoding = [SequenceView(i, 0.0, 9, 10, 2, 99, running=True) for i in range(N)]
    begun = [SequenceView(900 + i, 8.9, 50, 20, max_tokens=9, running=True) for i in range(n_begun)]
    new = [one(N + i) for i in range(4)]
    view = StepView.of(LIMITS, [*decoding, *begun], new, now=9.0, cost=FOUR_BEHIND)
    answer = device_aware().plan(view)
    assert len(answer.tokens) == n_begun + n
    assert answer.decode_all == (n_begun < 5)


def test_each_newcomer_counts_once() -> None:
    """Twenty come each second, and four join in a step: one comes in 50 ms."""
    wide = replace(LIMITS, n_seq_max=64)
    for n, n_joined in ((1, 0), (2, 2)):  # the next one is worth 73 ms, or 26 ms
        policy = ComposedPolicy(admit=InGroups(when_it_fits), order=soonest_due)
        for burst in range(30):
            waiting = [one(1000 + 20 * burst + i, burst) for i in range(20)]
            for step in range(5):
                answer = plan(policy, burst + step / 500, waiting, FOUR_BEHIND, limits=wide)
                assert len(answer.tokens) == 4
                waiting = [seq for seq in waiting if seq.id not in answer.tokens]
        new = [one(N + i, 29.05) for i in range(n)]
        assert len(plan(policy, 29.05, new, CALLS, limits=wide).tokens) == n_joined


@pytest.mark.parametrize(("n", "n_joined"), [(MOST - 1, 0), (MOST, MOST), (MOST + 1, MOST)])
def test_a_group_is_no_larger_than_what_is_computed_together(n: int, n_joined: int) -> None:
    wide = Limits(4096, 4096, 128, 128 * 256, 256, unified=False, fills=True)
    new = [one(1000 + i) for i in range(n)]
    answer = plan(expecting(0.004), 9.0, new, Calls(20e-3), decoding=60, limits=wide)
    assert len(answer.tokens) == n_joined
