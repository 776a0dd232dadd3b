"""A row for every slot: other requests come and go, and the graph of decoding stays."""

from typing import Any

import pytest

from pyllamabatch import Engine, Model
from pyllamabatch.step.trace import Trace
from tests.properties.test_invariance_engine import assert_as_alone
from tests.support.decoding import loaded
from tests.support.engines import Checked, check_idle, engine_on, greedy
from tests.support.oracle import random_prompts, solos, tolerance

N_SEQ = 6
PROMPTS = random_prompts(14, seed=21, shortest=3, longest=60)
BUDGETS = [3 + 5 * (i % 7) for i in range(len(PROMPTS))]


def padded(model: Model, **options: Any) -> Engine:
    sizes = {"n_seq_max": N_SEQ, "n_ctx": N_SEQ * 256, "kv_unified": False, "n_batch": 16}
    engine = engine_on(model, cost=None, **{**sizes, **options})
    pad_to(engine, N_SEQ)
    return engine


def pad_to(engine: Engine, width: int) -> None:
    """Steps in which sequences decode have so many rows; 0: only theirs."""
    engine._core.scheduler.padding.width = (  # type: ignore[method-assign]
        lambda decode, held, cost: width if len(decode) else 0
    )


def answered_as_alone(engine: Engine, name: str) -> Trace:
    """All prompts, with the tokens and cells that each has alone; what the engine traced."""
    alone = [solos(name, [p], n)[0] for p, n in zip(PROMPTS, BUDGETS, strict=True)]
    checked = Checked(engine)
    results = engine.generate(PROMPTS, [greedy(n) for n in BUDGETS])
    trace = engine.trace()
    check_idle(engine)
    assert checked.n_checks > 20
    assert_as_alone([r.tokens for r in results], alone, tolerance(name), 0.98)
    return trace


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
def test_no_token_and_no_cell_is_another_one(name: str) -> None:
    """Slots with a prompt that is half computed have such a row, too."""
    with padded(loaded(name)) as engine:
        trace = answered_as_alone(engine, name)
    decode = trace[trace["prefill_rows"] == 0]
    assert (decode["decode_rows"] + decode["filled"] == N_SEQ).all()


def test_the_graph_stays_while_others_come_and_go() -> None:
    with padded(loaded("llama"), prefix_cache=False) as engine:
        engine.generate(PROMPTS, [greedy(n) for n in BUDGETS])
        trace = engine.trace()
    decode = trace[trace["prefill_rows"] == 0]
    assert len({tuple(ids) for ids in decode["ids"].tolist()}) > 5  # other requests
    assert decode["reused"].tolist() == [0] + [1] * (len(decode) - 1)


def test_a_slot_without_room_is_left_out() -> None:
    """An interactive sequence fills its stream to the last cell; another one decodes."""
    with padded(loaded("llama"), n_seq_max=2, n_ctx=512) as engine:
        engine._core.scheduler.padding.width = lambda decode, held, cost: 2  # type: ignore[method-assign]
        full = engine.sequence(greedy(10))
        full.prompt([5 + i % 90 for i in range(256)])
        full.sample()
        result = engine.generate([PROMPTS[0]], greedy(20))[0]
        trace = engine.trace()
    assert_as_alone([result.tokens], solos("llama", PROMPTS[:1], 20), tolerance("llama"), 0.98)
    assert trace["filled"][-10:].tolist() == [0] * 10
