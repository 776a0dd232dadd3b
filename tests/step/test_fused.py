"""The fused sampler in the stepper: the texts of libllama's own chain.

Row by row both are compared in native/tests/test_fused.cpp: candidates, probabilities, draws, bad
logits, threads, every instruction set.
"""

from typing import Any

import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.context import Context
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import generate


def generated(context: Context, sampler: str, params: SamplingParams) -> list[int]:
    prompt = [1, 270, 280, 290, 280]
    context.memory.clear()
    with Stepper(context, sampler=sampler) as stepper:
        stepper.set_slot(0, params, prompt)
        assert stepper.slot(0).path == ("chain" if sampler == "chain" else "fused")
        return generate(stepper, params, prompt)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"top_k": 0, "top_p": 1, "min_p": 0},
        {"repeat_penalty": 1.4, "frequency_penalty": 0.5, "penalty_last_n": 12},
        {"logit_bias": {300: 4.0, 301: float("-inf")}, "presence_penalty": 0.7},
    ],
)
def test_a_text_is_the_same_on_both_paths(context: Context, options: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=80, seed=5, ignore_eog=True, **options)
    chain = generated(context, "chain", params)
    assert chain == generated(context, "auto", params) == generated(context, "fused", params)
    assert len(chain) == 80


def test_which_path(context: Context) -> None:
    grammar = SamplingParams(grammar='root ::= "a"')
    with Stepper(context) as stepper:
        for params, path in (
            (SamplingParams(), "fused"),
            (grammar, "chain"),
            (SamplingParams(typical_p=0.9), "chain"),
        ):
            stepper.set_slot(0, params)
            assert stepper.slot(0).path == path
            stepper.copy_slot(0, 1)
            assert stepper.slot(1).path == path
    with Stepper(context, sampler="fused") as stepper, pytest.raises(ArgumentError, match="path"):
        stepper.set_slot(0, grammar)
    with pytest.raises(ArgumentError, match="auto, chain, fused"):
        Stepper(context, sampler="quick")
