"""Decisions put together at random: the pieces do not depend on each other."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.scheduler import (
    ComposedPolicy,
    Decodes,
    Limits,
    PlanBuilder,
    SequenceView,
    StepView,
    Verdict,
)
from pyllamabatch.scheduler.policies.fair import LeastServed
from pyllamabatch.scheduler.policies.mlfq import ByLevel, InItsPlace, Levels, LowestLevel
from pyllamabatch.scheduler.policies.parts import (
    Aged,
    FirstCome,
    LastRanked,
    NewestFirst,
    Ranked,
    TokenBudget,
    WhatIsLeft,
    WhenItFits,
    WholeBatch,
)
from pyllamabatch.scheduler.policies.shortest import Remaining
from pyllamabatch.scheduler.policies.slo import EarliestDeadline
from tests.support.scheduler_machine import Machine, limits


class EverybodyInOrder:
    decodes = Decodes.IN_ORDER

    def __call__(self, view: StepView) -> Iterable[SequenceView]:
        return chain(view.running, view.waiting)


class OddOnesLater:
    """Skips every other one while anybody runs."""

    fits = WhenItFits()

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        if seq.id % 2 and builder.n_running:
            return Verdict.SKIP
        return self.fits(builder, seq)


LEVELS = Levels(quantum=2, n=4, prompt_rows=3)
victims = st.one_of(
    st.just(NewestFirst()),
    st.just(LastRanked(Remaining())),
    st.just(LowestLevel(LEVELS, 20)),
)
orders = st.one_of(
    st.sampled_from([Decodes.FIRST, Decodes.LAST, Decodes.APART]).map(FirstCome),
    st.sampled_from([Decodes.FIRST, Decodes.LAST, Decodes.APART]).map(
        lambda decodes: Aged(Ranked(Remaining(), decodes), 7)
    ),
    st.builds(EverybodyInOrder),
    st.builds(EarliestDeadline),
    st.builds(LeastServed),
    st.just(ByLevel(LEVELS, 20)),
)
policies = st.builds(
    ComposedPolicy,
    orders,
    st.one_of(st.builds(WhenItFits, st.floats(0, 0.3)), st.builds(OddOnesLater)),
    st.one_of(st.builds(WholeBatch), st.builds(TokenBudget, st.integers(1, 9))),
    st.builds(WhatIsLeft, st.none() | st.integers(1, 9)),
    victims,
)
with_places = st.builds(  # whoever preempts for a newcomer needs a victim that spares turns
    ComposedPolicy,
    orders,
    st.just(InItsPlace(WhenItFits())),
    st.builds(WholeBatch),
    st.builds(WhatIsLeft),
    st.just(LowestLevel(LEVELS, 20)),
)


@settings(max_examples=150, deadline=None)
@given(
    limits,
    policies | with_places,
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 30)), max_size=10),
)
def test_any_of_them_together_keep_the_rules_and_finish(
    limits: Limits, policy: ComposedPolicy, requests: list[tuple[int, int, int]]
) -> None:
    machine = Machine(limits, policy)
    for id, (a, b, end) in enumerate(requests):
        n_prompt = min(a, limits.n_cells_seq)
        most = min(b, limits.n_cells_seq - n_prompt + 1)
        machine.add(id, n_prompt, most, end, tenant="ab"[id % 2], deadline=float(-id))
    machine.run(20_000)
    assert sorted(machine.done) == list(range(len(requests)))
    assert machine.scheduler.accounting.used == 0
