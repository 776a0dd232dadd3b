"""Sarathi and the shared decisions, by views made up: no engine, no scheduler, no model."""

from __future__ import annotations

from typing import Any

import pytest

from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.errors import ArgumentError
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

LIMITS = Limits(n_batch=64, n_ubatch=16, n_seq_max=4, n_cells=200, n_cells_seq=200)


def waiting(id: int, n_prompt: int) -> SequenceView:
    return SequenceView(id=id, arrival=float(id), n_prompt=n_prompt, max_tokens=8)


def prefilling(id: int, n_prompt: int, computed: int) -> SequenceView:
    return SequenceView(
        id=id, arrival=float(id), n_prompt=n_prompt, computed=computed, max_tokens=8, running=True
    )


def decoding(id: int, n_prompt: int = 5, generated: int = 1) -> SequenceView:
    return SequenceView(
        id=id,
        arrival=float(id),
        n_prompt=n_prompt,
        computed=n_prompt + generated - 1,
        generated=generated,
        max_tokens=8,
        running=True,
    )


def tokens(view: StepView) -> dict[int, int]:
    return sarathi().plan(view).advances(view)


def test_a_sequence_decodes_when_only_its_last_token_is_left() -> None:
    assert decoding(1).decoding
    assert decoding(1).remaining == 1
    assert not prefilling(1, 5, 4).decoding  # a prompt's last token is not a decode
    assert not waiting(1, 1).decoding


def test_an_idle_machine_takes_whole_prompts_up_to_n_batch() -> None:
    plan = sarathi().plan(StepView.of(LIMITS, waiting=[waiting(1, 40), waiting(2, 40)]))
    assert plan.tokens == {1: 40, 2: 24}
    assert plan.preempt == ()
    assert plan.reasons[2] == "admitted with 24 of 40 tokens"


def test_decoding_rows_come_first_and_prompts_fill_the_ubatch() -> None:
    view = StepView.of(LIMITS, [decoding(1), decoding(2), prefilling(3, 50, 10)], [waiting(4, 5)])
    assert tokens(view) == {1: 1, 2: 1, 3: 14}


def test_a_prompt_begun_goes_before_the_waiting_queue() -> None:
    view = StepView.of(LIMITS, [decoding(1), prefilling(3, 20, 10)], [waiting(4, 9)])
    assert tokens(view) == {1: 1, 3: 10, 4: 5}


def test_no_slot_no_admission() -> None:
    running = [decoding(i) for i in range(4)]
    assert set(tokens(StepView.of(LIMITS, running, [waiting(9, 1)]))) == {0, 1, 2, 3}


def test_the_first_that_does_not_fit_stops_the_line() -> None:
    view = StepView.of(LIMITS, [decoding(1, 150)], [waiting(2, 60), waiting(3, 2)])
    assert tokens(view) == {1: 1}


def test_what_running_prompts_will_need_is_not_given_to_newcomers() -> None:
    view = StepView.of(LIMITS, [decoding(1), prefilling(2, 150, 0)], [waiting(3, 60)])
    assert set(tokens(view)) == {1, 2}


def test_a_lone_request_is_admitted_when_it_fills_the_cache_to_the_last_cell() -> None:
    assert tokens(StepView.of(LIMITS, waiting=[waiting(1, 200)])) == {1: 64}


def test_the_newest_is_preempted_when_cells_run_out() -> None:
    view = StepView.of(
        LIMITS, [decoding(1, 100), decoding(2, 60), decoding(3, 40)], [waiting(4, 1)]
    )
    plan = sarathi().plan(view)
    assert plan.preempt == (3,)
    assert plan.advances(view) == {
        1: 1,
        2: 1,
    }  # the waiting one stays behind
    assert plan.reasons[3] == "preempted: sequence 1 found no free cell"


def test_the_newest_itself_waits_with_its_cells() -> None:
    view = StepView.of(LIMITS, [decoding(1, 100), prefilling(2, 120, 99)])
    assert tokens(view) == {1: 1}
    assert sarathi().plan(view).preempt == ()


def test_an_old_prompt_takes_its_cells_back_from_newer_decodes() -> None:
    view = StepView.of(LIMITS, [prefilling(1, 120, 99), decoding(2, 99), decoding(3, 1)])
    plan = sarathi().plan(view)
    assert plan.preempt == (3,)
    assert plan.advances(view) == {2: 1, 1: 1}
    view = StepView.of(LIMITS, [prefilling(1, 120, 100), decoding(2, 100)])
    assert sarathi().plan(view).preempt == (2,)
    assert tokens(view) == {1: 16}


def test_decodes_beyond_the_batch_go_oldest_first() -> None:
    limits = Limits(n_batch=2, n_ubatch=2, n_seq_max=4, n_cells=200, n_cells_seq=200)
    view = StepView.of(limits, [decoding(i) for i in range(4)])
    assert tokens(view) == {0: 1, 1: 1}


@pytest.mark.parametrize(
    ("n_decoding", "mixed", "rows"), [(0, None, 64), (3, None, 16), (16, None, 32), (3, 8, 8)]
)
def test_the_budget_is_whole_ubatches(n_decoding: int, mixed: int | None, rows: int) -> None:
    view = StepView.of(LIMITS, [decoding(i) for i in range(n_decoding)])
    assert TokenBudget(mixed)(view) == rows


def test_separate_streams_need_no_reserve() -> None:
    limits = Limits(64, 16, 4, n_cells=40, n_cells_seq=10, unified=False)
    running = [decoding(i, 8, 2) for i in range(3)]
    assert tokens(StepView.of(limits, running, [waiting(9, 10)]))[9] == 10


def test_one_part_is_replaced_without_touching_the_others() -> None:
    def shortest_first(view: StepView) -> list[SequenceView]:
        return [*view.prefilling, *sorted(view.waiting, key=lambda s: s.remaining)]

    view = StepView.of(LIMITS, waiting=[waiting(1, 60), waiting(2, 6)])
    assert ComposedPolicy(order=shortest_first).plan(view).tokens == {2: 6, 1: 58}


def test_skip_looks_at_the_next_one() -> None:
    def not_the_first(builder: PlanBuilder, seq: SequenceView) -> Verdict:
        return Verdict.SKIP if seq.id == 1 else Verdict.ADMIT

    view = StepView.of(LIMITS, waiting=[waiting(1, 6), waiting(2, 6)])
    assert ComposedPolicy(admit=not_the_first).plan(view).tokens == {2: 6}


class Cost(StepCost):
    """A device that takes 1 ms a row, and 10 ms for any step."""

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return 0.01 + 0.001 * rows


def budget_of(n_decoding: int, n_batch: int = 2048, **options: Any) -> int:
    limits = Limits(n_batch=n_batch, n_ubatch=64, n_seq_max=128, n_cells=10**6, n_cells_seq=10**5)
    running = [decoding(i, 10) for i in range(n_decoding)]
    view = StepView.of(limits, running, [waiting(999, 5000)], cost=Cost())
    return sum(sarathi(**options).plan(view).advances(view).values())


def test_with_a_cost_model_a_step_keeps_the_time() -> None:
    assert budget_of(4) == 90  # 100 ms
    assert budget_of(4, itl=0.05) == 40
    assert budget_of(4, n_batch=32) == 32
    assert budget_of(0) == 2048  # none waits for a token


def test_a_slow_device_gives_prompts_as_long_as_it_gives_those_who_decode() -> None:
    assert budget_of(100) == 210  # 110 ms alone, so 220
    assert budget_of(100, stretch=1) == 116  # prompts get 16 rows in any case


@pytest.mark.parametrize("options", [{"itl": 0.0}, {"stretch": 0.5}, {"budget": 0}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        sarathi(**options)
