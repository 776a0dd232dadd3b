"""Embedder: vectors of texts and scores of documents, many in a batch."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, EngineClosed, UnsupportedOperation, choice, integer
from ..llama.context import Context
from ..llama.limits import max_position
from ..llama.memory import copies_whole_only
from ..llama.model import Model
from ..llama.vocab import TokenArray
from ..raw import lib
from .embedding_core import Embedding, EmbeddingCore, Vectors, ranks
from .input_processor import Prompt
from .process import Process

POOLINGS = ("mean", "cls", "last", "rank")

N_TOKENS_MAX = 2048  # of a batch, where the model was trained with so many
N_STATES_MAX = 16  # texts of a batch whose states take memory, however short they are
OWN = {"n_ctx", "n_ubatch", "embeddings", "pooling_type"}  # parameters of its context


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document by its relevance. index: its place in the list that was given."""

    index: int
    score: float


class Embedder:
    """Texts to vectors, on a context of `model` and in a thread of its own.

        with Embedder(Model("bge-small.gguf")) as embedder:
            vectors = embedder.embed(["one text", "another"])     # float32 (2, n_embd)
            similar = vectors @ vectors.T                         # cosines: their length is 1
        with Embedder(Model("bge-reranker.gguf"), "rank") as ranker:
            best, *_ = ranker.rerank("where do pandas live?", documents)

    For models of any kind: encoders, and decoders too. `Engine.embed` is the same on the weights of
    an engine that generates. Any thread may call. Texts of calls that wait at the same time are
    computed together.

    - pooling: what becomes of a text's tokens: "mean", "cls" (the first one's vector), "last", or
      "rank" (the scores of a reranker; what a model without a head for it gives means nothing).
      None: the model's own, else "mean".
    - n_batch: tokens of a text at most; 0: what the model was trained with, up to 2048.
    - n_seq_max: texts of a batch at most, a power of two.
    - context_params: any other parameter of `Context`.

    Raises ArgumentError, ContextCreateError for a pooling that the model can't do, and
    NotEnoughMemory."""

    def __init__(
        self,
        model: Model,
        pooling: str | None = None,
        *,
        n_batch: int = 0,
        n_seq_max: int = 64,
        **context_params: Any,
    ) -> None:
        if not isinstance(model, Model):
            raise ArgumentError("model", model, "must be a Model: Embedder(Model(path), ...)")
        if pooling is not None:
            choice("pooling", pooling, POOLINGS)
        n_seq_max = integer("n_seq_max", n_seq_max, 1, 256)
        if n_seq_max & (n_seq_max - 1):
            raise ArgumentError("n_seq_max", n_seq_max, "a power of two")
        n_batch = integer("n_batch", n_batch, 0, 2**20)
        for name in OWN & context_params.keys():
            limit = "the embedder sets it itself, by pooling, n_batch and n_seq_max"
            raise ArgumentError(name, context_params[name], limit)
        rows = n_batch or min(N_TOKENS_MAX, max(n_seq_max, model.n_ctx_train))
        rows = max(rows, n_seq_max)
        rows = -(-rows // n_seq_max) * n_seq_max
        if copies_whole_only(model):
            n_seq_max = min(n_seq_max, N_STATES_MAX)
        options: dict[str, Any] = {
            "kv_unified": True, **context_params,
            "n_ctx": rows, "n_batch": rows, "n_ubatch": rows, "n_seq_max": n_seq_max,
            "embeddings": True,
        }  # fmt: skip
        if pooling is not None:
            options["pooling_type"] = pooling
        context = Context(model, **options)
        if context.pooling_type == lib.LLAMA_POOLING_TYPE_NONE:  # nor has the model one
            context.close()
            context = Context(model, **options, pooling_type="mean")
        self.model = model
        self.n_tokens_max = min(n_batch or rows, max_position(model) + 1)
        """Tokens of a text at most."""
        self.ranks = ranks(context)
        """It gives scores, by `rerank`; else vectors, by `embed`."""
        width = model.n_cls_out if self.ranks else model.n_embd_out
        self._core = EmbeddingCore(context, width)
        # Also when it is forgotten, and before the interpreter exits.
        self._finalizer = weakref.finalize(self, self._core.close)

    def embed(self, texts: Sequence[Prompt], *, normalize: bool = True) -> Vectors:
        """A vector for each text (or list of token ids), in their order: float32, (n, n_embd_out).

        `normalize`: to length 1. Raises ArgumentError for a text without tokens or with more than
        `n_tokens_max`, and nothing is computed; UnsupportedOperation for a reranker; ClosedError,
        also in a forked child; and what a text fails with: a `DecodeError`, MemoryError."""
        vectors = _wait(self.submit(self.tokens(texts)))
        return normalized(vectors) if normalize else vectors

    async def aembed(self, texts: Sequence[Prompt], *, normalize: bool = True) -> Vectors:
        """`embed` for asyncio. Cancelling the task cancels what is not computed yet."""
        tokens = await asyncio.to_thread(self.tokens, texts)
        vectors = await asyncio.wrap_future(self.submit(tokens).future)
        return normalized(vectors) if normalize else vectors

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None
    ) -> list[Ranked]:
        """The documents by their relevance to `query`, the best first; `top_n` of them at most.

        Raises as `embed`; UnsupportedOperation where the pooling is not "rank"."""
        top_n = _most(top_n)
        embedding = self.submit(self.pairs(query, documents), ranks=True)
        return best_of(_wait(embedding), top_n)

    async def arerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None
    ) -> list[Ranked]:
        """`rerank` for asyncio. Cancelling the task cancels what is not computed yet."""
        top_n = _most(top_n)
        pairs = await asyncio.to_thread(self.pairs, query, documents)
        return best_of(await asyncio.wrap_future(self.submit(pairs, ranks=True).future), top_n)

    # -- parts of them

    def tokens(self, texts: Sequence[Prompt]) -> list[TokenArray]:
        """Of each text. ArgumentError."""
        if isinstance(texts, str):
            raise ArgumentError("texts", texts, "must be a list of texts: embed([text])")
        vocab = self.model.vocab
        tokens = [
            vocab.tokenize(text) if isinstance(text, str) else vocab.check_tokens(text, "texts")
            for text in texts
        ]
        self.check(tokens, "texts")
        return tokens

    def pairs(
        self, query: str, documents: Sequence[str], name: str = "documents"
    ) -> list[TokenArray]:
        """What a reranker reads, for each document: as llama-server puts the two together.
        ArgumentError. `name`: for errors."""
        if isinstance(documents, str):
            raise ArgumentError(name, documents, "must be a list of texts: [document]")
        pairs = [_pair(self.model, query, document) for document in documents]
        self.check(pairs, name)
        return pairs

    def check(self, texts: Sequence[TokenArray], name: str) -> None:
        """ArgumentError for a text without tokens, or with more than `n_tokens_max`."""
        for i, tokens in enumerate(texts):
            if not 0 < len(tokens) <= self.n_tokens_max:
                limit = f"the input is too large or empty: 1 to {self.n_tokens_max} tokens"
                raise ArgumentError(f"{name}[{i}]", f"{len(tokens)} tokens", limit)

    def submit(self, texts: Sequence[TokenArray], *, ranks: bool = False) -> Embedding:
        """Texts that `check` has passed. Its `future` has their vectors as they are, or scores."""
        if ranks != self.ranks:
            say = 'has no scores: Embedder(model, "rank")' if ranks else "has scores only: rerank"
            raise UnsupportedOperation(f"this embedder {say}")
        return self._core.submit(texts)

    def close(self) -> None:
        """Free the context, after the batch that is computed. Closing twice is fine."""
        self._finalizer()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"texts of up to {self.n_tokens_max} tokens" if self._finalizer.alive else "closed"
        return f"<Embedder {state}>"


class Embedders:
    """An engine's, made when they are first asked for. `context`: its own, or what stands for it on
    a profile machine."""

    def __init__(self, context: object) -> None:
        self._context = context
        self._made: dict[str, Embedder] = {}
        self._process = Process()
        self._lock = threading.Lock()
        self._closed = False

    def of(self, kind: Literal["embed", "rank"]) -> Embedder:
        """For vectors, or for scores. UnsupportedOperation on a profile machine and for scores of a
        model that gives none; EngineClosed."""
        context = self._context
        if not isinstance(context, Context):
            raise UnsupportedOperation("a profile machine computes no vectors")
        self._process.check()
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed")
            if kind == "rank" and not _is_reranker(context.model):
                limit = "is no reranker, by its file; Embedder(model, 'rank') takes it for one"
                raise UnsupportedOperation(f"{context.model.path} {limit}")
            if kind not in self._made:
                self._made[kind] = Embedder(
                    context.model,
                    "rank" if kind == "rank" else None,
                    n_threads=context.params["n_threads"],
                    n_threads_batch=context.params["n_threads_batch"],
                )
            return self._made[kind]

    def close(self) -> None:
        if not self._process.is_here:
            return
        with self._lock:
            self._closed = True
            for embedder in self._made.values():
                embedder.close()


def _is_reranker(model: Model) -> bool:
    pooling = model.metadata.get(f"{model.architecture}.pooling_type", "")
    return pooling == str(lib.LLAMA_POOLING_TYPE_RANK)


def best_of(scores: Vectors, top_n: int | None) -> list[Ranked]:
    """By the first of each document's scores."""
    order = np.argsort(-scores[:, 0], kind="stable")[:top_n]
    return [Ranked(int(i), float(scores[i, 0])) for i in order]


def _most(top_n: int | None) -> int | None:
    return None if top_n is None else integer("top_n", top_n, 1, 2**31 - 1)


def _wait(embedding: Embedding) -> Vectors:
    try:
        return embedding.future.result()
    except BaseException:  # also interrupted
        embedding.cancel()
        raise


def normalized(vectors: Vectors) -> Vectors:
    """Each of length 1."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    of_length_1: Vectors = vectors / np.maximum(lengths, 1e-12)
    return of_length_1


def _pair(model: Model, query: str, document: str) -> TokenArray:
    vocab = model.vocab
    template = model.chat_template("rerank")
    if template is not None:
        text = template.replace("{query}", query).replace("{document}", document)
        return vocab.tokenize(text, add_special=False, parse_special=True)
    texts = [vocab.tokenize(text, add_special=False) for text in (query, document)]
    bos = [vocab.bos] if vocab.add_bos else []
    eos = [vocab.sep if vocab.eos is None else vocab.eos] if vocab.add_eos else []
    sep = [vocab.sep] if vocab.add_sep else []
    parts = [*bos, *texts[0].tolist(), *eos, *sep, *texts[1].tolist(), *eos]
    return np.array([token for token in parts if token is not None], np.int32)
