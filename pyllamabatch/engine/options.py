"""Options of requests and of engines: what may be given, and the checks of it."""

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from ..cost.model import CostModel
from ..errors import ArgumentError, choice, flag, integer, number, unknown_keyword
from ..kv import Preemption
from ..llama.host import PathLike
from ..llama.lora import LoraAdapter, LoraSet
from ..llama.model import Model
from ..scheduler import Gather, Policy, make_policy
from ..scheduler.policy import check_policy
from ..step.sampling_params import SamplingParams
from .drafters import AnyDrafter, drafter_of

LONGEST_SECONDS = 10 * 365 * 86400.0
"""A deadline further away than this is a time of another clock."""


class Options(TypedDict, total=False):
    """What a request may ask for beside its tokens.

    - add_special, parse_special: see `Vocab.tokenize`. Prompts from `Vocab.apply_chat_template`
      need neither.
    - priority: an integer, larger goes first. tenant: on whose account. For policies that look at
      them.
    - timeout: seconds from now on. deadline: the same as a time of `time.perf_counter()`. What is
      not done by then, waiting or running, ends with finish_reason "deadline" and what it has.
    - ttft_target, itl_target: seconds from now to the first token, and between two tokens, that its
      reader likes at most; for policies, too.
    - lora: which of the engine's adapters apply to it: a name, or names with scales, as
      {"style": 0.5, "facts": 1.0}. Default: none."""

    add_special: bool
    parse_special: bool
    priority: int
    tenant: str
    timeout: float
    deadline: float
    ttft_target: float
    itl_target: float
    lora: str | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """`Options` that were checked. `deadline`: a time of `perf_counter`. `space`: only requests of
    the same one start from each other's cells; None: any."""

    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    ttft_target: float | None = None
    itl_target: float | None = None
    lora: LoraSet = ()
    space: Hashable = None


DEFAULTS = RequestOptions()
BatchInvariant = bool | Literal["nearly"]


def check_options(options: Options, now: float) -> dict[str, Any]:
    """The given options, `timeout` as a `deadline` from `now` on. ArgumentError for what is out of
    its range, and for what is none."""
    values: dict[str, Any] = {**options}
    for name in values.keys() - Options.__annotations__.keys():
        if name in SamplingParams.__dataclass_fields__:
            raise ArgumentError(name, values[name], f"goes into SamplingParams({name}=...)")
        raise unknown_keyword(name, values[name], Options.__annotations__)
    timeout, deadline = values.pop("timeout", None), values.get("deadline")
    if timeout is not None:
        if deadline is not None:
            raise ArgumentError("deadline", deadline, "timeout is given already")
        values["deadline"] = now + number("timeout", timeout, 0)
    elif deadline is not None and number("deadline", deadline) > now + LONGEST_SECONDS:
        limit = "a time of time.perf_counter(); for seconds from now on there is timeout"
        raise ArgumentError("deadline", deadline, limit)
    for name in ("ttft_target", "itl_target"):
        if values.get(name) is not None:
            number(name, values[name], 0)
    integer("priority", values.get("priority", 0), -(2**31), 2**31 - 1)
    if not isinstance(values.get("tenant", ""), str):
        raise ArgumentError("tenant", values["tenant"], "must be text")
    return values


@dataclass(slots=True)
class EngineOptions:
    """The keywords of `Engine` that are not the context's, checked."""

    n_seq_max: int
    policy: Policy | None
    n_logprobs_max: int
    device_sampling: bool | str
    n_trace: int
    max_waiting: int | None
    gather: Gather | None
    patience: float
    cost: CostModel | Literal["auto"] | None
    prefix_cache: bool
    preemption: Preemption
    swap_bytes: int
    swap_folder: PathLike | None
    max_restarts: int
    loras: Mapping[str, LoraAdapter]
    speculate: AnyDrafter | Model | str | None = "auto"
    batch_invariant: BatchInvariant = False
    drafter: AnyDrafter | None = field(init=False, default=None)  # what `speculate` is

    def __post_init__(self) -> None:
        self.n_seq_max = integer("n_seq_max", self.n_seq_max, 1, 256)
        self.n_trace = integer("n_trace", self.n_trace, 0, 2**24)
        self.swap_bytes = integer("swap_bytes", self.swap_bytes, 0, 2**63 - 1)
        self.max_restarts = integer("max_restarts", self.max_restarts, 0, 2**31)
        self.patience = number("patience", self.patience, 0)
        flag("prefix_cache", self.prefix_cache)
        if not (self.swap_folder is None or os.path.isdir(self.swap_folder)):
            raise ArgumentError("swap_folder", self.swap_folder, "must be a folder that is there")
        if not isinstance(self.loras, Mapping):
            raise ArgumentError("loras", self.loras, 'must be adapters by name: {"style": adapter}')
        if not isinstance(self.batch_invariant, bool) and self.batch_invariant != "nearly":
            raise ArgumentError("batch_invariant", self.batch_invariant, 'True, False or "nearly"')
        choice("preemption", self.preemption, ("auto", "recompute", "swap"))
        if self.speculate not in (None, "auto") and self.batch_invariant == "nearly":
            why = 'None with batch_invariant="nearly": steps with drafts have other numbers of rows'
            raise ArgumentError("speculate", self.speculate, why)
        self.drafter = None if self.speculate == "auto" else drafter_of(self.speculate)
        if not (self.gather is None or callable(self.gather)):
            raise ArgumentError("gather", self.gather, "as Window(200e-6) or CostWindow()")
        if self.cost not in (None, "auto") and not hasattr(self.cost, "predict"):
            raise ArgumentError("cost", self.cost, 'a CostModel, None or "auto"')
        if self.max_waiting is not None:
            self.max_waiting = integer("max_waiting", self.max_waiting, 1, 2**31)


def policy_of(given: Policy | str | None) -> Policy | None:
    """A policy, also by its name. ArgumentError for what is none."""
    if isinstance(given, str):
        return make_policy(given)
    return None if given is None else check_policy(given, given)
