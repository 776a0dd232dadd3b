"""No sequence pays for a neighbour: what a request gets from the engine or the stepper is what it
gets alone through raw calls, whatever else runs.

Greedy tokens, compared up to the first near tie (see `oracle.Agreement`); the fraction that was
compared is asserted.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stats import EngineStats
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Finish, Stepper
from tests.support.decoding import loaded, write
from tests.support.engines import EXACT
from tests.support.models_gguf import (
    ARCHITECTURES,
    EOS,
    N_VOCAB,
    SLIDING_WINDOW,
    Architecture,
    gguf_path,
    write_gguf,
)
from tests.support.oracle import (
    DEFAULT,
    TOLERANCE_QUANTISED,
    Agreement,
    Reference,
    random_prompts,
    raw_context,
    raw_model,
    solo,
    solos,
    tolerance,
    tolerance_default,
)

N_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=N_TOKENS)
# Whose answers alone have no near tie by a hair. A gemma3's GELU goes through a table in F16: where
# another number of rows is summed in another order, as on Arm, an input may fall on its neighbour.
PROMPTS = random_prompts(33, seed=241)


@pytest.fixture(scope="module")
def alone(architecture: Architecture) -> list[Reference]:
    return solos(architecture.name, PROMPTS, N_TOKENS)


@pytest.fixture
def limit(architecture: Architecture) -> float:
    return tolerance(architecture.name)


def check_requests(
    model: Model, alone: Sequence[Reference], limit: float, at_least: float = 0.99, **options: Any
) -> EngineStats:
    """An engine with these options gives each of the first prompts what it gets alone."""
    n = len(alone)
    with Engine(model, **{"n_seq_max": 8, "n_batch": 64, **EXACT, **options}) as engine:
        results = engine.generate(PROMPTS[:n], GREEDY)
        stats = engine.stats()
    assert [r.finish_reason for r in results] == ["length"] * n
    assert_as_alone([r.tokens for r in results], alone, limit, at_least)
    return stats


def assert_as_alone(
    got: Sequence[Sequence[int]], alone: Sequence[Reference], limit: float, at_least: float = 0.99
) -> None:
    agreement = Agreement()
    for tokens, reference in zip(got, alone, strict=True):
        agreement.check(reference, tokens, limit)
    assert agreement.fraction >= at_least


LAYOUTS: dict[str, dict[str, Any]] = {
    "pool": EXACT,
    "streams": EXACT | {"kv_unified": False},
    "defaults": {"n_threads": 1},  # flash attention, F16 cells
}


@pytest.mark.parametrize(
    ("n", "layout"), [*((n, "pool") for n in (1, 2, 5, 16, 33)), (5, "streams"), (5, "defaults")]
)
def test_stepper_sequences_get_what_they_get_alone(
    model: Model, architecture: Architecture, alone: list[Reference], n: int, layout: str
) -> None:
    """One arrival per step, prompts in chunks of 13 among the others' single rows: the same logits,
    and so the same tokens."""
    limit = tolerance(architecture.name)
    if layout == "defaults":
        limit = tolerance_default(architecture.name)
        with raw_model(gguf_path(architecture.name)) as oracle:
            alone = [solo(oracle, p, N_TOKENS, settings=DEFAULT) for p in PROMPTS[:n]]
    got: list[list[int]] = [[] for _ in range(n)]
    computed, alive = [0] * n, set(range(n))
    with (
        Context(model, n_ctx=256 * n, n_seq_max=n, n_ubatch=64, **LAYOUTS[layout]) as context,
        Stepper(context) as stepper,
    ):
        for step in range(10 * N_TOKENS):
            n_rows = 0
            for seq in sorted(alive):
                if step < seq:
                    continue
                if step == seq:
                    stepper.set_slot(seq, GREEDY, PROMPTS[seq])
                known, first = [*PROMPTS[seq], *got[seq]], computed[seq]
                part = known[first : first + 13]
                n_rows = write(stepper, part, seq=seq, pos=first, at=n_rows)
                computed[seq] += len(part)
                if computed[seq] < len(known):
                    stepper.rows.flags[n_rows - 1] = 0
            if n_rows == 0:
                break
            result = stepper.step(n_rows)
            result.raise_for_code()
            for seq, row, token, finish in zip(
                result.seq, result.row, result.token, result.finish, strict=True
            ):
                expected, at = alone[seq], len(got[seq])
                if got[seq] == expected.tokens[:at]:  # else a near tie has parted them
                    logits = context.logits(int(row))
                    assert np.abs(logits - expected.logits[at]).max() <= limit
                got[seq].append(int(token))
                if finish == Finish.LENGTH:
                    alive.discard(int(seq))
    assert not alive
    assert_as_alone(got, alone[:n], limit, 0.75 if layout == "defaults" else 0.99)


@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
def test_requests_get_what_they_get_alone(
    model: Model, alone: list[Reference], limit: float, n: int
) -> None:
    """All at once, different lengths; 33 requests on 16 sequences wait."""
    stats = check_requests(model, alone[:n], limit, n_seq_max=min(n, 16), n_ubatch=32)
    assert stats.preemptions == 0


def test_requests_that_arrive_while_others_run(
    model: Model, alone: list[Reference], limit: float
) -> None:
    """Each next request comes when the one before has three tokens; prompts in small chunks."""
    with Engine(model, n_seq_max=8, n_batch=16, n_ubatch=16, **EXACT) as engine:
        streams = []
        for prompt in PROMPTS[:12]:
            streams.append(engine.submit(prompt, GREEDY))
            for _, token in zip(range(3), streams[-1], strict=False):
                assert token.token >= 0
        results = [stream.result(timeout=60) for stream in streams]
    assert_as_alone([r.tokens for r in results], alone[:12], limit)


def test_a_stream_of_cells_per_sequence(model: Model, alone: list[Reference], limit: float) -> None:
    check_requests(model, alone[:10], limit, n_seq_max=5, n_ctx=5 * 256, kv_unified=False)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_too_few_cells_for_all_of_them(
    model: Model,
    architecture: Architecture,
    alone: list[Reference],
    limit: float,
    preemption: Literal["recompute", "swap"],
    prefix_cache: bool,
) -> None:
    """Requests that are preempted and computed again, or swapped, get the same tokens."""
    options: dict[str, Any] = {"preemption": preemption, "prefix_cache": prefix_cache}
    stats = check_requests(model, alone[:16], limit, n_ctx=256, **options)
    if architecture.recurrent:  # a state has one size: there is nothing to run out of
        assert stats.preemptions == 0
    else:
        assert stats.preemptions > 0
        if preemption == "swap":
            assert stats.swapped_tokens > 0
            assert stats.recomputed_rows == 0
        else:
            assert stats.recomputed_rows > 0


def test_neighbours_that_end_early(model: Model, alone: list[Reference], limit: float) -> None:
    """Cancelled ones, one that stops at its end of text, one whose row fails: their cells go to
    others while the rest runs on."""
    ending = SamplingParams(temperature=0, max_tokens=N_TOKENS, logit_bias={EOS: 1000.0})
    nothing = {token: float("-inf") for token in range(N_VOCAB)}
    failing = SamplingParams(temperature=0, max_tokens=N_TOKENS, logit_bias=nothing)
    with Engine(model, n_seq_max=6, n_batch=32, n_ubatch=32, **EXACT) as engine:
        streams = []
        for i, prompt in enumerate(PROMPTS[:12]):
            streams.append(engine.submit(prompt, GREEDY))
            others = [engine.submit(prompt[::-1], p) for p in (GREEDY, ending, failing)]
            for _ in zip(range(i % 3), others[0], strict=False):
                pass
            others[0].cancel()
            assert others[1].result(timeout=60).finish_reason == "stop"
            assert others[2].wait(timeout=60).finish_reason == "error"
        results = [stream.result(timeout=60) for stream in streams]
    assert_as_alone([r.tokens for r in results], alone[:12], limit)


def test_default_settings_differ_at_near_ties_only(
    model: Model, architecture: Architecture
) -> None:
    """Flash attention and F16 cells, as the engine runs when nothing is asked for."""
    with raw_model(gguf_path(architecture.name)) as oracle:
        alone = [solo(oracle, prompt, N_TOKENS, settings=DEFAULT) for prompt in PROMPTS[:16]]
    default: dict[str, Any] = dict.fromkeys(("type_k", "type_v"), "f16")
    limit = tolerance_default(architecture.name)
    check_requests(model, alone, limit, 0.75, flash_attn_type="auto", **default)


@pytest.mark.parametrize("file_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "jamba"])
def test_quantised_weights(name: str, file_type: str) -> None:
    """One row goes through other (repacked) kernels than many rows do."""
    path = gguf_path(name, file_type)
    with raw_model(path) as oracle:
        alone = [solo(oracle, prompt, N_TOKENS) for prompt in PROMPTS[:16]]
    with Model(path) as model:
        check_requests(model, alone, TOLERANCE_QUANTISED, 0.9)


def test_the_same_request_twice_in_one_batch(model: Model, limit: float) -> None:
    """Sampled, not greedy: same prompt, same seed, other neighbours, same draws."""
    sampled = SamplingParams(temperature=1.0, top_k=40, seed=7, max_tokens=N_TOKENS)
    others = SamplingParams(temperature=1.5, max_tokens=N_TOKENS)
    with Engine(model, n_seq_max=8, n_batch=64, **EXACT) as engine:
        first = engine.generate([PROMPTS[0]], sampled)[0]
        crowd = engine.generate(
            [PROMPTS[0], *PROMPTS[1:6], PROMPTS[0]], [sampled, *[others] * 5, sampled]
        )
    assert crowd[0].tokens == crowd[-1].tokens == first.tokens


def test_a_window_that_forgets() -> None:
    """gemma3 with cells for the window only (`swa_full=False`), also under preemption."""
    alone = solos("gemma3", PROMPTS[:16], N_TOKENS)
    for n_ctx in (0, 256):
        options: dict[str, Any] = {"swa_full": False, "n_ctx": n_ctx, "n_batch": 32, "n_ubatch": 32}
        stats = check_requests(loaded("gemma3"), alone, tolerance("gemma3"), **options)
        assert (stats.preemptions > 0) == (n_ctx == 256)


def test_sampling_goes_on_where_it_was_after_a_preemption(
    model: Model, architecture: Architecture
) -> None:
    """Draws, penalties and min_tokens belong to the request, not to the slot that it lost."""
    drawn: dict[str, Any] = {"temperature": 0.9, "repeat_penalty": 1.3, "presence_penalty": 0.5}
    drawn |= {"max_tokens": N_TOKENS, "min_tokens": N_TOKENS - 1}
    params = [SamplingParams(seed=seed, **drawn) for seed in range(16)]
    prompts = PROMPTS[:16]
    with Engine(model, n_seq_max=16, **EXACT) as engine:
        roomy = engine.generate(prompts, params)
        assert engine.stats().preemptions == 0
    with Engine(model, n_seq_max=8, n_ctx=256, n_batch=64, **EXACT) as engine:
        tight = engine.generate(prompts, params)
        assert (engine.stats().preemptions > 0) != architecture.recurrent
    same = [a.tokens == b.tokens for a, b in zip(roomy, tight, strict=True)]
    # a draw that falls on the edge between two tokens may go either way in other kernels
    assert sum(same) >= len(same) - 1


def test_a_row_under_a_neighbours_id_is_far_outside_the_tolerance(
    architecture: Architecture,
) -> None:
    """Crossed wires show: the same token after another sequence's past gives other logits."""
    first, second = random_prompts(2, seed=52, shortest=40)
    second = second[: len(first)] + first[len(second) :]  # same length, so the same positions
    with (
        raw_model(gguf_path(architecture.name)) as oracle,
        raw_context(oracle, n_ctx=512, n_seq_max=2, kv_unified=True) as context,
    ):
        context.feed(first, seq=0)
        context.feed(second, seq=1)
        right, crossed = context.decode(
            [(first[5], len(first), 0, True), (first[5], len(first), 1, True)]
        )
    assert np.abs(right - crossed).max() > 20 * tolerance(architecture.name)


def test_the_sliding_window_matters_at_the_lengths_used_here(tmp_path: Path) -> None:
    """The same weights without the window agree up to its length and part after it."""
    gemma3 = ARCHITECTURES["gemma3"]
    write_gguf(tmp_path / "full.gguf", replace(gemma3, layers=("attention",) * 4))
    prompt = random_prompts(1, seed=53, shortest=60, longest=60)[0]
    with raw_model(gguf_path("gemma3")) as windowed, raw_model(tmp_path / "full.gguf") as full:
        for length, same in ((SLIDING_WINDOW, True), (2 * SLIDING_WINDOW, False)):
            one, other = (solo(model, prompt[:length], 1).logits for model in (windowed, full))
            difference = float(np.abs(one - other).max())
            assert (difference <= tolerance("gemma3")) == same, (length, difference)
            assert same or difference > 0.2
