"""Faults on real contexts, in every architecture: what libllama's memory holds after a failure is
cleaned up, and the next request gets its own tokens."""

from functools import partial
from typing import Any

import pytest

from pyllamabatch.errors import DecodeAborted, FatalDecodeError, InvalidBatch, KvCacheFull
from pyllamabatch.llama.model import Model
from pyllamabatch.raw import lib
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support import engines as support
from tests.support.decoding import loaded
from tests.support.engines import Checked, check_idle
from tests.support.faults import set_fault
from tests.support.models_gguf import Architecture
from tests.support.oracle import random_prompts

PROMPTS = random_prompts(6, seed=7, shortest=5, longest=40)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
engine_on = partial(support.engine_on, n_seq_max=3, n_ctx=512, n_batch=32, n_ubatch=16)


@pytest.fixture(scope="module")
def model(architecture: Architecture) -> Model:
    return loaded(architecture.name)


@pytest.fixture(scope="module")
def expected(model: Model) -> list[list[int]]:
    with engine_on(model, n_seq_max=1) as engine:
        return [engine.submit(prompt, GREEDY).result(60).tokens for prompt in PROMPTS]


@pytest.mark.parametrize("step", [1, 2, 9])
def test_no_cells(model: Model, expected: list[list[int]], step: int) -> None:
    """Nor at the retry, nor without cached prefixes: one is preempted."""
    with engine_on(model, n_batch=128) as engine:  # three prompts in the first step
        set_fault(engine._stepper, step, 1, 0, 3)
        results = engine.generate(PROMPTS, GREEDY)
        assert [result.tokens for result in results] == expected
        assert engine.stats().preemptions >= 1
        check_idle(engine)


KINDS = {2: DecodeAborted, -1: InvalidBatch, -3: FatalDecodeError}


@pytest.mark.parametrize("n_rows", [0, 1, 20, -1], ids="{} rows done".format)
@pytest.mark.parametrize("code", [1, 2, -1, -3])
def test_a_fault_at_any_decode(
    model: Model, expected: list[list[int]], code: int, n_rows: int
) -> None:
    """A decode of the scenario reports `code` and leaves `n_rows` of its rows in the
    memory. Only -1, which says that the rows are wrong, ends requests: those of that batch."""
    with engine_on(model, kv_unified=True, prefix_cache=True) as engine:
        for nth in (1, 2, 5, 21):
            set_fault(engine._stepper, nth, code, n_rows)
            results = engine.generate(PROMPTS, GREEDY)
            failed = [result for result in results if result.finish_reason == "error"]
            assert len(failed) <= 3
            assert bool(failed) <= (code == -1)
            for result, tokens in zip(results, expected, strict=True):
                assert result.tokens == tokens[: len(result.tokens)]
                assert result in failed or len(result.tokens) == 12
            for result in failed:
                assert isinstance(result.error, KINDS[code])
            check_idle(engine)
        set_fault(engine._stepper, 0, 0)
        assert [result.tokens for result in engine.generate(PROMPTS, GREEDY)] == expected


@pytest.mark.parametrize("n_rows", [0, 7])
@pytest.mark.parametrize("step", [1, 3, 6, 14])
def test_a_fresh_context_after_a_decode_that_fails_twice(
    model: Model, expected: list[list[int]], step: int, n_rows: int
) -> None:
    """Twice in a row, so that the second fresh context is needed at once; no request notices."""
    with engine_on(model) as engine:
        set_fault(engine._stepper, step, -3, n_rows, 4)
        results = engine.generate(PROMPTS, GREEDY)
        assert [result.tokens for result in results] == expected
        assert engine.stats().restarts == 2
        check_idle(engine)
        again = engine.generate(PROMPTS, GREEDY)
        assert [result.tokens for result in again] == expected


@pytest.mark.parametrize("kv_unified", [True, False])
def test_a_device_that_fails_behind_the_call(
    model: Model, expected: list[list[int]], kv_unified: bool
) -> None:
    """Metal says so in its log alone, and computes nothing more in that context. No token comes of
    such a step: it is tried again, and then in a fresh context."""
    with engine_on(model, kv_unified=kv_unified) as engine:
        set_fault(engine._stepper, 4, lib.PLB_E_DECODE, -1, 2)
        assert engine.submit(PROMPTS[0], GREEDY).result(60).tokens == expected[0]
        # What can't be taken back is computed again between the two failures.
        assert engine.stats().restarts == engine.capabilities.partial_removal
        check_idle(engine)


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": 256, "n_seq_max": 8},
        {"n_ctx": 256, "n_seq_max": 8, "n_batch": 256, "n_ubatch": 256},
        {"n_ctx": 256, "n_seq_max": 8, "swa_full": False},
        {"n_ctx": 1024, "n_seq_max": 4, "kv_unified": False},
        {"n_ctx": 1024, "n_seq_max": 4, "kv_unified": False, "swa_full": False},
        {"n_ctx": 256, "n_seq_max": 8, "preemption": "swap"},
        {"n_ctx": 256, "n_seq_max": 8, "preemption": "swap", "swap_bytes": 0},
        {"n_ctx": 256, "n_seq_max": 8, "preemption": "recompute", "prefix_cache": False},
        {"n_ctx": 1024, "n_seq_max": 4, "kv_unified": False, "prefix_cache": False},
    ],
    ids=str,
)
def test_the_ledger_is_right_at_every_step(model: Model, options: dict[str, Any]) -> None:
    """Far more text than cells: preemption all the time, and libllama never says "no cells". Half
    of the prompts begin alike."""
    prompts = random_prompts(14, seed=8, shortest=1, longest=120)
    for i in range(0, 14, 2):
        prompts[i] = [*prompts[4][:40], *prompts[i]][:120]
    with engine_on(model, **options) as engine:
        checked = Checked(engine)
        with engine._core.state:  # none starts before the last one waits
            streams = [
                engine.submit(prompt, SamplingParams(temperature=0, max_tokens=25 + 7 * (i % 11)))
                for i, prompt in enumerate(prompts)
            ]
        for stream in streams[3::5]:
            next(iter(stream))
            stream.cancel()
        for i, stream in enumerate(streams):
            result = stream.result(60)
            assert result.n_generated == 25 + 7 * (i % 11) or i % 5 == 3
        assert checked.n_steps == engine.stats().steps
        assert (engine.stats().preemptions > 0) == engine.limits.unified
        check_idle(engine)


def test_what_the_ledger_calls_empty_is_there_to_the_last_cell(
    model: Model, architecture: Architecture
) -> None:
    """Neither more nor less: cells that several sequences share are counted once. What it calls
    empty is filled up behind its back, and libllama has no cell more."""
    prompts = random_prompts(4, seed=5, shortest=30, longest=60)
    prompts = [prompts[0], *([*prompts[0][:29], *prompt] for prompt in prompts[1:])]
    with engine_on(model, n_ctx=512, n_seq_max=4) as engine:
        engine.generate(prompts[:1], GREEDY)
        results = engine.generate(prompts[1:], GREEDY)
        accounting = engine._core.scheduler.accounting
        memory: Any = engine._core._device.memory
        context: Any = engine._core._device.states
        with engine._core.state:
            engine._core.kv.flush()
            held = sum(accounting.held(slot) for slot in range(accounting.n_seq_max))
            assert accounting.used > 0
            if engine.capabilities.prefix_copy:
                assert engine.stats().prefix_tokens >= 3 * 29
                assert held > accounting.used
            n_empty = accounting.empty
            slot = next(i for i in range(accounting.n_seq_max) if not accounting.held(i))
            batch = context.batch(1)
            for n in range(n_empty):
                batch.clear()
                batch.add(300, n, slot, True)
                context.decode(batch)
            batch.clear()
            batch.add(300, n_empty, slot, True)
            if (
                architecture.recurrent
            ):  # one state, whatever it has read: the accounting is a budget
                context.decode(batch)
            else:
                with pytest.raises(KvCacheFull):
                    context.decode(batch)
            memory.seq_rm(slot)
        assert engine.generate(prompts[1:], GREEDY)[0].tokens == results[0].tokens
