"""A request as the core knows it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, integer
from ..llama.lora import LoraSet
from ..step.sampling_params import SamplingParams
from ..step.types import SAMPLE
from .stream import Stream

Tokens = npt.NDArray[np.int32]


class Options(TypedDict, total=False):
    """What a request may ask for beside its tokens.

    - add_special (default True), parse_special (False): see `Vocab.tokenize`; a prompt from a chat
      template needs `parse_special=True`.
    - priority: an integer, larger goes first; tenant: on whose account. For policies that look at
      them.
    - timeout: seconds from now on, or deadline: a time on the clock of `time.perf_counter`; what is
      not done by then, in the line or running, ends with finish_reason "deadline" and what it has.
    - itl_target: the most seconds between two tokens that its reader likes; for policies, too.
    - lora: which of the engine's adapters apply to it: a name, or names with scales, as
      {"style": 0.5, "facts": 1.0}; by default none.
    """

    add_special: bool
    parse_special: bool
    priority: int
    tenant: str
    timeout: float
    deadline: float
    itl_target: float
    lora: str | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Terms:
    """`Options` that were checked; `deadline` on the clock of `perf_counter`."""

    add_special: bool = True
    parse_special: bool = False
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    itl_target: float | None = None
    lora: str | Mapping[str, float] | None = None  # not checked


NO_TERMS = Terms()


def check_options(options: Options) -> Terms:
    """ArgumentError for one that is out of its range. What `Options` does not know is a TypeError,
    as for any function."""
    if not options:
        return NO_TERMS
    values: dict[str, Any] = {**options}
    timeout = values.pop("timeout", None)
    for name, value in (("timeout", timeout), ("itl_target", values.get("itl_target"))):
        if value is not None:
            seconds_of(name, value)
    if timeout is not None:
        if values.get("deadline") is not None:
            raise ArgumentError("deadline", values["deadline"], "timeout is given already")
        values["deadline"] = perf_counter() + timeout
    terms = Terms(**values)
    integer("priority", terms.priority, -(2**31), 2**31 - 1)
    if not isinstance(terms.tenant, str):
        raise ArgumentError("tenant", terms.tenant, "must be text")
    if terms.deadline is not None and not _is_number(terms.deadline):
        raise ArgumentError("deadline", terms.deadline, "must be a number of seconds")
    return terms


def seconds_of(name: str, value: float) -> float:
    """ArgumentError for anything but a number of seconds from 0 on."""
    if not _is_number(value) or value < 0:
        raise ArgumentError(name, value, "must be a number of seconds, 0 or more")
    return float(value)


def _is_number(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(float(value))  # type: ignore[arg-type]


class Request:
    """What the core knows of a request. `tokens`: what is to be computed, int32: its prompt,
    and after a preemption what it had generated too. `slot`: where it runs, else -1. `sampler`: its
    sampling state while it has no slot. `space`: only requests of the same one start from each
    other; None is everybody's. `lora`: the adapters that it is computed with. `n_restarts`: of the
    context, because of steps that it was in."""

    __slots__ = (
        "id",
        "lora",
        "n_restarts",
        "params",
        "prompt",
        "sampler",
        "seated",
        "slot",
        "space",
        "stream",
        "terms",
        "tokens",
    )

    flags = SAMPLE  # of the row that it is sampled from

    def __init__(
        self,
        prompt: Tokens,
        params: SamplingParams,
        stream: Stream,
        sampler: Any,
        terms: Terms = NO_TERMS,
        space: Hashable = None,
        lora: LoraSet = (),
    ) -> None:
        self.lora = lora
        self.id = stream.id
        self.terms = terms
        self.n_restarts = 0
        self.seated = False  # it has had a slot
        self.prompt = prompt
        self.tokens = prompt
        self.params = params
        self.stream = stream
        self.sampler = sampler
        self.slot = -1
        self.space = space

    def known(self) -> Tokens:
        """All that it knows: int32. Between two steps."""
        self.tokens = np.concatenate((self.prompt, self.sampler.tokens()), dtype=np.int32)
        return self.tokens

    def unseated(self) -> None:
        """It has given up its slot."""
        self.known()
