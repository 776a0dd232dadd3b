"""Replay: a new slot that is told what was sampled goes on as the one that sampled it."""

from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError, GrammarError
from pyllamabatch.llama.context import Context
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import begin

PROMPT = [1, 300, 301, 302]


def generate(stepper: Stepper, n: int) -> list[int]:
    """`n` tokens of slot 0, which has sampled already."""
    tokens: list[int] = []
    while len(tokens) < n:
        result = stepper.run([0], 1)
        result.raise_for_code()
        tokens.append(int(result.token[0]))
    return tokens


@pytest.mark.parametrize("sampler", ["fused", "chain"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.3, "seed": 5},
        {"temperature": 1.3, "seed": 5, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temperature": 0.9, "seed": 6, "repeat_penalty": 1.4, "presence_penalty": 0.3},
        {"temperature": 1.5, "seed": 7, "grammar": 'root ::= ("a" | "b" | "cd")*'},
    ],
    ids=str,
)
def test_it_goes_on_as_if_it_had_sampled(
    context: Context, sampler: str, options: dict[str, Any]
) -> None:
    if sampler == "fused" and "grammar" in options:
        sampler = "auto"
    params = SamplingParams(max_tokens=40, **options)
    with Stepper(context, sampler=sampler, n_threads=1) as stepper:
        tokens = [begin(stepper, params, PROMPT), *generate(stepper, 9)]
        info, state = stepper.slot(0), context.state_seq_get(0)
        rest = generate(stepper, 12)

        slot = stepper.make_slot(params, PROMPT)
        stepper.replay(slot, tokens, info.n_draws, info.next_pos)
        stepper.put_slot(0, slot)
        context.state_seq_set(state, 0)
        assert stepper.slot(0) == info
        assert generate(stepper, 12) == rest


def test_draws_are_counted(context: Context) -> None:
    with Stepper(context, n_threads=1) as stepper:
        begin(stepper, SamplingParams(seed=3, max_tokens=20), PROMPT)
        assert stepper.slot(0).n_draws == 1
        generate(stepper, 2)
        slot = stepper.take_slot(0)
        stepper.put_slot(0, slot)
        assert stepper.slot(0).n_draws == 3


def test_what_can_not_have_been_sampled(context: Context) -> None:
    params = SamplingParams(max_tokens=4, temperature=0, grammar='root ::= "abc"')
    with Stepper(context, n_threads=1) as stepper:
        for tokens, draws, argument in [([], 0, "tokens"), ([5] * 4, 0, "slot"), ([5], 1, "slot")]:
            with pytest.raises(ArgumentError) as caught:
                stepper.replay(stepper.make_slot(params), tokens, draws, 4)
            assert caught.value.argument == argument
        with pytest.raises(ArgumentError):
            stepper.replay(stepper.make_slot(params), np.array([10**6]), 0, 4)
        wrong = context.model.vocab.tokenize("z", add_special=False)
        with pytest.raises(GrammarError, match="does not lead"):
            stepper.replay(stepper.make_slot(params), wrong, 0, 4)
        used = stepper.make_slot(params)
        stepper.put_slot(0, used)
        with pytest.raises(ArgumentError, match="not put back"):
            stepper.replay(used, [5], 0, 4)
