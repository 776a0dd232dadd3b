"""InputProcessor: from what a caller gives to what the core knows. All of it is checked here, once,
before anything has started."""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ..llama.lora import Loras, LoraSet
from ..llama.model import Model
from ..llama.vocab import pieces_of
from ..step.sampling_params import INT32_MAX, SamplingParams
from ..step.stepper import DetachedSlot, Stepper
from .core import EngineCore
from .detokenizer import Pieces
from .interactive import InteractiveSink
from .options import Options, RequestOptions, check_options
from .request import NO_TOKENS, Request, Tokens
from .snapshot import Saved, slot_of
from .stream import Host, Stream
from .stream_sink import StreamSink

Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]]


class InputProcessor:
    """For any thread, inside `CommandQueue.keep_alive`. `prefix_cache`: requests start from what
    others have left, so that those with different adapters must not share."""

    def __init__(
        self, model: Model, core: EngineCore, stepper: Stepper, loras: Loras, prefix_cache: bool
    ) -> None:
        self.model = model
        self.loras = loras
        self._pieces = Pieces(_pieces_of(model))
        self._vocab = model.vocab
        self._core = core
        self._stepper = stepper
        self._prefix_cache = prefix_cache
        self._ids = itertools.count(1)

    # -- requests with a stream

    def requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        options: Options,
        engine: object,
        n: int = 1,
    ) -> list[StreamSink]:
        """`n` for each prompt. Their streams keep `engine` alive."""
        if isinstance(prompts, str):
            raise ArgumentError("prompts", prompts, "must be a list of prompts")
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ArgumentError("params", f"{len(each)} of them", f"{len(prompts)}, one per prompt")
        return [
            sink
            for prompt, one in zip(prompts, each, strict=True)
            for sink in self._samples(prompt, one, options, engine, n)
        ]

    def _samples(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        options: Options,
        engine: object,
        n: int,
    ) -> list[StreamSink]:
        """`n` requests of one prompt, with seeds of their own. They start from each other."""
        params = self._params(params)
        first = self.request(prompt, params, options, engine)
        sinks = [first]
        for i in range(1, n):
            one = params if params.seed is None else params.with_seed(params.seed + i)
            sinks.append(self.request(first.request.tokens, one, options, engine))
        if n > 1 and not self._prefix_cache:
            for sink in sinks:
                space = "samples", first.request.id
                sink.request.options = replace(sink.request.options, space=space)
        return sinks

    def request(
        self, prompt: Prompt, params: SamplingParams | None, options: Options, engine: object
    ) -> StreamSink:
        """One request and its stream, which keeps `engine` alive."""
        now = perf_counter()
        params = self._params(params)
        values = check_options(options, now)
        add_special = values.pop("add_special", True)
        tokens = self.tokens(prompt, add_special, values.pop("parse_special", None))
        lora = self.loras.choose(values.pop("lora", None))
        if params.stop and self._vocab.type == "none":
            raise ArgumentError("stop", params.stop, "the model has no text: use stop_token_ids")
        # a prompt ends with a token, which the stream leaves out where none was asked for
        sampled = params if params.max_tokens else replace(params, max_tokens=1)
        self._core.scheduler.check_fits(len(tokens), sampled.max_tokens)
        request = Request(
            next(self._ids),
            tokens,
            params,
            self.sampler(sampled, tokens),
            RequestOptions(**values, lora=lora, space=self._space(lora)),
            budget=sampled.max_tokens,
        )
        core = self._core
        host = Host(core.cancel, core.output_processor.watch, engine, core.may_wait)
        stream = Stream(request.id, len(tokens), params, self.pieces(params), host, now)
        return self._core.stream_to(request, stream)

    # -- interactive sequences

    def interactive(
        self,
        params: SamplingParams | None,
        priority: int,
        tenant: str,
        lora: str | Mapping[str, float] | None,
    ) -> InteractiveSink:
        """A sequence without tokens, which its owner tells what to do."""
        params = self._params(params)
        if params.stop:
            limit = "of an interactive sequence the owner looks for stop strings"
            raise ArgumentError("stop", params.stop, limit)
        params = replace(params, max_tokens=INT32_MAX)
        check_options({"priority": priority, "tenant": tenant}, perf_counter())
        chosen = self.loras.choose(lora)
        options = RequestOptions(priority, tenant, lora=chosen, space=self._space(chosen))
        return self._core.interactive(Request(next(self._ids), NO_TOKENS, params, options=options))

    # -- parts of them

    def tokens(self, prompt: Prompt, add_special: bool, parse_special: bool | None) -> Tokens:
        """ArgumentError for an empty prompt, and for tokens that are not in the vocabulary."""
        if isinstance(prompt, str):
            tokens = self._vocab.tokenize(
                prompt, add_special=add_special, parse_special=parse_special
            )
        else:
            first = prompt[0] if isinstance(prompt, (list, tuple)) and prompt else prompt
            if isinstance(first, Mapping):
                limit = "a chat: engine.chat(messages), or vocab.apply_chat_template(messages)"
                raise ArgumentError("prompt", prompt, limit)
            tokens = self._vocab.check_tokens(prompt, "prompt").copy()
        if len(tokens) == 0:
            raise ArgumentError("prompt", prompt, "has no tokens")
        return tokens

    def sampler(self, params: SamplingParams, tokens: Tokens) -> DetachedSlot:
        """A sampling state that begins behind `tokens`, which were checked."""
        return self._stepper.new_slot(params, tokens)

    def saved_sampler(self, saved: Saved) -> DetachedSlot | None:
        """The sampling state of a snapshot."""
        return slot_of(self._stepper, saved)

    def pieces(self, params: SamplingParams) -> Pieces:
        """What tokens are in the text of a request with these."""
        if not params.preserved_tokens:
            return self._pieces
        tokens = self._vocab.check_tokens(params.preserved_tokens, "preserved_tokens").tolist()
        piece = partial(self._vocab.token_to_piece, special=True)
        return self._pieces.preserving(tuple(tokens), piece)

    def _params(self, params: SamplingParams | None) -> SamplingParams:
        if params is None:
            return SamplingParams()
        if not isinstance(params, SamplingParams):
            raise ArgumentError("params", params, "must be SamplingParams")
        return params

    def _space(self, lora: LoraSet) -> Hashable:
        """Cells that were computed with other adapters are none to start from."""
        return lora if lora and self._prefix_cache else None


def _pieces_of(model: Model) -> Callable[[list[int]], list[bytes]]:
    """The bytes of tokens for as long as the context lives, also when the model is closed."""
    ptr = model.vocab.ptr
    return lambda tokens: pieces_of(ptr, tokens)
