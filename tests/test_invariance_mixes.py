"""Nobody pays for a neighbour, on the embedded model: random mixes of arrivals, cancels, samples of
one prompt, common beginnings, far too few cells and failing decodes, in engines of every kind. Each
request that finishes has the tokens that it gets alone through raw calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checked import Checked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import TOLERANCE_QUANTISED, Agreement, RawModel, Reference, raw_context, raw_model

from pyllamabatch.engine import Engine
from pyllamabatch.model import Model
from pyllamabatch.models import default_model_path
from pyllamabatch.sampling import SamplingParams
from pyllamabatch.stream import Stream

EXACT: dict[str, Any] = {
    "flash_attn_type": "disabled",
    "type_k": "f32",
    "type_v": "f32",
    "n_threads": 1,
}
N_TOKENS = 24


def texts(n_vocab: int) -> list[list[int]]:
    """Twelve prompts of 3 to 140 tokens: two families with a common beginning, and loners."""
    random = np.random.default_rng(17)
    families = [
        random.integers(10, n_vocab, 90).tolist(),
        random.integers(10, n_vocab, 40).tolist(),
    ]
    prompts = []
    for i, n in enumerate([3, 9, 17, 30, 50, 5, 12, 33, 70, 20, 110, 48]):
        own = random.integers(10, n_vocab, n).tolist()
        prompts.append([*families[i % 3], *own] if i % 3 < 2 else own)
    return prompts


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.default() as model:
        yield model


@pytest.fixture(scope="module")
def alone(model: Model) -> list[Reference]:
    eog = sorted(model.vocab.eog_tokens)
    with raw_model(Path(default_model_path())) as oracle:
        return [solo(oracle, prompt, eog) for prompt in texts(model.n_vocab)]


def solo(oracle: RawModel, prompt: list[int], never: list[int]) -> Reference:
    """As `oracle.solo`, without the tokens that end a text."""
    n_ctx = len(prompt) + N_TOKENS
    with raw_context(oracle, n_ctx=n_ctx, n_batch=512, n_ubatch=512) as context:
        row = context.feed(prompt)
        tokens, rows = [], []
        while True:
            row[never] = -1e9
            tokens.append(int(row.argmax()))
            rows.append(row)
            if len(tokens) == N_TOKENS:
                return Reference(tokens, np.array(rows))
            row = context.feed(tokens[-1:], pos=len(prompt) + len(tokens) - 1)


engines = st.fixed_dictionaries(
    {
        "n_seq_max": st.integers(1, 6),
        "n_ctx": st.sampled_from([256, 256, 512, 2048]),
        "n_batch": st.sampled_from([32, 64, 512]),
        "prefix_cache": st.booleans(),
        "preemption": st.sampled_from(["auto", "recompute", "swap"]),
        "swap_bytes": st.sampled_from([0, 10**9]),
        "kv_unified": st.sampled_from([True, True, True, False]),
    }
)
requests = st.lists(
    st.tuples(
        st.integers(0, 11),  # prompt
        st.integers(1, N_TOKENS),
        st.sampled_from([1, 1, 1, 3]),  # samples
        st.sampled_from(["stay", "stay", "stay", "cancel", "wait"]),
    ),
    min_size=1,
    max_size=12,
)
faults = st.lists(
    st.tuples(st.integers(1, 15), st.sampled_from([1, 2, -3]), st.sampled_from([0, 5, -1])),
    max_size=3,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(engines, requests, faults)
def test_every_request_gets_what_it_gets_alone(
    model: Model,
    alone: list[Reference],
    options: dict[str, Any],
    requests: list[tuple[int, int, int, str]],
    faults: list[tuple[int, int, int]],
) -> None:
    prompts = texts(model.n_vocab)
    if not options["kv_unified"]:
        options["n_ctx"] = 256 * options["n_seq_max"]
    with Engine(model, n_ubatch=32, **{**options, **EXACT}) as engine:
        checked = Checked(engine, may_fail=bool(faults))
        streams: list[tuple[Stream, int, int]] = []
        left = faults.copy()
        for which, n, n_samples, what in requests:
            if left:
                with engine._decoder.state:
                    engine._stepper.fault(*left.pop())
            params = SamplingParams(temperature=0, max_tokens=n, ignore_eog=True)
            for stream in engine.submit_n(prompts[which], params, n_samples):
                streams.append((stream, which, n))
            if what == "wait":
                stream.wait(60)
            elif what == "cancel":
                stream.cancel()
        results = [stream.wait(60) for stream, _, _ in streams]
        stats = engine.stats()
        decoder = engine._decoder
        with decoder.state:
            ledger, memory = decoder.scheduler.ledger, decoder._memory
            slots = range(ledger.n_seq_max)
            held = [memory.pos_max(slot) + 1 for slot in slots]
            assert held == [ledger.held(slot) for slot in slots]
    assert stats.kv_used == stats.running == stats.waiting == 0
    assert stats.finished["error"] == 0
    assert checked.n_checks > 0 or stats.steps == 0
    agreement = Agreement()
    for result, (_, which, n) in zip(results, streams, strict=True):
        tokens, reference = result.tokens, alone[which]
        assert len(tokens) == n or result.finish_reason == "cancelled"
        first = Reference(reference.tokens[: len(tokens)], reference.logits[: len(tokens)])
        if tokens:
            agreement.check(first, tokens, TOLERANCE_QUANTISED)
