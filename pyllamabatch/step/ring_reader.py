"""Pages: what was sampled, in columns by sequence, as the delivery thread takes it from the ring.

A page has room for some steps. The delivery thread fills it (`Stepper.read`), and whoever reads a
stream takes what is new in its column; nobody touches a stream because a token was sampled for it.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from ..raw import ffi, lib
from .types import STEP_DTYPE


def _offset() -> float:
    """From the shim's clock to `perf_counter`, s (0 on Linux, where they are the same), at most the
    true one: the best of some tries, as a thread may be held up between two looks at clocks."""
    tries: list[tuple[float, float]] = []
    for _ in range(9):
        before, ns, after = perf_counter(), lib.plb_now_ns(), perf_counter()
        tries.append((after - before, before - ns / 1e9))
    return min(tries)[1]


_OFFSET = _offset()

PHASES = ("build", "decode", "sync", "sample")
TIMES = tuple(f"{phase}_ns" for phase in PHASES)


class Steps:
    """The steps of a page: `table[:n]`, STEP_DTYPE; outlives the page in the trace."""

    __slots__ = ("n", "table")

    def __init__(self, n_steps_max: int) -> None:
        self.table = np.zeros(n_steps_max, dtype=STEP_DTYPE)
        self.n = 0

    def end_s(self, i: int) -> float:
        """When step i was over, on the clock of `perf_counter`."""
        step = self.table[i]
        end = int(step["t_start_ns"]) + sum(int(step[name]) for name in TIMES)
        return end / 1e9 + _OFFSET


class Page:
    """Room for `n_steps_max` steps and for as many tokens of each sequence.

    token, step: int32, shape (n_seq_max, n_steps_max): the tokens of each sequence and the step
    that each is of. With `n_top` (a stepper's n_logprobs_max) also logprob, n_top and, with
    `n_top` columns, top_token and top_logprob; None without. Of sequence s the first `shown[s]`
    entries are there: a reader goes by `shown`, which `show` brings up to date in one go.
    """

    __slots__ = (
        "logprob",
        "n_tokens",
        "n_top",
        "shown",
        "step",
        "steps",
        "struct",
        "token",
        "top_logprob",
        "top_token",
    )

    def __init__(self, n_seq_max: int, n_steps_max: int, n_top: int | None = None) -> None:
        shape = (n_seq_max, n_steps_max)
        self.steps = Steps(n_steps_max)
        self.n_tokens = np.zeros(n_seq_max, dtype=np.int32)
        self.token = np.empty(shape, dtype=np.int32)
        self.step = np.empty(shape, dtype=np.int32)
        self.logprob = self.n_top = self.top_token = self.top_logprob = None
        self.struct = struct = ffi.new("plb_page *")
        struct.n_steps_max = n_steps_max
        struct.steps = _pointer("plb_step_info *", self.steps.table)
        struct.n_tokens = _pointer("int32_t *", self.n_tokens)
        struct.token = _pointer("int32_t *", self.token)
        struct.step = _pointer("int32_t *", self.step)
        if n_top is not None:
            self.logprob = np.empty(shape, dtype=np.float32)
            self.n_top = np.empty(shape, dtype=np.int32)
            self.top_token = np.empty((*shape, n_top), dtype=np.int32)
            self.top_logprob = np.empty((*shape, n_top), dtype=np.float32)
            struct.logprob = _pointer("float *", self.logprob)
            struct.n_top = _pointer("int32_t *", self.n_top)
            struct.top_token = _pointer("int32_t *", self.top_token)
            struct.top_logprob = _pointer("float *", self.top_logprob)
        self.shown: list[int] = [0] * n_seq_max

    def show(self) -> None:
        """What was written since the last time is there from now on, for every thread."""
        self.shown = self.n_tokens.tolist()
        self.steps.n = self.struct.n_steps

    def top(self, seq: int, records: slice) -> list[dict[int, float]]:
        """Token -> log-probability of the most likely ones, for some tokens of a sequence."""
        assert self.n_top is not None
        assert self.top_token is not None
        assert self.top_logprob is not None
        return [
            dict(zip(tokens[:n], logprobs[:n], strict=True))
            for n, tokens, logprobs in zip(
                self.n_top[seq, records].tolist(),
                self.top_token[seq, records].tolist(),
                self.top_logprob[seq, records].tolist(),
                strict=True,
            )
        ]


def _pointer(kind: str, array: npt.NDArray[Any]) -> Any:
    return ffi.cast(kind, array.ctypes.data)
