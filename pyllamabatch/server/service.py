"""Service: what the endpoints of one server share, and the way from a body to running requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4
from weakref import WeakKeyDictionary

from ..engine.chat import with_prompt
from ..engine.embedder import Embedder
from ..engine.embedding_core import Embedding
from ..engine.engine import Engine
from ..engine.followers import Followers
from ..engine.stream import Stream
from ..errors import ArgumentError, GrammarError, UnsupportedOperation, integer
from ..llama import runtime
from ..llama.chat import ChatPrompt
from ..llama.model import Model
from ..llama.vocab import TokenArray
from ..raw import lib
from ..step.sampling_params import SamplingParams
from .bodies import Lora, SamplingBody, bias_of
from .errors import ApiError, invalid
from .options import ServerOptions

if TYPE_CHECKING:
    from .metrics import Metrics

LONG_TEXT = 4096  # characters that are tokenized in the event loop at most

Prompt = str | Sequence[int | str]
"""A text, token ids, or both in a list."""
T = TypeVar("T")


@dataclass(slots=True)
class Prepared:
    """The requests of one body: `n` samples of each prompt, in the order of their choices."""

    prompts: list[TokenArray]
    params: list[SamplingParams]
    streams: list[Stream]

    @property
    def n_prompt(self) -> int:
        return sum(map(len, self.prompts))


class Service:
    """One engine behind HTTP. Everything but `close` is for its event loop."""

    def __init__(
        self, model: Model, engine: Engine | None, options: ServerOptions, metrics: Metrics
    ) -> None:
        """Without an engine it makes embeddings only. Raises `ChatTemplateError`."""
        self._engine = engine
        self.model = model
        self.vocab = model.vocab
        self.options = options
        self.metrics = metrics
        self.machine = engine.machine if engine else None
        self.model_name = options.model_name or self.machine or Path(model.path).name
        if options.chat_template is not None:
            self.vocab.chat_template(options.chat_template)  # a bad one is said now
        self.embedder: Embedder | None = None
        if options.embeddings or options.rerank:
            self.embedder = Embedder(model, "rank" if options.rerank else options.pooling)
        self.default_lora: dict[str, float] = {}
        self.created = self.now()
        self.id = uuid4().hex
        self.fingerprint = f"{runtime.text(lib.plb_llama_cpp_build())}-pyllamabatch"
        self.draining = False
        self._embeddings: dict[Embedding, asyncio.Future[None]] = {}
        self._pieces: dict[int, bytes] = {}
        self._followers = WeakKeyDictionary[asyncio.AbstractEventLoop, Followers]()
        # Long texts and grammars would hold up all streams: these two threads take them.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="pyllamabatch-server")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self.embedder is not None:
            self.embedder.close()

    async def drain(self) -> None:
        """Open requests are finished, or cut off after `drain_timeout`."""
        seconds = self.options.drain_timeout
        ended: list[asyncio.Future[Any]] = [*self._embeddings.values()]
        if self._engine is not None:
            ended.append(asyncio.ensure_future(self._engine.adrain(seconds)))
        if ended:
            await asyncio.wait(ended, timeout=seconds)
        await self.stop()

    async def stop(self) -> None:
        for embedding in self._embeddings:
            embedding.cancel()
        if self._engine is not None:
            await self._engine.astop()

    def admit(self) -> None:
        """ApiError where no new request is taken."""
        if self.draining:
            raise ApiError(503, "the server is about to end", "unavailable_error", code="draining")

    @contextmanager
    def running(self, embedding: Embedding) -> Iterator[None]:
        """An open request: the end of the server waits for it."""
        ended = self._embeddings[embedding] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._embeddings[embedding]
            ended.set_result(None)

    @property
    def engine(self) -> Engine:
        """UnsupportedOperation for a model that makes embeddings only."""
        if self._engine is None:
            raise UnsupportedOperation("this model makes embeddings only")
        return self._engine

    @property
    def followers(self) -> Followers:
        """Who reads the engine's streams in the running event loop."""
        loop = asyncio.get_running_loop()
        found = self._followers.get(loop)
        if found is None:
            found = self._followers[loop] = self.engine.followers(self.metrics.itl.add)
        return found

    @property
    def has_engine(self) -> bool:
        return self._engine is not None

    @property
    def about(self) -> str:
        """Of its engine, in a few words."""
        engine = self._engine
        return f"{engine.n_seq_max} slots, {engine.layout}" if engine else "embeddings"

    @property
    def n_ctx_slot(self) -> int:
        """Tokens that a sequence has cells for, as long as streams are no pool."""
        if self._engine is None:
            return self.embedder.n_tokens_max if self.embedder else 0
        limits = self._engine.limits
        return min(limits.n_cells_seq, limits.n_cells)

    @staticmethod
    def now() -> int:
        """Unix time, in seconds."""
        return int(time.time())

    # -- text

    def tokens(
        self,
        prompt: Prompt,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        name: str = "prompt",
    ) -> TokenArray:
        """A text in which special tokens are parsed, as llama-server does; or token ids. `name`:
        for errors."""
        tokenize = partial(self.vocab.tokenize, parse_special=parse_special)
        if isinstance(prompt, str):
            return tokenize(prompt, add_special=add_special)
        tokens: list[int] = []
        for i, part in enumerate(prompt):
            if isinstance(part, str):
                tokens += tokenize(part, add_special=add_special and i == 0).tolist()
            else:
                tokens.append(part)
        return self.vocab.check_tokens(tokens, name)

    def piece(self, token: int) -> bytes:
        """The bytes of a token, special ones written out."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self.vocab.token_to_piece(token, special=True)
        return piece

    # -- requests

    async def apart(self, call: Callable[[], T]) -> T:
        """In a thread, because it may take long."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def run(self, call: Callable[[], T], *, long: bool) -> T:
        """Here, or apart."""
        return await self.apart(call) if long else call()

    async def submit(
        self,
        body: SamplingBody,
        prompts: Sequence[Prompt],
        n_logprobs: int | None = None,
    ) -> Prepared:
        """The requests of a body, submitted. Raises what becomes a 4xx or a 503."""
        self.admit()
        n = body.n * len(prompts)
        if n > self.options.n_choices_max:
            raise invalid("n", n, f"at most {self.options.n_choices_max} choices of a request")
        prepare = partial(self._submit, body, prompts, n_logprobs)
        text = sum(len(prompt) for prompt in prompts)
        grammar = (
            body.grammar
            or body.json_schema
            or body.response_format
            or any(isinstance(prompt, ChatPrompt) and prompt.grammar for prompt in prompts)
        )
        return await self.run(prepare, long=text > LONG_TEXT or bool(grammar))

    def _submit(
        self,
        body: SamplingBody,
        prompts: Sequence[Prompt],
        n_logprobs: int | None,
    ) -> Prepared:
        if n_logprobs is not None:
            integer(body.name_of("logprobs"), n_logprobs, 0, self.engine.n_logprobs_max)
        said = body.sampling(n_logprobs)
        if any(isinstance(prompt, ChatPrompt) and prompt.grammar for prompt in prompts):
            said.setdefault("grammar", None)
        sampling = {**self.options.sampling, **said}
        if "grammar" in said or "json_schema" in said:  # the one is not for the other's answers
            sampling |= {name: said.get(name) for name in ("grammar", "json_schema")}
        if body.logit_bias is not None:
            sampling["logit_bias"] = bias = bias_of(body.logit_bias, self._bias_tokens)
            self.vocab.check_tokens(list(bias), "logit_bias")
        self.vocab.check_tokens(body.stop_token_ids or (), "stop_token_ids")
        options = self._options(body)
        tokens = [self.tokens(prompt) for prompt in prompts]
        for prompt, one in zip(prompts, tokens, strict=True):
            if not len(one):
                raise invalid("prompt", prompt, "has no tokens")
        try:
            params = [SamplingParams(**self._budget(sampling, len(one))) for one in tokens]
        except ArgumentError as error:
            raise body.named(error) from None
        params = [
            with_prompt(one, prompt) if isinstance(prompt, ChatPrompt) else one
            for one, prompt in zip(params, prompts, strict=True)
        ]
        try:
            streams = self.engine.submit_all(tokens, params, body.n, queue_timeout=0, **options)
        except GrammarError as error:
            raise body.of_grammar(error) from None
        return Prepared(tokens, params, streams)

    def _bias_tokens(self, text: str) -> list[int]:
        found: list[int] = self.tokens(text, add_special=False).tolist()
        return found

    def _budget(self, sampling: dict[str, Any], n_prompt: int) -> dict[str, Any]:
        """`max_tokens` as far as there are cells for them. Streams become a pool for what was asked
        for, not for a request that leaves the end open."""
        n_ctx = self.engine.n_ctx_seq
        if n_prompt > n_ctx:
            raise too_long(n_prompt, n_ctx)
        wanted = sampling.get("max_tokens")
        if wanted is None:
            n_stream = self.engine.limits.n_cells_seq
            n_ctx = n_stream if n_prompt <= n_stream else n_ctx
        room = n_ctx - n_prompt + 1
        most = room if wanted is None else min(wanted, room)
        return {**sampling, "max_tokens": most} | (
            {"min_tokens": min(sampling["min_tokens"], most)} if "min_tokens" in sampling else {}
        )

    def _options(self, body: SamplingBody) -> dict[str, Any]:
        options = body.options(time.time())
        limit = self.options.request_timeout
        if limit is not None:
            options["timeout"] = min(limit, options.get("timeout", limit))
        named = body.model if body.model in self.engine.loras else None
        given = named if body.lora is None else body.lora
        lora = self.default_lora if given is None else self._lora(given)
        if lora:
            options["lora"] = lora
        return options

    def _lora(self, given: Lora) -> str | dict[str, float]:
        """llama-server's list has ids, which are places in its list of adapters."""
        if not isinstance(given, list):
            return given
        names, scales = self.engine.loras, {}
        for one in given:
            id, scale = one.get("id"), one.get("scale", 1.0)
            if not isinstance(id, int) or not 0 <= id < len(names):
                raise invalid("lora", one, f"id must be below {len(names)}")
            scales[names[id]] = scale
        return scales


def too_long(n_prompt: int, n_ctx: int) -> ApiError:
    message = (
        f"the prompt has {n_prompt} tokens, which exceeds the available context size of "
        f"{n_ctx} tokens"
    )
    more = {"n_prompt_tokens": n_prompt, "n_ctx": n_ctx}
    kind = "exceed_context_size_error"
    return ApiError(400, message, kind, param="prompt", code="context_length_exceeded", more=more)
