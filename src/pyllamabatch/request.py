"""A request as the decoder knows it, and what it takes from a step's records."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .sampling import SamplingParams
from .stream import Stream

Tokens = npt.NDArray[np.int32]


class Request:
    """What the decoder knows of a request. `tokens`: what is to be computed, int32: its prompt,
    and after a preemption what it had generated too. `sampler`: its sampling state while it has no
    slot."""

    __slots__ = ("id", "params", "prompt", "sampler", "stream", "tokens")

    def __init__(
        self, prompt: Tokens, params: SamplingParams, stream: Stream, sampler: object
    ) -> None:
        self.id = stream.id
        self.prompt = prompt
        self.tokens = prompt
        self.params = params
        self.stream = stream
        self.sampler = sampler


def logprobs_of(result: Any, records: slice) -> tuple[list[float], list[dict[int, float]]]:
    """Of one request's records: the log-probability, and those of the most likely tokens."""
    n_top = result.n_top[records].tolist()
    tokens = result.top_token[records].tolist()
    logprobs = result.top_logprob[records].tolist()
    top = [
        dict(zip(token[:n], logprob[:n], strict=True))
        for n, token, logprob in zip(n_top, tokens, logprobs, strict=True)
    ]
    return result.logprob[records].tolist(), top
