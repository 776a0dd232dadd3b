"""From what a caller gives to what the core knows: everything is checked before it begins."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ..llama.lora import Loras, LoraSet
from ..llama.vocab import pieces_of
from ..step.sampling_params import SamplingParams
from .core import EngineCore
from .detokenizer import Pieces
from .hand import Hand
from .request import Options, Request, Tokens, check_options
from .sequence import interactive
from .stream import Stream

if TYPE_CHECKING:
    from ..llama.model import Model
    from ..step.stepper import Stepper

Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]]


class InputProcessor:
    """Any thread's, while it visits the core's commands."""

    def __init__(
        self,
        model: Model,
        core: EngineCore,
        stepper: Stepper,
        loras: Loras,
        prefix_cache: bool,
    ) -> None:
        self.loras = loras
        self._prefix_cache = prefix_cache
        self.pieces = Pieces(_pieces_of(model))
        self._ids = itertools.count(1)
        self._vocab = model.vocab
        self._core = core
        self._stepper = stepper

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        options: Options,
        keep: object,
    ) -> list[Request]:
        """One for each prompt; for `keep` see `Stream`."""
        if isinstance(prompts, str):
            raise ArgumentError("prompts", prompts, "must be a list of prompts")
        each = [params] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ArgumentError("params", f"{len(each)} of them", f"{len(prompts)}, one per prompt")
        return [
            self.request(prompt, param, options, keep)
            for prompt, param in zip(prompts, each, strict=True)
        ]

    def request(
        self, prompt: Prompt, params: SamplingParams | None, options: Options, keep: object
    ) -> Request:
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ArgumentError("params", params, "must be SamplingParams")
        terms = check_options(options)
        lora = self.loras.choose(terms.lora)
        tokens = self.tokens(prompt, terms.add_special, terms.parse_special)
        if params.stop and self._vocab.type == "none":
            raise ArgumentError("stop", params.stop, "the model has no text: use stop_token_ids")
        self._core.scheduler.check_fits(len(tokens), params.max_tokens)
        sampler = self._stepper.make_slot(params, tokens)
        stream = Stream(
            next(self._ids),
            len(tokens),
            pieces=self.pieces,
            stops=tuple(params.stop),
            min_tokens=params.min_tokens,
            logprobs=params.logprobs,
            cancel=self._core.cancel,
            watch=self._core.output_processor.watch,
            keep=keep,
        )
        return Request(tokens, params, stream, sampler, terms, self._space(lora), lora)

    def hand(
        self, params: SamplingParams | None, priority: int, tenant: str, lora: LoraSet
    ) -> Hand:
        return Hand(next(self._ids), interactive(params), priority, tenant, lora, self._space(lora))

    def _space(self, lora: LoraSet) -> Hashable:
        """What is computed with other adapters is no beginning for it."""
        return lora if lora and self._prefix_cache else None

    def tokens(self, prompt: Prompt, add_special: bool, parse_special: bool) -> Tokens:
        """ArgumentError for none, and for what is not in the vocabulary."""
        if isinstance(prompt, str):
            tokens = self._vocab.tokenize(
                prompt, add_special=add_special, parse_special=parse_special
            )
        else:
            tokens = self._vocab.check_tokens(prompt, "prompt").copy()
        if len(tokens) == 0:
            raise ArgumentError("prompt", prompt, "has no tokens")
        return tokens


def _pieces_of(model: Model) -> Callable[[list[int]], list[bytes]]:
    """The bytes of tokens for as long as the context lives, also when the model is closed."""
    ptr = model.vocab.ptr
    return lambda tokens: pieces_of(ptr, tokens)
