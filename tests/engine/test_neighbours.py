"""Newcomers' prompts side by side, with rows that fill up the shorter ones."""

from typing import Any

import pytest

from pyllamabatch import Engine
from pyllamabatch.scheduler import Step
from pyllamabatch.server import live
from tests.engine.test_padding import PROMPTS
from tests.properties.test_invariance_engine import assert_as_alone
from tests.support.decoding import loaded
from tests.support.engines import Checked, check_idle, engine_on, greedy
from tests.support.made_up_costs import Linear
from tests.support.oracle import random_prompts, solos, tolerance

LONG, SHORT = 60, 8
BUDGETS = [LONG, SHORT, LONG, SHORT, 20, 20]  # the second and the fourth end together


def with_dear_calls(engine: Engine) -> list[Step]:
    """Its rows and a copy cost nothing. The steps that will have been built."""
    steps: list[Step] = []
    builder: Any = engine._core.scheduler._builder
    builder.cost = Linear(1.0)
    builder._comes_behind = lambda n_wait, n_others: n_others > 0
    build = builder.build

    def built(*args: Any) -> Step:
        steps.append(build(*args))
        return steps[-1]

    builder.build = built
    return steps


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_no_token_and_no_cell_is_another_one(name: str, prefix_cache: bool) -> None:
    """Two come while two decode, of which one moves away: their prompts are one call."""
    prompts = PROMPTS[: len(BUDGETS)]
    alone = [solos(name, [p], n)[0] for p, n in zip(prompts, BUDGETS, strict=True)]
    how: dict[str, Any] = {"n_seq_max": 4, "n_ctx": 1024, "kv_unified": False, "n_batch": 512}
    with engine_on(loaded(name), prefix_cache=prefix_cache, cost=None, **how) as engine:
        steps = with_dear_calls(engine)
        Checked(engine)
        results = engine.generate(prompts, [greedy(n) for n in BUDGETS])
        check_idle(engine)
        trace = engine.trace()
    assert_as_alone([r.tokens for r in results], alone, tolerance(name), 0.98)
    (two,) = (step for step in steps if len(step.chunks) == 2)
    first, second = sorted(chunk.slot for chunk in two.chunks)
    (moved,) = two.moved
    assert moved[1] in (first, second)
    assert second == first + 1
    assert two.n_fill == abs(two.chunks[0].n - two.chunks[1].n) > 0
    assert len(two.parts()) == 1
    filled = trace["prompt_filled"]
    assert filled[filled > 0].tolist() == [two.n_fill]
    (step,) = (step for step in live.steps_of(trace) if step["prompt_filled"])
    assert step["prompt_filled"] == [[chunk.slot, chunk.fill] for chunk in two.chunks if chunk.fill]


def test_two_groups_that_are_as_long() -> None:
    """Four come side by side. Together, and filled up, they had more rows than a call may."""
    prompts = [*random_prompts(6, seed=5, shortest=4, longest=9)]
    longer = random_prompts(4, seed=6, shortest=30, longest=31)
    prompts += [one[:n] for one, n in zip(longer, (26, 10, 26, 26), strict=True)]
    budgets = [LONG, *[SHORT] * 4, LONG, *[10] * 4]
    alone = [solos("llama", [p], n)[0] for p, n in zip(prompts, budgets, strict=True)]
    how: dict[str, Any] = {"n_seq_max": 6, "n_ctx": 1536, "kv_unified": False, "policy": "fcfs"}
    with engine_on(loaded("llama"), cost=None, n_batch=90, n_ubatch=64, **how) as engine:
        steps = with_dear_calls(engine)
        Checked(engine)
        results = engine.generate(prompts, [greedy(n) for n in budgets])
        check_idle(engine)
    assert_as_alone([r.tokens for r in results], alone, tolerance("llama"), 0.98)
    (four,) = (step for step in steps if len(step.chunks) == 4)
    assert [len(part.chunks) for part in four.parts()] == [2, 2]
    assert four.n_rows + four.n_fill > 90
