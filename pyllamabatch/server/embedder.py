"""Embedder: vectors and scores of texts, many at once, in a context and a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ClosedError, UnsupportedOperation
from ..llama.batch import Batch
from ..llama.context import Context
from ..llama.model import Model
from ..llama.vocab import TokenArray
from ..raw import lib

Vector = npt.NDArray[np.float32]

N_TEXTS_MAX = 16  # of one batch: a power of two, as "mean" wants
N_TOKENS_MAX = 2048
N_REQUEST_MAX = 2048  # texts of one request


class Work:
    """The texts of one request. Once it is cancelled, no further batch of them is computed."""

    def __init__(self, texts: Sequence[TokenArray]) -> None:
        self.texts = texts
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Embedder:
    """`pooling`: "mean", "cls", "last" or "rank"; None: the model's own, else "mean"."""

    def __init__(self, model: Model, pooling: str | None = None) -> None:
        n_rows = min(N_TOKENS_MAX, max(64, model.n_ctx_train))
        n_rows -= n_rows % N_TEXTS_MAX
        self.n_tokens_max = n_rows
        options: dict[str, Any] = {
            "n_ctx": n_rows,
            "kv_unified": True,
            "n_batch": n_rows,
            "n_ubatch": n_rows,
            "n_seq_max": N_TEXTS_MAX,
            "embeddings": True,
        }
        if pooling is not None:
            options["pooling_type"] = pooling
        context = Context(model, **options)
        if context.pooling_type == lib.LLAMA_POOLING_TYPE_NONE:
            context.close()
            context = Context(model, **options | {"pooling_type": "mean"})
        self._context = context
        self._has_memory = context.capabilities.has_memory
        self._batch = Batch(n_rows, N_TEXTS_MAX)
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pyllamabatch-embedder")

    @property
    def ranks(self) -> bool:
        """It gives scores, not vectors."""
        return bool(self._context.pooling_type == lib.LLAMA_POOLING_TYPE_RANK)

    def check(self, texts: Sequence[TokenArray], name: str) -> None:
        """ArgumentError for a text without tokens, or with more than a batch has rows."""
        for i, tokens in enumerate(texts):
            if not 0 < len(tokens) <= self.n_tokens_max:
                limit = f"the input is too large or empty: 1 to {self.n_tokens_max} tokens"
                raise ArgumentError(f"{name}[{i}]", f"{len(tokens)} tokens", limit)

    async def vectors(self, work: Work) -> list[Vector]:
        """One for each text, in their order. Calls of several tasks follow each other. Raises
        ClosedError where the work is cancelled, or the embedder closed, before the last batch."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._vectors, work)

    def _vectors(self, work: Work) -> list[Vector]:
        texts = work.texts
        vectors: list[Vector] = []
        while len(vectors) < len(texts):
            if work.cancelled or self._closed:
                raise ClosedError("the texts were given up: the client or the server has left")
            n = self._fill(texts[len(vectors) :])
            if self._has_memory:
                self._context.memory.clear(data=False)
                self._context.decode(self._batch)
            else:
                self._context.encode(self._batch)
            vectors += [self._context.embeddings_seq(i).copy() for i in range(n)]
        return vectors

    def _fill(self, texts: Sequence[TokenArray]) -> int:
        """As many of the first texts as fit one batch; how many they are."""
        batch, n = self._batch, 0
        batch.clear()
        for tokens in texts[:N_TEXTS_MAX]:
            if len(batch) + len(tokens) > self.n_tokens_max:
                break
            batch.extend(tokens, 0, n)
            n += 1
        batch.logits[: len(batch)] = 1
        return n

    def close(self) -> None:
        """Waits for one batch at most: the one that is computed."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)
        self._context.close()


def check_number(texts: Sequence[object], name: str) -> None:
    """ArgumentError for more texts than a request may have."""
    if len(texts) > N_REQUEST_MAX:
        raise ArgumentError(name, f"{len(texts)} texts", f"at most {N_REQUEST_MAX} of a request")


def need(embedder: Embedder | None, *, ranks: bool) -> Embedder:
    """UnsupportedOperation for a server that was started without it."""
    flag = "--rerank" if ranks else "--embeddings"
    if embedder is None or embedder.ranks != ranks:
        raise UnsupportedOperation(f"this server does not support this: start it with {flag}")
    return embedder
