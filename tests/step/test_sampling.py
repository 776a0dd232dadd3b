"""SamplingParams: what is accepted, what is refused and how it is said."""

import copy
import dataclasses
import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.step.sampling_params import SamplingParams

BAD: list[tuple[str, Any]] = [
    *[("max_tokens", value) for value in (-1, 2**31, 1.5, "8", None, True)],
    *[("min_tokens", value) for value in (-1, 129, 2.0)],
    *[("temperature", value) for value in (-0.1, math.nan, math.inf, 1e-9, "hot", None, True)],
    ("temperature", Fraction(10**400)),  # more than a float holds
    *[("top_k", value) for value in (-2, 2**31, 0.5)],
    *[
        (name, value)
        for name in ("top_p", "min_p", "typical_p")
        for value in (-0.01, 1.01, math.nan)
    ],
    *[("repeat_penalty", value) for value in (0, -1, math.inf, math.nan, 1e-30, 1e30)],
    *[
        (name, value)
        for name in ("frequency_penalty", "presence_penalty")
        for value in (math.inf, math.nan, 1e7, "x")
    ],
    *[("penalty_last_n", value) for value in (-2, 2**31, 1.0)],
    *[("seed", value) for value in (-1, 2**32 - 1, 2**32, 1.5)],
    *[("logprobs", value) for value in (-1, 1025, True)],
    *[("ignore_eog", value) for value in (0, None, "no")],
    *[("grammar", value) for value in ("", "  \n", "root ::= \0", 7, "\ud800", "x" * (2**20 + 1))],
    *[("stop", value) for value in ("", ("a", ""), (1,), None)],
    *[("stop_token_ids", value) for value in ((-1,), (2**31,), ("a",), (1.0,), None)],
    *[
        ("logit_bias", value)
        for value in ({-1: 1.0}, {1: math.nan}, {1: math.inf}, {1: 1e31}, {1: "x"}, {"a": 1}, [1])
    ],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_name_the_argument_the_value_and_the_limit(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.argument.startswith(name)
    assert caught.value.limit
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("temp", "temperature"), ("max_new_tokens", "max_tokens"), ("stops", "stop")],
)
def test_an_unknown_keyword_names_the_nearest_one(wrong: str, right: str) -> None:
    with pytest.raises(ArgumentError, match=f"{wrong}=1: no such parameter; did you mean {right}"):
        SamplingParams(**{wrong: 1})  # type: ignore[arg-type]


def test_defaults_are_llama_cpps() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.95, 0.05)
    assert (params.repeat_penalty, params.penalty_last_n, params.typical_p) == (1.0, 64, 1.0)
    assert params.seed is None


def test_values_are_normalised() -> None:
    params = SamplingParams(
        stop="end",
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
        logit_bias={np.int32(5): 1, 6: np.float32(-math.inf)},
        max_tokens=np.int64(7),
        temperature=1,
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert type(params.max_tokens) is int
    assert type(params.temperature) is float
    assert {type(token) for token in params.logit_bias} == {int}
    assert params.logit_bias == {5: 1.0, 6: -math.inf}


def test_values_can_be_shared_and_varied() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias, seed=3)
    bias[2] = 1.0
    assert params.logit_bias == {1: 2.0}
    assert dataclasses.replace(params, max_tokens=5).max_tokens == 5
    assert pickle.loads(pickle.dumps(params)) == params == copy.deepcopy(params)
    assert hash(params) == hash(dataclasses.replace(params))
    assert dataclasses.asdict(params)["logit_bias"] == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize("value", [0, -1, 1, 100])
def test_top_k_off_and_on(value: int) -> None:
    assert SamplingParams(top_k=value).top_k == value
