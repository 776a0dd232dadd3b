"""A interactive sequence as the core knows it, and what its owner waits for."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..llama.lora import LoraSet
from ..step.sampling_params import SamplingParams
from ..step.types import REPORT, SAMPLE, Finish


class Call:
    """What an owner waits for: `value`, unless it raises `error`."""

    __slots__ = ("_done", "error", "value")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self.value: Any = None
        self.error: Exception | None = None

    def finish(self, value: Any = None, error: Exception | None = None) -> None:
        self.value, self.error = value, error
        self._done.release()

    @property
    def pending(self) -> bool:
        return self._done.locked()

    def wait(self) -> Any:
        self._done.acquire()
        if self.error is not None:
            raise self.error
        return self.value


@dataclass(frozen=True, slots=True)
class Draw:
    """A token that was sampled. `finish`: not NONE when it ends the text."""

    token: int
    logprob: float | None
    finish: Finish


class Hand:
    """One sequence. `tokens`: all that it knows; the sampler has chosen those behind the first
    `n_given`. `sampler`: its sampling state while it has no slot. `spent`: the sampling state has
    come to an end, and the next `ask` brings another one. `call`: what its owner waits for, and
    `back_to` how many tokens it knew before, where that would add some. `n_restarts`: of the
    context since then. `lora`, `space`: see `Request`."""

    __slots__ = (
        "back_to",
        "call",
        "id",
        "lora",
        "n_given",
        "n_restarts",
        "params",
        "priority",
        "sampler",
        "slot",
        "space",
        "spent",
        "state",
        "tenant",
        "tokens",
    )

    flags = SAMPLE | REPORT  # see `Request`

    def __init__(
        self,
        id: int,
        params: SamplingParams,
        priority: int,
        tenant: str,
        lora: LoraSet = (),
        space: Hashable = None,
    ) -> None:
        self.lora = lora
        self.space = space
        self.id = id
        self.params = params
        self.priority = priority
        self.tenant = tenant
        self.tokens: list[int] = []
        self.n_given = 0
        self.state = b""  # to be stored among the saved ones
        self.n_restarts = 0
        self.sampler: Any = None
        self.slot = -1
        self.spent = False
        self.call: Call | None = None
        self.back_to: int | None = None

    def wait_for(self, call: Call, back_to: int | None = None) -> None:
        """Its owner does."""
        self.call, self.back_to, self.n_restarts = call, back_to, 0

    def known(self) -> npt.NDArray[np.int32]:
        """All that it knows: int32."""
        return np.array(self.tokens, np.int32)

    def unseated(self) -> None:
        """See `Request`: `tokens` is all that is to be computed again, as ever."""
