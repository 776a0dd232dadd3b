"""A stepper whose results another thread reads while it goes on computing: the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ContextBusy, FatalDecodeError
from ..raw import ffi, lib
from .native import refused_run, refused_step
from .stepper import Stepper
from .types import REPORT

if TYPE_CHECKING:
    from .ring_reader import Page

_REFUSED: int = lib.PLB_E_ARGUMENT
_THREW: int = lib.PLB_E_DECODE
_MOST = 2**31 - 1
_GIVE_WAY_NS = 2_000_000


class Run(NamedTuple):
    """What a run did: llama_decode's code (0, or that of the step behind the last one), steps that
    were computed, graphs that they reused, seconds of all of them, and of the last one (slot,
    token, finish) where a sequence finished, and (slot, token, finish, log-probability) of the rows
    with REPORT; token is -1 and finish `Finish.ERROR` where a row could not be sampled;
    first_seconds: of its first step."""

    code: int
    n_steps: int
    n_reused: int
    seconds: float
    finished: list[tuple[int, int, int]]
    reported: Sequence[tuple[int, int, int, float]] = ()
    first_seconds: float = 0.0


class StreamStepper(Stepper):
    """Two threads: one computes (`run`, `flush`), one reads (`wait`, `read`); see "reading while a
    run goes on" in native/plb.h. `n_steps_max` is what fits between them. `step` is not for it."""

    _stream = True

    def compute(self, slots: npt.NDArray[np.int32], n_steps: int, n_more: int = 0) -> Run:
        """Up to n_steps steps of `slots` (contiguous int32), which may be any number; or, with
        n_more rows of prompts in rows len(slots) and behind, one. Ends as `Stepper.run` does, and
        after nothing at all when the reader is too far behind. Raises as it does."""
        context = self._ready()
        n_slots, info = len(slots), self._run
        if not self._lock.acquire(blocking=False):
            raise ContextBusy("another thread is inside this context")
        try:
            code = lib.plb_run(
                self._engine,
                ffi.from_buffer("int32_t[]", slots),
                n_slots,
                n_more,
                min(n_steps, _MOST),
                info,
            )
            if code <= _REFUSED and code != _THREW:
                if self._info.bad_row < n_slots:
                    raise refused_run(self, code, slots)
                raise refused_step(self, code, n_slots + n_more)
            if code != -1 or info.n_steps:
                self._decoded(context, n_slots + n_more)
        finally:
            self._lock.release()
        if code == _THREW and not info.n_steps:
            raise FatalDecodeError(code, self.last_error)
        n = info.n_finished
        finished: list[tuple[int, int, int]] = []
        reported: list[tuple[int, int, int, float]] = []
        for r in self._finished[0:n] if n else ():
            if self.rows.flags[r.row] & REPORT:
                reported.append((r.seq, r.token, r.finish, r.logprob))
            else:
                finished.append((r.seq, r.token, r.finish))
        seconds, first = info.ns * 1e-9, info.first_ns * 1e-9
        return Run(code, info.n_steps, info.n_reused, seconds, finished, reported, first)

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
        """Steps to see so far: once there are n_wanted, after a `flush` or `wake`, or after
        `timeout` seconds."""
        return int(lib.plb_ring_wait(self._engine, n_wanted, int(timeout * 1e9)))

    def give_way(self) -> None:
        """By the reader, between two pieces of work: let the thread that computes plan first."""
        lib.plb_ring_give_way(self._engine, _GIVE_WAY_NS)

    def read(self, until: int, page: Page) -> int:
        """KvOperation the steps below `until`, as many as fit, into a page; how many."""
        return int(lib.plb_ring_read(self._engine, until, page.struct))
