"""Newcomers' prompts side by side, with rows that fill up the shorter ones."""

from typing import Any

import pytest

from pyllamabatch.scheduler import Step
from tests.engine.test_padding import PROMPTS
from tests.properties.test_invariance_engine import assert_as_alone
from tests.support.decoding import loaded
from tests.support.engines import Checked, check_idle, engine_on, greedy
from tests.support.made_up_costs import Linear
from tests.support.oracle import solos, tolerance

LONG, SHORT = 60, 8
BUDGETS = [LONG, SHORT, LONG, SHORT, 20, 20]  # the second and the fourth end together


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_no_token_and_no_cell_is_another_one(name: str, prefix_cache: bool) -> None:
    """Two come while two decode, of which one moves away: their prompts are one call."""
    prompts = PROMPTS[: len(BUDGETS)]
    alone = [solos(name, [p], n)[0] for p, n in zip(prompts, BUDGETS, strict=True)]
    steps: list[Step] = []
    how: dict[str, Any] = {"n_seq_max": 4, "n_ctx": 1024, "kv_unified": False, "n_batch": 512}
    with engine_on(loaded(name), prefix_cache=prefix_cache, cost=None, **how) as engine:
        builder: Any = engine._core.scheduler._builder
        builder.cost = Linear(1.0)  # a call is dear; its rows and a copy are not
        builder._comes_behind = lambda n_wait, n_others: n_others > 0
        build = builder.build

        def built(*args: Any) -> Step:
            steps.append(build(*args))
            return steps[-1]

        builder.build = built
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
    assert sorted(trace["prompt_filled"].tolist())[-2:] == [0, two.n_fill]
