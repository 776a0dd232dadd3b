"""Drafting: which steps tell what drafts have gained and lost."""

from typing import Any

import numpy as np
import pytest

from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import KvOptions, Limits, Scheduler
from pyllamabatch.scheduler.drafting import _LOST_MOST, Drafted, Drafting
from pyllamabatch.scheduler.policies.composed import ComposedPolicy
from pyllamabatch.scheduler.policy import PlanBuilder, Speculation
from pyllamabatch.scheduler.step import Step
from tests.support.made_up_costs import Linear
from tests.support.scheduler_machine import Known

STREAMS = Limits(
    n_batch=16,
    n_ubatch=16,
    n_seq_max=4,
    n_cells=400,
    n_cells_seq=100,
    unified=False,
    n_draft_max=4,
    n_outputs=16,
)
SHARING = Sharing(copy_whole=True, trim=True, n_cached=4)
PLAIN = Linear(0.01, 0.0)


class Steps:
    """Of a scheduler, whose policy plans no drafts."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(
            STREAMS, ComposedPolicy(), kv=KvOptions(SHARING, retain=True), cost=PLAIN
        )
        assert self.scheduler.drafting is not None
        self.drafting = self.scheduler.drafting
        self._tokens: dict[int, list[int]] = {}

    def add(self, id: int, n_prompt: int) -> None:
        """Its prompt begins as all others do."""
        self._tokens[id] = list(range(n_prompt))
        known: Any = Known(self._tokens, id)
        self.scheduler.add(id, n_prompt, 30, arrival=0.0, tokens=known)

    def plan(self) -> Step:
        step = self.scheduler.plan(0.0)
        assert step is not None
        return step

    def lost(self, step: Step, seconds: float) -> float:
        """Credit, by a step that has taken so long."""
        before, n = self.drafting.credit, step.n_rows
        shares, timed = np.zeros((8, 4)), np.bincount([n], minlength=17)
        taken = np.ones(8, np.int32)
        drafted = Drafted(taken, n, 0, 0, shares, shares, seconds, timed, timed * seconds)
        self.scheduler.advance(step, 1, 0.0, drafted if len(step.decode) else None)
        for tokens in self._tokens.values() if len(step.decode) else ():
            tokens.append(len(tokens))
        return before - self.drafting.credit


@pytest.mark.parametrize("first", ["nothing", "a copy", "a prompt"])
def test_what_a_step_waits_for_is_not_lost_by_drafts(first: str) -> None:
    steps = Steps()
    steps.add(1, 33)
    for _ in range(20):
        steps.lost(steps.plan(), 0.01)
    if first == "a copy":
        steps.add(2, 33)  # but its last token it has all from the first one
    elif first == "a prompt":
        steps.scheduler.remove(1, worth=False)
        steps.add(2, 16 + 1)
        step = steps.plan()
        assert step.chunks
        assert not len(step.decode)
        steps.lost(step, 0.01)
    step = steps.plan()
    step.drafts = dict.fromkeys(step.decode.tolist(), 1)
    assert any(op.kind == "copy" for op in step.kv_operations) == (first == "a copy")
    assert len(step.decode)
    assert not step.chunks
    lost = steps.lost(step, 0.05)
    assert lost == (pytest.approx(0.04, rel=0.1) if first == "nothing" else 0.0)


def test_a_turn_that_was_disturbed_stops_no_drafts_for_long() -> None:
    """But where looks take so long, that is lost, from the second one on."""
    drafting = Drafting(STREAMS, 8)

    def lost(seconds: float) -> float:
        drafting.looked, before = True, drafting.credit
        drafting.turned(seconds, prompts=False)
        return before - drafting.credit

    drafting.turned(1e-4, prompts=False)  # without a look
    assert [lost(2e-4) for _ in range(20)] == pytest.approx([1e-4] * 20)
    assert lost(0.5) == pytest.approx(_LOST_MOST * 1e-4)
    assert lost(0.5) == lost(0.5) == pytest.approx(0.5, abs=1e-3)


def test_that_there_are_no_drafts_stands_where_something_ends_a_call_sooner() -> None:
    looks: list[int] = []

    def speculate(builder: PlanBuilder) -> Speculation:
        view = builder.view
        assert view.drafts is not None
        if view.drafts_in == 0:
            looks.append(view.step)
            view.drafts()
        return Speculation({}, view.drafts_in or 12)

    scheduler = Scheduler(STREAMS, ComposedPolicy(speculate=speculate, repeat=64), cost=PLAIN)
    drafting = scheduler.drafting
    assert drafting is not None
    drafting.credit = 1.0
    scheduler.add(1, 1, 90, arrival=0.0)

    def computed(n: int) -> None:
        step = scheduler.plan(0.0)
        assert step is not None
        drafting.turned(0.0, prompts=False)
        drafting.passes(n, 0.01, asked=False)
        scheduler.advance(step, n)

    for n in (1, 5, 5, 2, 3):  # the first turn has none
        computed(n)
    assert looks == [1, 13]
    scheduler.add(2, 1, 90, arrival=0.0)  # no policy is asked in its first step
    computed(1)
    computed(1)
    assert looks == [1, 13, 17]
