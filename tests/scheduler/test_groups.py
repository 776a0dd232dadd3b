"""Newcomers that wait for the next one, so that their prompts are computed together."""

from dataclasses import dataclass

import pytest

from pyllamabatch.cost.step_cost import NewGraph, StepCost
from pyllamabatch.scheduler import ComposedPolicy, Limits, Plan, SequenceView, StepView
from pyllamabatch.scheduler.policies.groups import HOLD_SECONDS, InGroups
from pyllamabatch.scheduler.policies.parts import when_it_fits

LIMITS = Limits(512, 512, 32, 32 * 256, 256, unified=False, fills=True)
N = 20  # sequences that decode


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
    policy = ComposedPolicy(admit=InGroups(when_it_fits))
    for i in range(99, 0, -1):
        at = 9.0 - i * every
        plan(policy, at, newcomers(1, at), None)
    waiting = newcomers(n, 9.0, ttft_target)
    answer = plan(policy, now, waiting, cost, decoding, limits)
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
    assert joined(every=1.1 * HOLD_SECONDS) == 1
    assert joined(9.025, cost=Calls(4e-3)) == 0  # 22 sequences would gain 4 / 3 ms each
    assert joined(9.035, cost=Calls(4e-3)) == 1  # the next one is late
    policy = ComposedPolicy(admit=InGroups(when_it_fits))
    since, longest = 0.0, 0.0
    for i in range(3000):  # there is always one that came just now
        now = i / 1000
        if plan(policy, now, newcomers(1, now), CALLS).tokens:
            longest, since = max(longest, now - since), now
    assert HOLD_SECONDS / 2 < longest <= HOLD_SECONDS


@pytest.mark.parametrize(("target", "n"), [(1.0, 0), (0.03, 0), (0.02, 1)])
def test_a_first_token_that_is_due_is_not_late_for_it(target: float, n: int) -> None:
    assert joined(ttft_target=target) == n
