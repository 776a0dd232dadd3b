"""Snapshots: a sequence goes on elsewhere as it would have here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch.engine import snapshot
from pyllamabatch.errors import ArgumentError, StateError
from pyllamabatch.llama import state
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.lora import LoraAdapter
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import write
from tests.support.models_gguf import Architecture, gguf_path
from tests.support.models_special import write_lora

PROMPT = [1, *range(300, 340)]
SAMPLED = SamplingParams(
    max_tokens=30, temperature=1.2, repeat_penalty=1.3, logit_bias={300: 0.5, 5: float("-inf")}
)


def make(model: Model, **params: Any) -> tuple[Context, Stepper]:
    context = Context(model, **{"n_ctx": 512, "n_seq_max": 2, "n_threads": 1, **params})
    return context, Stepper(context, n_threads=1)


def prefill(stepper: Stepper, seq: int, params: SamplingParams) -> int:
    stepper.set_slot(seq, params, PROMPT)
    result = stepper.step(write(stepper, PROMPT, seq=seq))
    result.raise_for_code()
    return int(result.token[0])


def decode(stepper: Stepper, seq: int, n: int) -> list[int]:
    result = stepper.run([seq], n)
    result.raise_for_code()
    return [int(token) for token in result.token]


def test_it_goes_on_in_another_context(architecture: Architecture) -> None:
    with Model(gguf_path(architecture.name)) as model:
        context, stepper = make(model)
        tokens = [*PROMPT, prefill(stepper, 1, SAMPLED), *decode(stepper, 1, 5)]
        data = snapshot.save(context, stepper, 1, tokens, SAMPLED, len(PROMPT))
        seed = stepper.slot(1).seed
        expected = decode(stepper, 1, 12)

        other, other_stepper = make(model, n_ctx=1024, n_seq_max=4)
        saved = snapshot.restore(other, other_stepper, 3, data)
        assert saved.tokens.tolist() == tokens
        assert (saved.n_prompt, saved.n_computed) == (len(PROMPT), len(tokens) - 1)
        assert saved.params is not None
        assert saved.params.seed == seed
        assert saved.params.logit_bias == SAMPLED.logit_bias
        assert decode(other_stepper, 3, 12) == expected


def test_before_the_first_token_and_without_sampling() -> None:
    with Model(gguf_path("llama")) as model:
        context, stepper = make(model)
        first = prefill(stepper, 0, SamplingParams(temperature=0))
        plain = snapshot.save(context, None, 0, PROMPT)
        saved = snapshot.restore(context, stepper, 1, plain)
        assert (saved.params, saved.n_prompt, saved.n_computed) == (None, 41, 41)
        with pytest.raises(ArgumentError, match="slot"):
            stepper.slot(1)
        assert context.memory.pos_max(1) == 40
        context.memory.seq_rm(1, 40)
        stepper.set_slot(1, SamplingParams(temperature=0), PROMPT)
        early = snapshot.save(context, stepper, 1, PROMPT, SamplingParams(temperature=0))
        saved = snapshot.restore(context, stepper, 0, early)
        assert saved.n_computed == 40
        assert stepper.step(write(stepper, PROMPT[-1:], pos=40)).token[0] == first


def test_a_slot_that_has_finished_or_knows_other_tokens() -> None:
    with Model(gguf_path("llama")) as model:
        context, stepper = make(model)
        params = SamplingParams(temperature=0, max_tokens=2)
        tokens = [*PROMPT, prefill(stepper, 0, params)]
        with pytest.raises(ArgumentError, match="as many as its slot has"):
            snapshot.save(context, stepper, 0, [*tokens, 5], params, len(PROMPT))
        tokens += decode(stepper, 0, 1)
        with pytest.raises(ArgumentError, match="must not have finished"):
            snapshot.save(context, stepper, 0, tokens, params, len(PROMPT))


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"rope_freq_base": 5000.0}, "rope_freq_base=0.0, this context has 5000.0"),
        ({"type_k": "f32"}, "type_k"),
        ({"rope_scaling_type": "linear", "rope_freq_scale": 0.5}, "rope_scaling_type"),
    ],
)
def test_other_parameters_are_named(params: dict[str, Any], named: str) -> None:
    with Model(gguf_path("llama")) as model:
        context, stepper = make(model)
        prefill(stepper, 0, SAMPLED)
        data = snapshot.save(context, stepper, 0, PROMPT)
        other, other_stepper = make(model, **params)
        prefill(other_stepper, 0, SAMPLED)
        with pytest.raises(StateError, match=named):
            snapshot.restore(other, other_stepper, 0, data)
        assert other.memory.pos_max(0) == len(PROMPT) - 1


def test_other_adapters_are_named(tmp_path: Path) -> None:
    write_lora(tmp_path / "a.gguf")
    with Model(gguf_path("llama")) as model, LoraAdapter(model, tmp_path / "a.gguf") as adapter:
        context, stepper = make(model)
        prefill(stepper, 0, SAMPLED)
        data = snapshot.save(context, stepper, 0, PROMPT)
        context.set_loras([(adapter, 0.5)])
        with pytest.raises(StateError, match=r"loras=\[\], this context has"):
            snapshot.restore(context, stepper, 1, data)
        own = snapshot.save(context, stepper, 0, PROMPT)
        snapshot.restore(context, stepper, 1, own)
        context.set_loras([])
        snapshot.restore(context, stepper, 1, data)


def test_not_a_snapshot() -> None:
    with Model(gguf_path("llama")) as model, Model(gguf_path("qwen2")) as other:
        context, stepper = make(model)
        prefill(stepper, 0, SAMPLED)
        data = snapshot.save(context, stepper, 0, PROMPT)
        with pytest.raises(StateError, match="another model"):
            snapshot.read(other, data)
        with pytest.raises(StateError, match="a plain state"):
            snapshot.read(model, context.state_seq_get(0))
        with pytest.raises(StateError, match="damaged"):
            snapshot.read(model, data[:-1] + bytes([data[-1] ^ 1]))
        note = {"n_prompt": 1, "n_computed": 1, "sampling": {"x": 1}}
        later = context.state_seq_get(0, tokens=PROMPT, note=note)
        with pytest.raises(StateError, match="not of this version"):
            snapshot.read(model, later)


def test_it_survives_a_file(tmp_path: Path) -> None:
    with Model(gguf_path("llama")) as model:
        context, stepper = make(model)
        tokens = [*PROMPT, prefill(stepper, 0, SAMPLED)]
        data = snapshot.save(context, stepper, 0, tokens, SAMPLED, len(PROMPT))
        state.write(tmp_path / "a.snapshot", data)
        saved = snapshot.restore(context, stepper, 1, state.read(tmp_path / "a.snapshot"))
        assert np.array_equal(saved.tokens, tokens)
        assert decode(stepper, 1, 8) == decode(stepper, 0, 8)
