"""A fresh context under a running engine: what stays, what is computed again, what that costs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import (
    ArgumentError,
    ClosedError,
    ContextCreateError,
    EngineClosed,
    FatalDecodeError,
)
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.lora import LoraAdapter
from pyllamabatch.llama.model import Model
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import decode
from tests.support.engines import EXACT, engine_on, greedy
from tests.support.faults import set_fault
from tests.support.models_gguf import Architecture, gguf_path, write_gguf
from tests.support.models_special import write_lora

GREEDY = greedy(12)
small = partial(engine_on, n_seq_max=3, n_ctx=768, n_batch=32)
PROMPTS = [[1, *range(10 * i + 20, 10 * i + 25 + 4 * i)] for i in range(6)]
FATAL = -3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("wide") / "wide.gguf"  # room for a shortlist
    write_gguf(path, Architecture("llama", ("attention",) * 3, n_spare=4000))
    with Model(path) as model:
        yield model


def tokens_of(engine: Engine, params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    return [result.tokens for result in engine.generate(PROMPTS, params)]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"device_sampling": True}, {"kv_unified": False},
        {"kv_unified": False, "device_sampling": True}, {"n_ctx": 96, "preemption": "swap"},
        {"prefix_cache": False},
    ],
    ids=str,
)  # fmt: skip
def test_no_request_notices(model: Model, options: dict[str, Any]) -> None:
    """Sampled, with seeds, penalties and a grammar: the sampling state goes on, too."""
    sampling: list[dict[str, Any]] = [
        *({"seed": seed, "top_k": 40} for seed in range(3)),
        {"seed": 3, "repeat_penalty": 1.5, "presence_penalty": 0.3},
        {"seed": 4, "temperature": 2.0},
        {"temperature": 0, "grammar": 'root ::= ("a" | "b")*'},
    ]
    params = [SamplingParams(max_tokens=14, **each) for each in sampling]
    with small(model, **options) as engine:
        expected = tokens_of(engine, params)
        for step in (1, 4, 11):
            set_fault(engine._stepper, step, FATAL, 3, 2)
            assert tokens_of(engine, params) == expected
        stats = engine.stats()
        assert stats.restarts == 3
        assert stats.finished["error"] == stats.running == stats.kv_used == 0


def test_a_call_of_a_sequence_takes_longer_and_no_more(model: Model) -> None:
    with small(model) as engine:
        expected = engine.submit(PROMPTS[3], GREEDY).result(60).tokens
        other = engine.submit(PROMPTS[1], GREEDY).result(60).tokens
        with engine.sequence(GREEDY) as seq, engine.sequence(GREEDY) as idle:
            idle.prompt(PROMPTS[1])
            first = idle.sample().token
            set_fault(engine._stepper, 1, FATAL, 2, 2)
            seq.prompt(PROMPTS[3])
            assert engine.stats().restarts == 1
            tokens = [seq.sample().token]
            set_fault(engine._stepper, 1, FATAL, 0, 4)
            tokens.append(seq.sample().token)
            assert engine.stats().restarts == 3
            set_fault(engine._stepper, 1, FATAL, 0, 2)  # another call may cost as many
            saved = seq.snapshot()
            tokens += [seq.sample().token for _ in range(4)]
            assert engine.stats().restarts == 4
            assert tokens == expected[:6]
            assert [first, *(idle.sample().token for _ in range(3))] == other[:4]
            idle.restore(saved)
            assert [idle.sample().token for _ in range(4)] == expected[2:6]


def test_a_call_that_fails_too_often_has_not_happened(model: Model) -> None:
    with small(model, max_restarts=1) as engine, engine.sequence(GREEDY) as seq:
        seq.prompt(PROMPTS[2])
        before = seq.tokens
        set_fault(engine._stepper, 1, FATAL, 0, 4)
        with pytest.raises(FatalDecodeError):
            seq.sample()
        assert seq.tokens == before
        assert engine.stats().restarts == 1
        assert seq.sample().token == engine.submit(PROMPTS[2], GREEDY).result(60).tokens[0]


def test_what_is_left_of_the_engine_when_there_is_no_fresh_context(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small(model)
    with ThreadPoolExecutor(1) as pool:
        with engine.sequence(GREEDY) as seq:
            seq.prompt(PROMPTS[1])
            with engine._core.state:  # none ends before
                streams = [engine.submit(prompt, GREEDY) for prompt in PROMPTS]
                context = engine._stepper._context
                assert context is not None
                native = context._native
                native.n_seq_max = 100_000  # libllama refuses
                set_fault(engine._stepper, 1, FATAL, 0, 2)
            waiting = pool.submit(seq.sample)
            for stream in streams:
                if stream.wait(30).finish_reason == "error":
                    assert isinstance(stream.wait(0).error, ContextCreateError)
            with pytest.raises((ContextCreateError, EngineClosed)):
                waiting.result(30)
        with pytest.raises(EngineClosed, match="no fresh context"):
            engine.submit(PROMPTS[0], GREEDY)
        assert any(stream.wait(0).finish_reason == "error" for stream in streams)
    engine.close()


def logits(context: Context) -> np.ndarray:
    context.memory.seq_rm(0)
    return decode(context, [1, 20, 30, 40, 50])


def test_renew_is_the_same_context_but_empty(tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.gguf")
    model = Model(gguf_path("llama"))
    with Context(model, n_ctx=256, n_seq_max=2, **EXACT) as context:
        lora = LoraAdapter(model, tmp_path / "lora.gguf")
        context.set_loras([(lora, 0.5)])
        context.set_threads(2, 3)
        expected = logits(context)
        view = context.logits()
        lora.close()
        model.close()
        context.renew()
        assert context.memory.pos_max(0) == -1
        assert (context.n_threads, context.n_threads_batch) == (2, 3)
        np.testing.assert_array_equal(view, expected)  # of the one before
        np.testing.assert_allclose(logits(context), expected, atol=1e-5)
        assert context.lora_names == [("lora.gguf", 0.5)]


def test_slots_can_be_made_while_it_is_renewed(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Context(model, n_ctx=256, **EXACT) as context, Stepper(context) as stepper:
        made, new = [], lib.plb_context_new

        def slowly(*args: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                made.append(pool.submit(stepper.make_slot, GREEDY, [1, 2]).result(30))
            return new(*args)

        class Lib:
            plb_context_new = staticmethod(slowly)

            def __getattr__(self, name: str) -> Any:
                return getattr(lib, name)

        monkeypatch.setattr("pyllamabatch.llama.context.lib", Lib())
        context.renew()
        assert len(made) == 1
        stepper.put_slot(0, made[0])


def test_streams_again_of_a_context_that_has_them_or_never_had(model: Model) -> None:
    with Context(model, n_ctx=512, n_seq_max=2, kv_unified=False, **EXACT) as context:
        assert context.renew(0) is None
        assert (context.n_ctx, context.capabilities.unified) == (512, False)
        context.renew(1024)
        assert (context.n_ctx, context.capabilities.unified) == (1024, True)
        context.renew(0)
        assert (context.n_ctx, context.capabilities.unified) == (512, False)
    with Context(model, n_ctx=512, n_seq_max=2, kv_unified=True, **EXACT) as context:
        with pytest.raises(ArgumentError, match="made as a pool"):
            context.renew(0)
        context.renew()
        assert (context.n_ctx, context.capabilities.unified) == (512, True)


def test_where_streams_cannot_be_had_again_the_pool_stays(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Context(model, n_ctx=512, n_seq_max=2, kv_unified=False, **EXACT) as context:
        context.renew(1024)
        make = context._make

        def no_streams() -> Any:
            if not context._native.kv_unified:
                raise ContextCreateError("no memory left")
            return make()

        monkeypatch.setattr(context, "_make", no_streams)
        assert "no memory left" in str(context.renew(0))
        assert (context.n_ctx, context.capabilities.unified) == (1024, True)
        monkeypatch.undo()
        assert context.renew(0) is None
        assert (context.n_ctx, context.capabilities.unified) == (512, False)


def test_renew_without_memory_closes_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> Any:
        raise MemoryError

    with Context(model, n_ctx=256, **EXACT) as context:
        monkeypatch.setattr(context, "_make", none_left)
        with pytest.raises(MemoryError):
            context.renew()
        assert context.closed


def test_renew_that_fails_closes_it(model: Model) -> None:
    with Context(model, n_ctx=256, **EXACT) as context, Stepper(context) as stepper:
        context._native.n_seq_max = 100_000
        with pytest.raises(ContextCreateError):
            context.renew()
        assert context.closed
        with pytest.raises(ClosedError):
            context.memory.pos_max(0)
        with pytest.raises(ClosedError):
            stepper.step(1)
    assert lib.plb_engine_rebind(ffi.NULL, ffi.NULL) == lib.PLB_E_ARGUMENT
