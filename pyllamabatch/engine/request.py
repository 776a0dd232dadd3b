"""Request: one sequence as the core knows it, from the command queue to its end."""

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SamplingError
from ..step.sampling_params import SamplingParams
from ..step.types import Finish
from .options import DEFAULTS, RequestOptions
from .results import FinishReason

Tokens = npt.NDArray[np.int32]

NO_TOKENS: Tokens = np.zeros(0, np.int32)


class Sink:
    """Who hears what becomes of a request: a stream (`StreamSink`), or the owner of an interactive
    sequence (`InteractiveSink`). The core thread calls it, between two steps."""

    def placed(self) -> None:
        """It has a slot."""

    def left(self, slot: int) -> None:
        """It has a slot no more."""

    def computed(self) -> None:
        """Rows of its prompt are computed, and nothing was sampled."""

    def sampled(
        self, token: int, finish: Finish, logprob: float, error: SamplingError | None
    ) -> None:
        """A token was sampled that ends its text, or that is reported. `error`: or none could
        be."""

    def drafted(self, n_drafts: int, n_drafted: int, n_accepted: int) -> None:
        """So many drafts with so many tokens were checked for it, of which so many were right."""

    def failed(self, error: Exception) -> None:
        """A step that it was in has failed for good."""

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        """It is not wanted any more."""

    def close(self, error: Exception) -> None:
        """The engine takes nothing more."""

    def abandon(self, error: Exception, lines: TracebackType | None) -> None:
        """The core thread ends, and leaves it as it is. lines: where `error` came from, as it was
        before any reader raised it."""


NO_SINK = Sink()


class Request:
    """A sequence to be computed: a request that ends by itself, or an interactive one, which has no
    budget and stays until its owner closes it.

    - tokens: what is known of it in Python, int32. The first `n_given` were given, the others
      sampled. `known` brings them up to date.
    - budget: tokens that may be sampled; None without a limit.
    - arrival: a time of `perf_counter`: when it was submitted, or began to wait for a slot.
    - sampler: its sampling state, which goes to the stepper while it has a slot.
    - slot: where it runs, -1 while it does not.
    - state: saved cells that it brings along, until they are stored.
    - n_restarts: fresh contexts because of steps that it was in."""

    __slots__ = (
        "arrival", "budget", "id", "n_given", "n_restarts", "options", "params", "sampler", "sink",
        "slot", "state", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        tokens: Tokens,
        params: SamplingParams,
        sampler: Any = None,
        options: RequestOptions = DEFAULTS,
        *,
        budget: int | None = None,
    ) -> None:
        self.id = id
        self.arrival = 0.0
        self.tokens = tokens
        self.n_given = len(tokens)
        self.params = params
        self.sampler = sampler
        self.options = options
        self.budget = budget
        self.slot = -1
        self.state = b""
        self.n_restarts = 0
        self.sink = NO_SINK

    @property
    def next_row(self) -> tuple[int, int]:
        """Token and position of its last known token, which the next one is sampled from."""
        return int(self.tokens[-1]), len(self.tokens) - 1

    def known(self) -> Tokens:
        """All tokens that it knows: int32. Between two steps."""
        if self.slot >= 0:
            self.tokens = np.concatenate((self.tokens[: self.n_given], self.sampler.tokens()))
        return self.tokens
