"""Parts put together at random: they do not depend on each other."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.scheduler import (
    ComposedPolicy,
    Limits,
    PlanBuilder,
    SequenceView,
    Verdict,
)
from pyllamabatch.scheduler.policies.fair import LeastServed
from pyllamabatch.scheduler.policies.mlfq import Feedback, Levels
from pyllamabatch.scheduler.policies.parts import (
    Aged,
    LastRanked,
    Ranked,
    TokenBudget,
    WhenItFits,
    all_that_is_left,
    first_come,
    newest_first,
    whole_batch,
)
from pyllamabatch.scheduler.policies.shortest import Remaining
from pyllamabatch.scheduler.policies.slo import EarliestDeadline
from tests.support.scheduler_machine import Machine, limits


class OddOnesLater:
    """Skips every other one while any runs."""

    fits = WhenItFits()

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        if seq.id % 2 and builder.n_running:
            return Verdict.SKIP
        return self.fits(builder, seq)


FEEDBACK = Feedback(Levels(quantum=2, n=4, prompt_rows=3), 20)
policies = st.builds(
    ComposedPolicy,
    order=st.one_of(
        st.just(first_come),
        st.just(Aged(Ranked(Remaining()), 7)),
        st.builds(EarliestDeadline),
        st.builds(LeastServed).map(lambda least_served: least_served.order),
        st.just(FEEDBACK.order),
    ),
    admit=st.builds(WhenItFits, st.floats(0, 0.3)) | st.builds(OddOnesLater),
    budget=st.just(whole_batch) | st.builds(TokenBudget, st.integers(1, 9)),
    chunk=st.sampled_from([all_that_is_left, lambda builder, seq: 3]),
    victim=st.sampled_from([newest_first, LastRanked(Remaining()), FEEDBACK.victim]),
    mixed=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@given(
    limits,
    policies,
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
