"""A raw loop on one context, in Python: build a batch, decode it, sample its rows.

It is what a program without an engine does, for one sequence or for many: cffi calls only, as in
docs/reference/raw.md, and libllama's own sampler chains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyllamabatch.errors import decode_error
from pyllamabatch.raw import lib

if TYPE_CHECKING:
    from pyllamabatch.llama.context import Context


@dataclass
class LoopSequence:
    left: list[int]  # tokens that are known and not computed
    pos: int = 0  # of the first of them
    decoding: bool = False  # it has sampled: `left` is that token


class Loop:
    """Sequences 0 to n_seq_max - 1 of `context`, which it does not close.

    A step computes the last token of every sequence that decodes and, beside them, as many rows of
    prompts as the batch has room for. A sequence samples its first token with its prompt's last
    row."""

    def __init__(self, context: Context, sampling: str) -> None:
        """`sampling`: "greedy" or "default"."""
        self._sequences: dict[int, LoopSequence] = {}
        self._n_batch = context.n_batch
        self._context = context
        self._sampling = sampling
        self._chains: dict[int, Any] = {}
        self._batch = lib.llama_batch_init(context.n_batch, 0, 1)
        for row in range(context.n_batch):
            self._batch.n_seq_id[row] = 1

    @property
    def prefilling(self) -> bool:
        """Whether the prompt of a sequence is not computed to its end."""
        return any(not s.decoding for s in self._sequences.values())

    def start(self, seq: int, prompt: Sequence[int], seed: int) -> None:
        """Give `seq`, which must be stopped, a prompt and a sampler."""
        self._begin(seq, seed)
        self._sequences[seq] = LoopSequence(list(prompt))

    def stop(self, seq: int) -> None:
        """Forget the sequence and free its cells; fine when there is none."""
        if self._sequences.pop(seq, None) is not None:
            self._end(seq)

    def close(self) -> None:
        for seq in list(self._sequences):
            self.stop(seq)
        lib.llama_batch_free(self._batch)

    def step(self, *, decode: bool = True) -> dict[int, int]:
        """One batch; the token of each sequence that has sampled one. decode=False: prompts only.
        Raises what `errors.decode_error` says of llama_decode's code."""
        taken: dict[int, int] = {}
        room = self._n_batch
        for decoding in (True, False) if decode else (False,):
            for seq, s in self._sequences.items():
                if s.decoding == decoding and room:
                    taken[seq] = min(room, len(s.left))
                    room -= taken[seq]
        sampled = self._compute(taken)
        for seq, n in taken.items():
            s = self._sequences[seq]
            s.pos += n
            s.left = [sampled[seq]] if seq in sampled else s.left[n:]
            s.decoding = seq in sampled
        return sampled

    def generate(self, n: int) -> Iterator[int]:
        """The next `n` tokens of sequence 0, which is alone."""
        for _ in range(n):
            while not (sampled := self.step()):
                pass
            yield sampled[0]

    # -- what differs on a profile machine

    def _begin(self, seq: int, seed: int) -> None:
        self._chains[seq] = chain_of(self._sampling, seed)

    def _end(self, seq: int) -> None:
        lib.llama_sampler_free(self._chains.pop(seq))
        lib.llama_memory_seq_rm(lib.llama_get_memory(self._context.ptr), seq, -1, -1)

    def _compute(self, taken: dict[int, int]) -> dict[int, int]:
        """So many rows of each sequence; the token of each whose last row is among them."""
        batch, n_rows, wanted = self._batch, 0, []
        for seq in sorted(taken):  # libllama computes at once what follows each other
            s, n = self._sequences[seq], taken[seq]
            for i, token in enumerate(s.left[:n]):
                batch.token[n_rows], batch.pos[n_rows] = token, s.pos + i
                batch.seq_id[n_rows][0], batch.logits[n_rows] = seq, i == len(s.left) - 1
                n_rows += 1
            if n == len(s.left):
                wanted.append((seq, n_rows - 1))
        batch.n_tokens = n_rows
        context = self._context.ptr
        if code := lib.llama_decode(context, batch):
            raise decode_error(code)
        return {s: lib.llama_sampler_sample(self._chains[s], context, row) for s, row in wanted}


def chain_of(sampling: str, seed: int) -> Any:
    """libllama's chain for "greedy" or "default"; the numbers are SamplingParams' defaults. Freed
    by the caller."""
    samplers = (
        [lib.llama_sampler_init_greedy()]
        if sampling == "greedy"
        else [
            lib.llama_sampler_init_top_k(40),
            lib.llama_sampler_init_top_p(0.95, 1),
            lib.llama_sampler_init_min_p(0.05, 1),
            lib.llama_sampler_init_temp(0.8),
            lib.llama_sampler_init_dist(seed),
        ]
    )
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for sampler in samplers:
        lib.llama_sampler_chain_add(chain, sampler)
    return chain
