"""A raw loop on one context, in Python: build a batch, decode it, sample its rows.

It is what a program without an engine does, for one sequence or for many. It samples with
libllama's own chain, row by row on its thread, or with the fused sampler and its pool of threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyllamabatch.compare.case import sampling_params
from pyllamabatch.errors import decode_error
from pyllamabatch.raw import lib
from pyllamabatch.step.stepper import SAMPLE, Stepper

if TYPE_CHECKING:
    from pyllamabatch.llama.context import Context

CHAIN, FUSED = "chain", "fused"
_NO_END = 2**31 - 1  # a sampler's budget: the caller counts

_Row = tuple[int, int, int, bool]
"""Token, position, sequence, whether the next token is sampled from it."""


@dataclass
class _Sequence:
    left: list[int]  # tokens that are known and not computed
    pos: int = 0  # of the first of them
    decoding: bool = False  # it has sampled: `left` is that token


class Loop(ABC):
    """Sequences 0 to n_seq_max - 1 of `context`, which it does not close.

    A step computes the last token of every sequence that decodes and, beside them, as many rows of
    prompts as the batch has room for. A sequence samples its first token with its prompt's last
    row.
    """

    def __init__(self, context: Context, sampling: str) -> None:
        self.context = context
        self._sampling = sampling
        self._sequences: dict[int, _Sequence] = {}

    @property
    def idle(self) -> bool:
        return not self._sequences

    @property
    def prefilling(self) -> bool:
        """Whether the prompt of a sequence is not computed to its end."""
        return any(not s.decoding for s in self._sequences.values())

    def start(self, seq: int, prompt: Sequence[int], seed: int) -> None:
        """Give `seq`, which must be stopped, a prompt and a sampler."""
        self._set_sampler(seq, seed)
        self._sequences[seq] = _Sequence(list(prompt))

    def stop(self, seq: int) -> None:
        """Forget the sequence and free its cells; fine when there is none."""
        self._sequences.pop(seq, None)
        lib.llama_memory_seq_rm(lib.llama_get_memory(self.context.ptr), seq, -1, -1)

    def step(self, *, decode: bool = True) -> dict[int, int]:
        """One batch; the token of each sequence that has sampled one. decode=False: prompts only.
        Raises what `errors.decode_error` says of llama_decode's code."""
        taken: dict[int, int] = {}
        room = self.context.n_batch
        for decoding in (True, False) if decode else (False,):
            for seq, s in self._sequences.items():
                if s.decoding == decoding and room:
                    taken[seq] = min(room, len(s.left))
                    room -= taken[seq]
        rows: list[_Row] = []
        for seq in sorted(taken):  # libllama computes at once what follows each other
            s, n = self._sequences[seq], taken[seq]
            last = n == len(s.left)
            rows += [(t, s.pos + i, seq, last and i == n - 1) for i, t in enumerate(s.left[:n])]
        sampled = self._compute(rows)
        for seq, n in taken.items():
            s = self._sequences[seq]
            s.pos += n
            if seq in sampled:
                s.left, s.decoding = [sampled[seq]], True
            else:
                del s.left[:n]
        return sampled

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _set_sampler(self, seq: int, seed: int) -> None: ...

    @abstractmethod
    def _compute(self, rows: list[_Row]) -> dict[int, int]:
        """Decode; the token that each sequence with a wanted row samples."""


class ChainLoop(Loop):
    """cffi calls only, as in docs/reference/raw.md: the batch is filled row by row, then the chain
    of each sequence is asked in turn."""

    def __init__(self, context: Context, sampling: str) -> None:
        super().__init__(context, sampling)
        self._chains: dict[int, Any] = {}
        self._batch = lib.llama_batch_init(context.n_batch, 0, 1)
        for row in range(context.n_batch):
            self._batch.n_seq_id[row] = 1

    def close(self) -> None:
        for chain in self._chains.values():
            lib.llama_sampler_free(chain)
        self._chains.clear()
        lib.llama_batch_free(self._batch)

    def _set_sampler(self, seq: int, seed: int) -> None:
        if seq in self._chains:
            lib.llama_sampler_free(self._chains.pop(seq))
        self._chains[seq] = chain_of(self._sampling, seed)

    def _compute(self, rows: list[_Row]) -> dict[int, int]:
        ctx, batch, chains = self.context.ptr, self._batch, self._chains
        batch.n_tokens = len(rows)
        for i, (token, pos, seq, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, pos, wanted
            batch.seq_id[i][0] = seq
        code = lib.llama_decode(ctx, batch)
        if code != 0:
            raise decode_error(code)
        return {
            seq: lib.llama_sampler_sample(chains[seq], ctx, i)
            for i, (_, _, seq, wanted) in enumerate(rows)
            if wanted
        }


class FusedLoop(Loop):
    """One `Stepper.step` per batch: decode and the fused sampler in one native call. n_threads:
    that sample."""

    def __init__(self, context: Context, sampling: str, n_threads: int = 0) -> None:
        super().__init__(context, sampling)
        self._stepper = Stepper(context, n_logprobs_max=0, n_threads=n_threads, n_steps_max=1)

    def close(self) -> None:
        self._stepper.close()

    def _set_sampler(self, seq: int, seed: int) -> None:
        self._stepper.set_slot(seq, sampling_params(self._sampling, seed, _NO_END))

    def _compute(self, rows: list[_Row]) -> dict[int, int]:
        into, n = self._stepper.rows, len(rows)
        into.token[:n], into.pos[:n], into.seq[:n], wanted = zip(*rows, strict=True)
        into.flags[:n] = [SAMPLE if w else 0 for w in wanted]
        result = self._stepper.step(n)
        result.raise_for_code()
        return dict(zip(result.seq.tolist(), result.token.tolist(), strict=True))


def loop_of(sampler: str, context: Context, sampling: str, n_threads: int = 0) -> Loop:
    """`sampler`: CHAIN or FUSED."""
    if sampler == CHAIN:
        return ChainLoop(context, sampling)
    return FusedLoop(context, sampling, n_threads)


def chain_of(sampling: str, seed: int) -> Any:
    """libllama's chain for "greedy" or "default"; the numbers are SamplingParams' defaults. Freed
    by the caller."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    if sampling == "greedy":
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
    else:
        for sampler in (
            lib.llama_sampler_init_top_k(40),
            lib.llama_sampler_init_top_p(0.95, 1),
            lib.llama_sampler_init_min_p(0.05, 1),
            lib.llama_sampler_init_temp(0.8),
            lib.llama_sampler_init_dist(seed),
        ):
            lib.llama_sampler_chain_add(chain, sampler)
    return chain
