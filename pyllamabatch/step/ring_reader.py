"""Reading what is sampled while the next steps are computed: by another thread, from a ring.

One thread computes (`StreamStepper.compute`), another takes what was sampled out of the ring, a
`Page` at a time: columns by sequence. A reader of a stream takes what is new in its column; no
stream is touched because a token was sampled for it."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.stepper import Stepper
from pyllamabatch.step.types import STEP_DTYPE, Run


def _offset() -> float:
    """Seconds from the shim's clock to `perf_counter`, at most the true ones: 0 on Linux, where the
    clocks are the same. The best of some tries, as a thread may be held up between two looks."""
    tries: list[tuple[float, float]] = []
    for _ in range(9):
        before, ns, after = perf_counter(), lib.plb_now_ns(), perf_counter()
        tries.append((after - before, before - ns / 1e9))
    return min(tries)[1]


CLOCK_OFFSET = _offset()

PHASES = ("build", "decode", "sync", "sample")
TIMES = tuple(f"{phase}_ns" for phase in PHASES)


class StepTable:
    """The steps of a page: `table[:n]`, STEP_DTYPE. It outlives the page in the trace."""

    __slots__ = ("n", "table")

    def __init__(self, n_steps_max: int) -> None:
        self.table = np.zeros(n_steps_max, dtype=STEP_DTYPE)
        self.n = 0

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Of each step that was computed: its rows of prompts and the tokens that it sampled. One
        with drafts has no rows of prompts."""
        steps = self.table[: self.n]
        steps = steps[steps["code"] == 0]
        tokens: npt.NDArray[np.int32]
        tokens = np.where(steps["n_drafted"] > 0, steps["n_results"], steps["n_rows"])
        return tokens

    def end_s(self, i: int) -> float:
        """When step i was over, on the clock of `perf_counter`."""
        step = self.table[i]
        end = int(step["t_start_ns"]) + sum(int(step[name]) for name in TIMES)
        return end / 1e9 + CLOCK_OFFSET


class Page:
    """Room for `n_steps_max` steps and for as many tokens of each sequence.

    token, step: int32, shape (n_seq_max, n_steps_max): the tokens of each sequence and the step
    that each is of. With `n_top` (a stepper's n_logprobs_max) also logprob, n_top and, with
    `n_top` columns, top_token and top_logprob; None without. Of sequence s the first `shown[s]`
    entries are there: a reader goes by `shown`, which `show` brings up to date in one go;
    `shown_array` is the same, int32. `turns[s]` (int32) changes when what comes into column s is
    another stream's."""

    __slots__ = (
        "logprob", "n_tokens", "n_top", "shown", "shown_array", "step", "steps", "struct", "token",
        "top_logprob", "top_token", "turns",
    )  # fmt: skip

    def __init__(self, n_seq_max: int, n_steps_max: int, n_top: int | None = None) -> None:
        shape = (n_seq_max, n_steps_max)
        self.steps = StepTable(n_steps_max)
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
        self.shown_array = self.n_tokens.copy()
        self.turns = np.zeros(n_seq_max, dtype=np.int32)

    def show(self) -> None:
        """What was written since the last time is there from now on, for every thread."""
        self.shown, self.shown_array = self.n_tokens.tolist(), self.n_tokens.copy()
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


_MOST_STEPS = 2**31 - 1
_YIELD_NS = 2_000_000


class StreamStepper(Stepper):
    """A stepper of two threads: one computes (`compute`, `flush`), one reads (`wait`, `read`).

    See "reading while a run goes on" in native/plb.h. `n_steps_max` is what fits between them.
    `step` and `run` are not for it."""

    _stream = True

    def compute(
        self, slots: npt.NDArray[np.int32], n_steps: int, n_before: int = 0, n_pad: int = 0
    ) -> Run:
        """Up to n_steps steps of `slots` (contiguous int32), which may be any number; or, behind
        n_before rows of prompts, one. n_pad: see `plb_run` in native/plb.h.

        Ends as `Stepper.run` does, and after nothing at all when the reader is too far behind.
        Raises as it does."""
        code = self._run_native(n_before, slots, min(n_steps, _MOST_STEPS), n_pad)
        info = self._run
        n = info.n_finished
        results: Sequence[tuple[int, int, int, float]] = ()
        if n == 1:
            one = self._finished[0]
            results = ((one.seq, one.token, one.finish, one.logprob),)
        elif n:
            results = [(r.seq, r.token, r.finish, r.logprob) for r in self._finished[0:n]]
        seconds, first = info.ns * 1e-9, info.first_ns * 1e-9
        taken = None if self.drafts is None else self.drafts.n_taken
        return Run(
            code,
            info.n_steps,
            info.n_reused,
            seconds,
            results,
            first,
            info.n_rows,
            info.n_drafted,
            info.n_accepted,
            taken,
            info.catch_up_ns * 1e-9,
            info.draft_code,
        )

    @property
    def n_recorded(self) -> int:
        """Steps that were tried so far, by the last `compute`."""
        return int(self._run.n_recorded)

    @property
    def n_published(self) -> int:
        """Steps that the reader may see so far."""
        return int(lib.plb_ring_count(self._engine))

    def flush(self) -> None:
        """Let the reader see the last step too, and wake it. By the thread that computes."""
        lib.plb_ring_flush(self._engine)

    def wake(self) -> None:
        """Wake the reader. From any thread; nothing happens when the stepper is closed."""
        engine = self._engine
        if engine is not None:
            lib.plb_ring_wake(engine)

    def wait(self, n_wanted: int, timeout: float) -> int:
        """Steps that can be read so far. Waits until there are n_wanted, a `flush` or `wake`, or
        `timeout` seconds are over."""
        return int(lib.plb_ring_wait(self._engine, n_wanted, int(timeout * 1e9)))

    def yield_to_compute(self) -> None:
        """By the reader, between two pieces of work: let the thread that computes plan first."""
        lib.plb_ring_yield(self._engine, _YIELD_NS)

    def read(self, until: int, page: Page) -> int:
        """Move the steps below `until`, as many as fit, into a page. Returns how many."""
        return int(lib.plb_ring_read(self._engine, until, page.struct))
