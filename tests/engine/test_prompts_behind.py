"""Prompts that are computed behind the rows that decode, in one call."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyllamabatch import Engine, Model
from pyllamabatch.engine.kv_config import limits_of
from pyllamabatch.engine.native_context import NativeContext
from pyllamabatch.engine.stream import Stream
from pyllamabatch.errors import FatalDecodeError
from tests.engine.test_padding import PROMPTS, answered_as_alone, pad_to
from tests.properties.test_invariance_engine import assert_as_alone
from tests.support.decoding import loaded
from tests.support.engines import check_idle, engine_on, greedy, held
from tests.support.faults import set_fault
from tests.support.oracle import solos, tolerance

N_SEQ = 4
LIMIT = 60  # seconds: far more than a step takes


def behind(model: Model, **options: Any) -> Engine:
    """As where a new graph is dear."""
    sizes = {"n_seq_max": N_SEQ, "n_ctx": N_SEQ * 256, "kv_unified": False, "n_batch": 32}
    engine = engine_on(model, cost=None, prefix_cache=False, **{**sizes, **options})
    engine._core.scheduler._builder._comes_behind = (  # type: ignore[method-assign]
        lambda n_wait, n_others: n_others > 0
    )
    return engine


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
@pytest.mark.parametrize("pad", [0, N_SEQ])
def test_no_token_and_no_cell_is_another_one(name: str, pad: int) -> None:
    with behind(loaded(name)) as engine:
        pad_to(engine, pad)
        trace = answered_as_alone(engine, name)
    mixed = trace[(trace["prefill_rows"] > 0) & (trace["decode_rows"] > 0)]
    assert len(mixed) > 5
    if pad:  # the graph of decoding stays
        decode = trace[trace["decode_rows"] > 0][1:]  # with the first prompt's rows its last one
        assert (decode["decode_rows"] + decode["filled"] == N_SEQ).all()
        assert decode["reused"].tolist().count(0) == 1


@pytest.mark.parametrize(("name", "unified"), [("llama", False), ("llama", True), ("mamba", True)])
def test_no_newcomer_waits_where_a_context_computes_none_behind(name: str, unified: bool) -> None:
    how: dict[str, Any] = {"n_ctx": 512, "n_seq_max": 2, "kv_unified": unified, "n_threads": 1}
    with NativeContext(loaded(name), **how) as context:
        assert limits_of(context, 2).behind is not unified


def test_a_newcomer_decodes_in_the_step_behind_its_prompt() -> None:
    with behind(loaded("llama"), n_batch=64) as engine:
        with held(engine):
            first = engine.submit(PROMPTS[0], greedy(200))
            next(iter(first))
            engine.generate([PROMPTS[1]], greedy(3))
            trace = engine.trace()
        first.cancel()
    _, at = np.flatnonzero((trace["prefill_rows"] > 0) & (trace["decode_rows"] > 0))
    assert trace["decode_rows"][at : at + 4].tolist() == [1, 2, 2, 2]
    assert trace["prefill_rows"][at] == len(PROMPTS[1]) - 1


Hook = Callable[[Stream, list[int], int], None]


def meeting(engine: Engine, hook: Hook) -> tuple[Stream, Stream]:
    """Of two requests, the second of which comes while the first one decodes. `hook(second, slots,
    n_before)`: before each call from then on."""
    stepper: Any = engine._core._stepper
    compute, decoded = stepper.compute, list[int]()
    decodes, submitted = threading.Event(), threading.Event()

    def computes(slots: Any, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Any:
        if decoded:
            decodes.set()
            assert submitted.wait(LIMIT)
            hook(second, slots.tolist(), n_before)
        decoded.extend(slots)
        return compute(slots, n_steps, n_before, n_pad)

    stepper.compute = computes
    first = engine.submit(PROMPTS[0], greedy(40))
    assert decodes.wait(LIMIT)
    second = engine.submit(PROMPTS[1], greedy(40))
    submitted.set()
    return first, second


@pytest.mark.parametrize(("call", "rows"), [(1, 0), (1, -1), (2, 0), (2, 5), (2, -1)])
def test_a_step_that_fails_comes_again(call: int, rows: int) -> None:
    """The rows that decode, or the prompt behind them, of which some are in the memory."""
    alone, failed = solos("llama", PROMPTS[:2], 40), list[int]()
    with behind(loaded("llama"), n_batch=64) as engine:

        def fails(second: Stream, slots: list[int], n_before: int) -> None:
            if n_before and slots and not failed:
                failed.append(n_before)
                set_fault(engine._core._stepper, call, -3, n_rows=rows)

        results = [stream.result() for stream in meeting(engine, fails)]
        check_idle(engine)
    assert failed
    assert_as_alone([r.tokens for r in results], alone, tolerance("llama"), 0.98)


def test_a_prompt_that_always_fails_ends_its_own_request_alone() -> None:
    alone, calls = solos("llama", PROMPTS[:1], 40), list[int]()
    with behind(loaded("llama"), n_batch=64) as engine:
        stepper: Any = engine._core._stepper

        def fails(second: Stream, slots: list[int], n_before: int) -> None:
            slot = engine._core.scheduler.slot(second.id)
            if slot in stepper.rows.seq[:n_before].tolist():
                others = {*slots} - {slot}
                calls.append(len(others))
                set_fault(stepper, 2 if others else 1, -3)

        first, second = meeting(engine, fails)
        with pytest.raises(FatalDecodeError):
            second.result()
        result = first.result()
        check_idle(engine)
    assert 0 in calls  # tried apart
    assert max(calls) > 0
    assert_as_alone([result.tokens], alone, tolerance("llama"), 0.98)
