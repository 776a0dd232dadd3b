"""EmbeddingCore: texts of many calls, packed into batches by one thread on one context."""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from ..errors import ClosedError, ContextCreateError, FatalDecodeError
from ..llama.batch import Batch
from ..llama.context import Context
from ..llama.vocab import TokenArray
from ..raw import lib
from .process import Process

Vectors = npt.NDArray[np.float32]

PACKED_TOKENS = 512
"""Of several texts in a batch: each row looks over the rows of all, so that more cost more."""


class Embedding:
    """The texts of one call. `future`: their vectors, a row each, in their order."""

    def __init__(self, texts: Sequence[TokenArray], width: int) -> None:
        self.texts = texts
        self.vectors = np.empty((len(texts), width), np.float32)
        self.future: Future[Vectors] = Future()
        self.n_taken = 0  # texts that are in a batch, or were
        self.n_done = 0

    def cancel(self) -> None:
        """No further text of it is computed: `future` raises ClosedError, unless it is done."""
        self.fail(ClosedError("the texts were given up: the client or the engine has left"))

    def fail(self, error: Exception) -> None:
        try:
            self.future.set_exception(error)
        except InvalidStateError:  # it is done, or was cancelled
            return

    def place(self, i: int, vector: Vectors) -> None:
        """Of text `i`."""
        self.vectors[i] = vector
        self.n_done += 1
        if self.n_done == len(self.texts):
            try:
                self.future.set_result(self.vectors)
            except InvalidStateError:
                return


Text = tuple[Embedding, int]
"""Text number so-and-so of a call."""


class EmbeddingCore:
    """Batches of as many waiting texts as fit, a text of each call in turn. `context`: it is this
    core's from now on. Any thread may call."""

    def __init__(self, context: Context, width: int) -> None:
        self._context = context
        self._width = width
        self._decodes = context.capabilities.has_memory and not context.model.has_encoder
        self._batch = Batch(context.n_batch, context.n_seq_max)
        self._waiting: deque[Embedding] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._process = Process()
        self._thread = threading.Thread(target=self._run, name="pyllamabatch-embedder", daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[TokenArray]) -> Embedding:
        """Texts of 1 to `n_batch` tokens each. ClosedError, also in a forked child."""
        self._process.check()
        embedding = Embedding(texts, self._width)
        with self._changed:
            if self._closed:
                raise ClosedError("the embedder is closed")
            if texts:
                self._waiting.append(embedding)
                self._changed.notify()
            else:
                embedding.future.set_result(embedding.vectors)
        return embedding

    def close(self) -> None:
        """Waits for one batch at most: the one that is computed. What waits raises ClosedError.
        Nothing happens in a forked child."""
        if not self._process.is_here:
            return
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while taken := self._take():
                self._compute(taken)
        finally:
            for embedding in self._waiting:
                embedding.cancel()
            self._context.close()

    def _take(self) -> list[Text]:
        """The texts of the next batch; none when the core is closed."""
        with self._changed:
            taken: list[Text] = []
            n_tokens = 0
            while not taken:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return [*taken]
                while self._waiting and len(taken) < self._context.n_seq_max:
                    embedding = self._waiting[0]
                    if embedding.future.done():
                        self._waiting.popleft()
                        continue
                    n_tokens += len(embedding.texts[embedding.n_taken])
                    if taken and n_tokens > min(PACKED_TOKENS, self._batch.capacity):
                        break
                    taken.append((embedding, embedding.n_taken))
                    embedding.n_taken += 1
                    self._waiting.popleft()
                    if embedding.n_taken < len(embedding.texts):
                        self._waiting.append(embedding)
            return taken

    def _compute(self, taken: list[Text]) -> None:
        """A batch that fails is computed again text by text, so that a text fails for itself. After
        a failure of the backend in a fresh context: a Mac's GPU computes nothing more in this
        one."""
        try:
            vectors = self._decode(taken)
        except Exception as error:
            if isinstance(error, FatalDecodeError):
                with suppress(ContextCreateError):  # closed, it says so to the next one
                    self._context.renew()
            if len(taken) == 1:
                taken[0][0].fail(error)
                return
            for text in taken:
                self._compute([text])
            return
        for (embedding, i), vector in zip(taken, vectors, strict=True):
            embedding.place(i, vector)

    def _decode(self, taken: list[Text]) -> list[Vectors]:
        """The vector of each, valid until the next batch."""
        batch, context = self._batch, self._context
        batch.clear()
        for seq, (embedding, i) in enumerate(taken):
            batch.extend(embedding.texts[i], 0, seq)
        batch.logits[: len(batch)] = 1
        if self._decodes:
            context.memory.clear(data=False)
            context.decode(batch)
        else:
            context.encode(batch)
        return [context.embeddings_seq(seq) for seq in range(len(taken))]


def ranks(context: Context) -> bool:
    """It gives scores, not vectors."""
    return bool(context.pooling_type == lib.LLAMA_POOLING_TYPE_RANK)
