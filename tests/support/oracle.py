"""What a sequence gets alone: the reference of the invariance tests, in raw libllama calls.

Nothing here uses the typed layer, the shim or the engine: it is what they are compared with.

CPU kernels differ by the number of rows (one row: dot products; more: blocked products), so the
logits of one token differ in the last bits with what else is in the batch.  Two settings:

- `EXACT`: F32 weights, F32 KV cells, no flash attention.  What is left is the order of F32 sums:
  differences stay below `Tolerance` for logits whose standard deviation is 4.
- `DEFAULT`: libllama's defaults.  Its one-row flash attention sums in F16, the many-row one in F32.

A greedy token says something only where the best logit leads by more than the two logits can
move: `agreement` compares there and counts how much it compared.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.llama import runtime
from pyllamabatch.raw import ffi, lib
from tests.support.models_gguf import CONTROL_TOKENS, N_VOCAB, gguf_path

Logits = npt.NDArray[np.float32]
Row = tuple[int, int, int, bool]  # token, position, sequence, wants logits

EXACT: Mapping[str, Any] = {
    "flash_attn_type": lib.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "type_k": lib.GGML_TYPE_F32,
    "type_v": lib.GGML_TYPE_F32,
}
DEFAULT: Mapping[str, Any] = {}

# Largest difference of a logit (standard deviation 4) between a sequence alone and in a batch.
TOLERANCE = {"gemma3": 0.02}  # its GELU goes through a table in F16
TOLERANCE_ELSE = 2e-4


def tolerance_default(architecture: str) -> float:
    """For F32 weights and libllama's defaults; an expert that wins by a hair may lose."""
    return 1.0 if architecture == "qwen3moe" else 0.25


TOLERANCE_QUANTISED = 0.5  # q8_0, q4_0 and EXACT: an activation may be rounded the other way


def tolerance(architecture: str) -> float:
    """For F32 weights and the settings `EXACT`."""
    return TOLERANCE.get(architecture, TOLERANCE_ELSE)


class RawModel:
    """A `llama_model *` and its vocabulary's size."""

    def __init__(self, path: Path) -> None:
        runtime.ensure()  # libllama's log goes to logging instead of the terminal
        params = lib.llama_model_default_params()
        self.ptr = lib.llama_model_load_from_file(os.fsencode(path), params)
        assert self.ptr != ffi.NULL, path
        self.n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.ptr))

    def close(self) -> None:
        lib.llama_model_free(self.ptr)


class RawContext:
    """A `llama_context *`; `decode` takes rows as tuples and returns the logits asked for."""

    def __init__(self, model: RawModel, *, settings: Mapping[str, Any], **params: Any) -> None:
        p = lib.llama_context_default_params()
        p.n_threads = p.n_threads_batch = 1
        for name, value in {**settings, **params}.items():
            setattr(p, name, value)
        self.model = model
        self.ptr = lib.llama_init_from_model(model.ptr, p)
        assert self.ptr != ffi.NULL
        self.memory = lib.llama_get_memory(self.ptr)
        self.batch = lib.llama_batch_init(lib.llama_n_batch(self.ptr), 0, 1)

    def decode(self, rows: Sequence[Row]) -> Logits:
        """Shape (rows that want logits, n_vocab)."""
        code, logits = self.try_decode(rows)
        assert code == 0, f"llama_decode returned {code}"
        return logits

    def try_decode(self, rows: Sequence[Row]) -> tuple[int, Logits]:
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, pos, seq, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, pos, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        code = lib.llama_decode(self.ptr, batch)
        wanted_rows = [i for i, row in enumerate(rows) if row[3]] if code == 0 else []
        logits = np.empty((len(wanted_rows), self.model.n_vocab), np.float32)
        for k, i in enumerate(wanted_rows):
            source = lib.llama_get_logits_ith(self.ptr, i)
            logits[k] = np.frombuffer(ffi.buffer(source, 4 * self.model.n_vocab), np.float32)
        return code, logits

    def feed(self, tokens: Sequence[int], *, seq: int = 0, pos: int = 0) -> Logits:
        """Decodes `tokens` from position `pos` on in one batch; the logits after the last one."""
        last = len(tokens) - 1
        rows = [(t, pos + i, seq, i == last) for i, t in enumerate(tokens)]
        row: Logits = self.decode(rows)[0]
        return row

    def close(self) -> None:
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.ptr)


@contextmanager
def raw_context(
    model: RawModel, *, settings: Mapping[str, Any] = EXACT, **params: Any
) -> Iterator[RawContext]:
    context = RawContext(model, settings=settings, **params)
    try:
        yield context
    finally:
        context.close()


@contextmanager
def raw_model(path: Path) -> Iterator[RawModel]:
    model = RawModel(path)
    try:
        yield model
    finally:
        model.close()


@dataclass(frozen=True)
class Reference:
    """A greedy continuation and the logits that each of its tokens was chosen from."""

    tokens: list[int]
    logits: Logits = field(repr=False)  # (len(tokens), n_vocab)

    @property
    def margins(self) -> npt.NDArray[np.float32]:
        """By how much the best logit leads, per token."""
        best_two = np.partition(self.logits, -2, axis=1)[:, -2:]
        lead: npt.NDArray[np.float32] = best_two[:, 1] - best_two[:, 0]
        return lead


def greedy(
    feed: Callable[..., Logits],
    logits: Logits,
    n: int,
    *,
    seq: int = 0,
    pos: int,
    never: Sequence[int] = (),
) -> Reference:
    """`n` greedy tokens, none of `never`, of a sequence whose next row's logits are known.
    feed(tokens, seq=, pos=): the logits after the last of them."""
    tokens: list[int] = []
    rows: list[Logits] = []
    while True:
        logits[list(never)] = -1e9
        tokens.append(int(logits.argmax()))
        rows.append(logits)
        if len(tokens) == n:
            return Reference(tokens, np.array(rows))
        logits = feed(tokens[-1:], seq=seq, pos=pos + len(tokens) - 1)


def solo(
    model: RawModel,
    prompt: Sequence[int],
    n: int,
    *,
    settings: Mapping[str, Any] = EXACT,
    never: Sequence[int] = (),
) -> Reference:
    """`n` greedy tokens after `prompt` on a context of its own, prompt in one batch."""
    with raw_context(
        model, settings=settings, n_ctx=len(prompt) + n, n_batch=512, n_ubatch=512
    ) as context:
        return greedy(context.feed, context.feed(prompt), n, pos=len(prompt), never=never)


def solos(architecture: str, prompts: Iterable[Sequence[int]], n: int) -> list[Reference]:
    """`solo` of each prompt on the tiny model of `architecture`, settings `EXACT`."""
    with raw_model(gguf_path(architecture)) as model:
        return [solo(model, prompt, n) for prompt in prompts]


def random_prompts(
    n: int, *, seed: int = 0, shortest: int = 1, longest: int = 70
) -> list[list[int]]:
    """Prompts of different lengths; no control tokens but the first, `<s>`."""
    random = np.random.default_rng(seed)
    return [
        [1, *random.integers(len(CONTROL_TOKENS), N_VOCAB, int(length)).tolist()]
        for length in random.integers(shortest, longest, n, endpoint=True)
    ]


@dataclass
class Agreement:
    """How many tokens were compared with the reference, out of how many."""

    compared: int = 0
    total: int = 0

    @property
    def fraction(self) -> float:
        return self.compared / self.total

    def check(self, reference: Reference, tokens: Sequence[int], tolerance: float) -> None:
        """Asserts that `tokens` is the reference's continuation.

        A continuation that was fed its own tokens may part from the reference at a near tie (a
        margin below twice the tolerance) and is not comparable from there on.
        """
        assert len(tokens) == len(reference.tokens)
        self.total += len(tokens)
        for expected, got, margin in zip(reference.tokens, tokens, reference.margins, strict=True):
            if expected != got and margin <= 2 * tolerance:
                return
            assert got == expected, f"token {got} instead of {expected}, margin {margin:.4f}"
            self.compared += 1
