"""A request as the decoder knows it."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from .sampling import SamplingParams
from .stream import Stream

Tokens = npt.NDArray[np.int32]


class Request:
    """What the decoder knows of a request. `tokens`: what is to be computed, int32: its prompt,
    and after a preemption what it had generated too. `slot`: where it runs, else -1. `sampler`: its
    sampling state while it has no slot. `space`: only requests of the same one start from each
    other; None is everybody's."""

    __slots__ = ("id", "params", "prompt", "sampler", "slot", "space", "stream", "tokens")

    def __init__(
        self,
        prompt: Tokens,
        params: SamplingParams,
        stream: Stream,
        sampler: object,
        space: Hashable = None,
    ) -> None:
        self.id = stream.id
        self.prompt = prompt
        self.tokens = prompt
        self.params = params
        self.stream = stream
        self.sampler = sampler
        self.slot = -1
        self.space = space
