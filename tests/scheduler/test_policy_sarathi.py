"""Sarathi and the shared decisions, by views made up."""

from typing import Any

import pytest

from pyllamabatch.scheduler import (
    ComposedPolicy,
    Limits,
    PlanBuilder,
    SequenceView,
    StepView,
    Verdict,
    sarathi,
)
from pyllamabatch.scheduler.policies.parts import TokenBudget
from tests.support.made_up_costs import Linear
from tests.support.views import decoding, prefilling, tokens, view_of, waiting

LIMITS = Limits(n_batch=64, n_ubatch=16, n_seq_max=4, n_cells=200, n_cells_seq=200)


def test_a_sequence_decodes_when_only_its_last_token_is_left() -> None:
    assert decoding(1).decoding
    assert decoding(1).remaining == 1
    assert prefilling(1, 5, 4).decoding  # a prompt's last token is one
    assert not prefilling(1, 5, 3).decoding
    assert not waiting(1, 1).decoding


FOUR = [decoding(i) for i in range(4)]
DECISIONS: dict[str, tuple[list[SequenceView], dict[int, int], tuple[int, ...]]] = {
    "idle: whole prompts up to n_batch": ([waiting(1, 40), waiting(2, 40)], {1: 40, 2: 24}, ()),
    "decoding rows first, prompts fill the ubatch":
        ([decoding(1), decoding(2), prefilling(3, 50, 10), waiting(4, 5)], {1: 1, 2: 1, 3: 14}, ()),
    "a prompt begun goes before the waiting queue":
        ([decoding(1), prefilling(3, 20, 10), waiting(4, 9)], {1: 1, 3: 10, 4: 5}, ()),
    "no slot, no admission": ([*FOUR, waiting(9, 1)], dict.fromkeys(range(4), 1), ()),
    "the first that does not fit stops the queue":
        ([decoding(1, 150), waiting(2, 60), waiting(3, 2)], {1: 1}, ()),
    "what running prompts will need is not given to newcomers":
        ([decoding(1), prefilling(2, 150, 0), waiting(3, 60)], {1: 1, 2: 15}, ()),
    "one that fills the cache to the last cell is admitted when it is alone":
        ([waiting(1, 200)], {1: 64}, ()),
    "the newest is preempted when cells run out; the waiting one stays behind":
        ([decoding(1, 100), decoding(2, 60), decoding(3, 40), waiting(4, 1)], {1: 1, 2: 1}, (3,)),
    "the newest itself waits with its cells":
        ([decoding(1, 100), prefilling(2, 120, 99)], {1: 1}, ()),
    "an old prompt takes its cells back from a newer decode":
        ([prefilling(1, 120, 99), decoding(2, 99), decoding(3, 1)], {2: 1, 1: 1}, (3,)),
    "and from the only one": ([prefilling(1, 120, 100), decoding(2, 100)], {1: 16}, (2,)),
}  # fmt: skip


@pytest.mark.parametrize(("sequences", "advances", "preempt"), DECISIONS.values(), ids=DECISIONS)
def test_a_decision(
    sequences: list[SequenceView], advances: dict[int, int], preempt: tuple[int, ...]
) -> None:
    view = view_of(*sequences, limits=LIMITS)
    plan = sarathi().plan(view)
    assert (plan.advances(view), plan.preempt) == (advances, preempt)


def test_reasons_are_given() -> None:
    plan = sarathi().plan(view_of(waiting(1, 40), waiting(2, 40)))
    assert plan.reasons[2] == "admitted with 24 of 40 tokens"
    full = [decoding(1, 100), decoding(2, 60), decoding(3, 40)]
    plan = sarathi().plan(view_of(*full, limits=LIMITS))
    assert plan.reasons[3] == "preempted: sequence 1 found no free cell"


def test_decodes_beyond_the_batch_go_oldest_first() -> None:
    limits = Limits(n_batch=2, n_ubatch=2, n_seq_max=4, n_cells=200, n_cells_seq=200)
    assert tokens(sarathi(), *FOUR, limits=limits) == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("n_decoding", "mixed", "rows"), [(0, None, 64), (3, None, 16), (16, None, 32), (3, 8, 8)]
)
def test_the_budget_is_whole_ubatches(n_decoding: int, mixed: int | None, rows: int) -> None:
    assert TokenBudget(mixed)(view_of(*(decoding(i) for i in range(n_decoding)))) == rows


def test_separate_streams_need_no_reserve() -> None:
    limits = Limits(64, 16, 4, n_cells=40, n_cells_seq=10, unified=False)
    running = [decoding(i, 8, 2) for i in range(3)]
    assert tokens(sarathi(), *running, waiting(9, 10), limits=limits)[9] == 10


def test_one_part_is_replaced_without_touching_the_others() -> None:
    def shortest_first(view: StepView) -> list[SequenceView]:
        return [*view.prefilling, *sorted(view.waiting, key=lambda s: s.remaining)]

    def not_the_first(builder: PlanBuilder, seq: SequenceView) -> Verdict:
        return Verdict.SKIP if seq.id == 1 else Verdict.ADMIT

    view = view_of(waiting(1, 60), waiting(2, 6))
    assert ComposedPolicy(order=shortest_first).plan(view).tokens == {2: 6, 1: 58}
    assert ComposedPolicy(admit=not_the_first).plan(view).tokens == {2: 6}


@pytest.mark.parametrize(
    ("n_decoding", "n_batch", "options", "rows"),
    [
        (4, 2048, {}, 90),  # 100 ms
        (4, 2048, {"itl": 0.05}, 40),
        (4, 32, {}, 32),
        (0, 2048, {}, 2048),  # none waits for a token
        (100, 2048, {}, 210),  # 110 ms alone, so prompts get as long: 220
        (
            100,
            2048,
            {"stretch": 1},
            121,
        ),  # 16 rows of prompts in any case, and what takes 4% longer
    ],
)
def test_with_a_cost_model_a_step_keeps_the_time(
    n_decoding: int, n_batch: int, options: dict[str, Any], rows: int
) -> None:
    limits = Limits(n_batch=n_batch, n_ubatch=64, n_seq_max=128, n_cells=10**6, n_cells_seq=10**5)
    sequences = [*(decoding(i, 10) for i in range(n_decoding)), waiting(999, 5000)]
    advances = tokens(sarathi(**options), *sequences, limits=limits, cost=Linear(10e-3, 1e-3))
    assert sum(advances.values()) == rows
