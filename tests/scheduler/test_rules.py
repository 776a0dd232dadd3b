"""A plan that breaks a rule is refused by the rule's name and changes nothing."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError, PlanError, RequestTooLong
from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import (
    RULES,
    ComposedPolicy,
    Limits,
    Plan,
    PlanBuilder,
    Round,
    Scheduler,
    SequenceView,
    StepView,
    Verdict,
    sarathi,
)
from pyllamabatch.scheduler.policies.parts import whole_batch
from tests.support.scheduler_machine import Machine
from tests.support.views import waiting

LIMITS = Limits(n_batch=32, n_ubatch=8, n_seq_max=3, n_cells=64, n_cells_seq=64)


class Scripted:
    """Plans as Sarathi does until it is given a plan of its own."""

    def __init__(self) -> None:
        self.next: Any = None
        self._usual = sarathi()

    def plan(self, view: StepView) -> Any:
        return self._usual.plan(view) if self.next is None else self.next


def scheduler() -> tuple[Scheduler, Scripted]:
    """1 and 2 decode, 3 is at 10 of 12 tokens, 4 waits."""
    policy = Scripted()
    made = Scheduler(LIMITS, policy)
    for id, n_prompt in ((1, 10), (2, 12), (3, 12), (4, 4)):
        made.add(id, n_prompt, 5, arrival=float(id))
    step = made.plan(0.0)
    assert step is not None
    made.advance(step)
    assert [s.decoding for s in made.view(0.0).running] == [True, True, False]
    return made, policy


def state(made: Scheduler) -> Any:
    view = made.view(0.0)
    return (
        tuple(view.running), tuple(view.waiting), set(view.decoding), view.kv.free,
        view.kv.promised, [made.slot(id) for id in (1, 2, 3, 4)], repr(made.counters),
    )  # fmt: skip


BROKEN: list[tuple[str, Any]] = [
    ("plan", {1: 1}),
    ("plan", Plan),
    ("plan", Plan([1, 2])),  # type: ignore[arg-type]
    ("plan", Plan({1: 1}, preempt=2)),  # type: ignore[arg-type]
    ("plan", Plan(decode_all=True, sit_out=2)),  # type: ignore[arg-type]
    ("decode-all", Plan(decode_all=True, sit_out={None, 7})),  # type: ignore[arg-type]
    ("decode-all", Plan({4: 4}, sit_out={None, 7})),  # type: ignore[arg-type]
    ("known-sequence", Plan({7: 1})),
    ("known-sequence", Plan({1: 1}, preempt=(7,))),
    ("whole-tokens", Plan({1: 0})),
    ("whole-tokens", Plan({1: 1, 3: -1})),
    ("whole-tokens", Plan({1: 1.0})),  # type: ignore[dict-item]
    ("whole-tokens", Plan({1: np.float64(1)})),
    ("whole-tokens", Plan({1: True})),
    ("within-remaining", Plan({1: 2})),
    ("within-remaining", Plan({3: 3})),
    ("within-remaining", Plan({4: 5}, preempt=(1,))),
    ("decode-all", Plan({1: 1}, decode_all=True)),
    ("decode-all", Plan(decode_all=True, sit_out=frozenset({1, 3}))),
    ("decode-all", Plan({1: 1}, sit_out=frozenset({2}))),
    ("slots", Plan({1: 1, 4: 1})),
    ("preempt-running", Plan({1: 1}, preempt=(4,))),
    ("preempt-running", Plan({1: 1}, preempt=(2, 2))),
    ("preempt-or-run", Plan({1: 1, 2: 1}, preempt=(2,))),
    ("repeat", Plan({1: 1, 2: 1, 3: 2}, repeat=2)),
    ("repeat", Plan({1: 1}, preempt=(2,), repeat=2)),
    ("repeat", Plan({1: 1}, repeat=0)),
    ("repeat", Plan({1: 1}, repeat=2.0)),  # type: ignore[arg-type]
    ("repeat", Plan({}, wake=9.0, repeat=2)),
    ("progress", Plan({})),
    ("wake", Plan({1: 1}, wake=9.0)),
    ("wake", Plan({}, preempt=(1,), wake=9.0)),
    ("wake", Plan({}, wake=1.0)),
    ("wake", Plan({}, wake=float("inf"))),
    ("wake", Plan({}, wake=float("nan"))),
    ("wake", Plan({}, wake="soon")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("rule", "plan"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_broken_rule_is_named_and_nothing_changes(rule: str, plan: Any) -> None:
    made, policy = scheduler()
    before = state(made)
    policy.next = plan
    with pytest.raises(PlanError) as error:
        made.plan(1.0)
    assert error.value.rule == rule
    assert RULES[rule] in str(error.value)
    assert state(made) == before
    policy.next = None
    step = made.plan(1.0)
    assert step is not None
    assert step.n_rows == 4


@pytest.mark.parametrize("preempt", [[2], {2}, np.array([2]), (id for id in (2,))], ids=repr)
def test_ids_in_any_collection_and_none_is_nothing(preempt: Any) -> None:
    made, policy = scheduler()
    policy.next = Plan(None, preempt, sit_out=None, reasons=None)  # type: ignore[arg-type]
    step = made.plan(1.0)
    assert step is not None
    assert (step.n_rows, step.preempted) == (0, ((2, 1),))
    policy.next = Plan({4: 4}, decode_all=True, sit_out=[1], drafts=None)  # type: ignore[arg-type]
    step = made.plan(1.0)
    assert step is not None
    assert (step.n_rows, step.decode.tolist()) == (4, [1])


def test_whole_numbers_of_numpy() -> None:
    """Of a plan, as a column of a view has them: what follows from it are ints."""
    number = np.int64
    made, policy = scheduler()
    ids = {id: number(id) for id in (1, 2, 3, 4)}
    policy.next = Plan({ids[1]: number(1), ids[3]: number(2)}, preempt=(ids[2],))
    step = made.plan(1.0)
    assert step is not None
    assert (step.n_rows, step.preempted) == (3, ((2, 1),))
    assert {type(n) for n in (step.n_rows, step.preempted[0][0], step.chunks[0].n)} == {int}
    made.advance(step)
    policy.next = Plan({ids[4]: number(4)})
    step = made.plan(2.0)
    assert step is not None
    assert step.admitted == ((4, 1),)
    assert type(step.admitted[0][0]) is int
    made.advance(step)
    policy.next = Plan(decode_all=True, repeat=number(2))
    step = made.plan(3.0)
    assert step is not None
    assert (step.n_rows, step.repeat, type(step.repeat)) == (3, 2, int)


@pytest.mark.parametrize("kind", [np.int64, np.uint8])
def test_parts_answer_with_whole_numbers_of_numpy(kind: Any) -> None:
    """Also of a kind that has no negative ones, where a victim gives its row back."""
    policy = ComposedPolicy(
        admit=lambda builder, seq: Verdict.ADMIT,
        budget=lambda view: kind(30),
        chunk=lambda builder, seq: kind(10),
        victim=lambda builder, seq: builder.view.running[0],
        repeat=kind(3),
        width=lambda builder: Round(frozenset(), kind(2)),
    )
    made = Scheduler(replace(LIMITS, n_cells=24), policy)
    steps = []
    for id in (1, 2):
        made.add(id, 10, 9, arrival=0.0)
    for _ in range(4):
        step = made.plan(0.0)
        assert step is not None
        steps.append((step.n_rows, step.repeat, step.preempted))
        made.advance(step)
    assert steps == [(20, 1, ()), (2, 2, ()), (2, 1, ()), (1, 1, ((1, 0),))]


def test_rows_and_cells() -> None:
    policy = Scripted()
    made = Scheduler(Limits(16, 8, 3, n_cells=21, n_cells_seq=21), policy)
    for id in (1, 2, 3):
        made.add(id, 10, 5, arrival=0.0)
    policy.next = Plan({1: 10, 2: 7})
    with pytest.raises(PlanError, match="rows of a step are at most n_batch: 17 of 16") as error:
        made.plan(0.0)
    assert error.value.rule == "rows"
    policy.next = Plan({1: 10, 2: 6})
    step = made.plan(0.0)
    assert step is not None
    made.advance(step)
    policy.next = Plan({1: 1, 2: 4, 3: 1})
    with pytest.raises(PlanError, match="6 rows, 0 to start from, 5 free and 0 given up") as error:
        made.plan(0.0)
    assert error.value.rule == "cells"
    policy.next = Plan({1: 1, 3: 10}, preempt=(2,))
    step = made.plan(0.0)
    assert step is not None
    assert step.preempted == ((2, 1),)
    assert step.admitted == ((3, 1),)  # into the slot that was given up
    made.advance(step)
    assert [made.accounting.held(slot) for slot in range(3)] == [11, 10, 0]


@pytest.mark.parametrize("policy", [Plan({3: 40}, preempt=(1, 2)), None], ids=["plan", "parts"])
def test_cells_that_only_the_preempted_share_are_free(policy: Plan | None) -> None:
    """1 and 2 share 29, and have one or two of their own. 0 needs cells of one of them, and with
    parts 3 takes the place of both."""
    scripted = Scripted()
    machine = Machine(
        replace(LIMITS, n_batch=64, n_cells=60, n_cells_seq=60),
        scripted,
        sharing=Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=4),
    )
    for id in (1, 2):
        machine.add(id, 30, 20, alike=29)
        machine.step()
    freed_by = machine.scheduler.view(0.0).kv.freed_by
    assert [freed_by(1), freed_by(2), freed_by(1, 2), freed_by()] == [2, 1, 32, 0]
    machine.add(3, 40, 5, priority=1)
    if policy is None:

        def victim(builder: PlanBuilder, seq: SequenceView) -> SequenceView | None:
            rest = (one for one in builder.view.running if one.id not in builder.preempt)
            return None if seq.running else next(rest, None)

        machine.scheduler.policy = ComposedPolicy(victim=victim, budget=whole_batch)
    scripted.next = policy
    step = machine.next_step()
    assert (step.preempted, step.n_rows) == (((1, 0), (2, 1)), 40)


class Forgets:
    def plan(self, view: StepView) -> Any:
        view.waiting  # noqa: B018  and no answer


def test_a_policy_that_forgets_its_answer_is_told() -> None:
    made = Scheduler(LIMITS, Forgets())
    made.add(1, 10, 5, arrival=0.0)
    with pytest.raises(PlanError, match=r"plan: a policy answers with a Plan: None"):
        made.plan(0.0)


@pytest.mark.parametrize(
    ("part", "answer"),
    [("admit", True), ("admit", None), ("admit", "stop"), ("mix", "prompts"), ("mix", None)],
)
def test_a_part_that_answers_something_else_is_told(part: str, answer: Any) -> None:
    made = Scheduler(LIMITS, ComposedPolicy(**{part: lambda *given: answer}))
    made.add(1, 10, 5, arrival=0.0)
    with pytest.raises(ArgumentError, match=rf"{part}={answer!r}: must "):
        made.plan(0.0)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda running: running, r"victim=\d: .* not in builder.preempt yet"),
        (lambda running: running and running.id, r"victim=\d: .* a running sequence or None"),
        (lambda running: running and waiting(7), "victim=Seq.* a running sequence or None"),
    ],
    ids=["twice", "id", "waiting"],
)
def test_a_victim_that_can_not_be_preempted_is_told(answer: Any, match: str) -> None:
    """The newest is always named, also where that is not enough."""

    def victim(builder: PlanBuilder, seq: SequenceView) -> Any:
        return answer(next(reversed(builder.view.running), None))

    machine = Machine(Limits(64, 64, 8, n_cells=40, n_cells_seq=40), ComposedPolicy(victim=victim))
    for id in range(1, 9):
        machine.add(id, 4, 20)
    with pytest.raises(ArgumentError, match=match):
        machine.run()


@pytest.mark.parametrize("policy", ["mlfq", 3, Forgets, object()], ids=str)
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(ArgumentError, match=r"policy=.*: must have plan\(view\)"):
        Scheduler(LIMITS, policy)


def test_every_rule_is_tested() -> None:
    elsewhere = {"rows", "cells", "drafts"}  # the last: test_speculate.py
    assert {rule for rule, _ in BROKEN} | elsewhere == set(RULES)


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    made = Scheduler(LIMITS)
    made.add(1, 60, 5, arrival=0.0)  # the last token needs no cell
    with pytest.raises(RequestTooLong, match=r"60 tokens.*max_tokens=6.*65 KV cells.*64"):
        made.add(2, 60, 6, arrival=0.0)
    with pytest.raises(ValueError, match="at least 1"):
        made.add(3, 0, 6, arrival=0.0)
    with pytest.raises(ValueError, match="at least 1"):
        made.add(3, 1, 0, arrival=0.0)
    with pytest.raises(ValueError, match="here already"):
        made.add(1, 1, 1, arrival=0.0)
    assert made.n_waiting == 1
