"""What goes into a native step and what comes out: rows, results, the state of a slot."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import decode_error

OUTPUT = 1  # this row's logits can be read with Context.logits(row)
SAMPLE = 2  # this row is sampled with its sequence's slot
REPORT = 4  # what was sampled for this row is in `Run.reported`

I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

RESULT_DTYPE = np.dtype(
    [
        ("seq", np.int32),
        ("row", np.int32),
        ("token", np.int32),
        ("index", np.int32),
        ("finish", np.int32),
        ("error", np.int32),
        ("n_top", np.int32),
        ("logprob", np.float32),
    ]
)


# plb_step_info: what one step did; times in ns.
STEP_DTYPE = np.dtype(
    [
        ("t_start_ns", np.int64),
        ("build_ns", np.int64),
        ("decode_ns", np.int64),
        ("sync_ns", np.int64),
        ("sample_ns", np.int64),
        ("n_reused", np.int64),
        ("code", np.int32),
        ("n_rows", np.int32),
        ("n_outputs", np.int32),
        ("n_results", np.int32),
        ("first_result", np.int32),
        ("bad_row", np.int32),
        ("on_device", np.int32),
        ("n_filled", np.int32),
    ]
)


class Finish(enum.IntEnum):
    """Why a sampled token is a request's last one; the values of `StepResult.finish`."""

    NONE = 0  # it isn't
    EOG = 1  # end-of-generation token
    STOP = 2  # one of stop_token_ids
    LENGTH = 3  # max_tokens reached
    ERROR = 4  # no token: StepResult.error says why


class Stop(enum.IntEnum):
    """Why a run made no more steps; the values of `RunResult.stop`."""

    STEPS = 0  # all are done, or as many as the model has positions for
    FINISH = 1  # a slot has finished or failed in the last one
    BELL = 2  # `Stepper.ring`
    CODE = 3  # the next one returned `RunResult.code`
    FULL = 4  # nobody reads the ring (never in a `Stepper`, whose results are read in between)


class Rows:
    """The rows of the next step: persistent NumPy views, `n_rows_max` long each.

    token, pos, seq: int32. flags: uint8, any of OUTPUT, SAMPLE and REPORT. A step reads rows 0 to
    n - 1 and leaves them as they are, so a steady batch only rewrites what changes.
    """

    __slots__ = ("flags", "pos", "seq", "token")

    def __init__(self, token: I32, pos: I32, seq: I32, flags: U8) -> None:
        self.token = token
        self.pos = pos
        self.seq = seq
        self.flags = flags


class Results:
    """Sampled rows.

    `records` is a structured array (RESULT_DTYPE) of `n_results` records in row order; seq, row,
    token, index, finish, error, logprob and n_top are its columns. token is -1 on an error; index
    counts the slot's tokens from 0; logprob is NaN unless asked for. top_token and top_logprob have
    shape (n_results, n_logprobs_max), most likely first; the first n_top columns are valid.
    All are views of memory that the next call overwrites: copy what must last.
    """

    __slots__ = (
        "_columns",
        "_records",
        "_steps",
        "_top_logprob",
        "_top_token",
        "code",
        "n_results",
        "n_steps",
    )

    def __init__(self, records: Any, top_token: I32, top_logprob: F32, steps: Any) -> None:
        self._records = records
        self._steps = steps
        self._columns = {name: records[name] for name in RESULT_DTYPE.fields or ()}
        self._top_token = top_token
        self._top_logprob = top_logprob
        self.code = 0
        self.n_results = 0
        self.n_steps = 0  # steps that were computed

    @property
    def records(self) -> npt.NDArray[np.void]:
        records: npt.NDArray[np.void] = self._records[: self.n_results]
        return records

    @property
    def seq(self) -> I32:
        return self._column("seq")

    @property
    def row(self) -> I32:
        return self._column("row")

    @property
    def token(self) -> I32:
        return self._column("token")

    @property
    def index(self) -> I32:
        return self._column("index")

    @property
    def finish(self) -> I32:
        return self._column("finish")

    @property
    def error(self) -> I32:
        return self._column("error")

    @property
    def n_top(self) -> I32:
        return self._column("n_top")

    @property
    def logprob(self) -> F32:
        column: F32 = self._columns["logprob"][: self.n_results]
        return column

    @property
    def top_token(self) -> I32:
        return self._top_token[: self.n_results]

    @property
    def top_logprob(self) -> F32:
        return self._top_logprob[: self.n_results]

    def _column(self, name: str) -> I32:
        column: I32 = self._columns[name][: self.n_results]
        return column

    @property
    def steps(self) -> npt.NDArray[np.void]:
        """What each of the steps did: STEP_DTYPE, shape (n_steps,). Times in ns."""
        steps: npt.NDArray[np.void] = self._steps[: self.n_steps]
        return steps

    def raise_for_code(self) -> None:
        """Raise the `DecodeError` that `code` stands for; nothing when it is 0."""
        if self.code:
            raise decode_error(self.code)


class StepResult(Results):
    """What the last step gave. One object per stepper, overwritten by the next step."""

    __slots__ = ("_info",)

    def __init__(
        self, info: Any, records: Any, top_token: I32, top_logprob: F32, steps: Any
    ) -> None:
        super().__init__(records, top_token, top_logprob, steps)
        self._info = info

    @property
    def build_ns(self) -> int:
        """Checking the rows and building the batch."""
        return int(self._info.build_ns)

    @property
    def decode_ns(self) -> int:
        """In llama_decode; a device may still be computing when it returns."""
        return int(self._info.decode_ns)

    @property
    def sync_ns(self) -> int:
        """Waiting for the device."""
        return int(self._info.sync_ns)

    @property
    def sample_ns(self) -> int:
        """Sampling all rows that asked for it."""
        return int(self._info.sample_ns)

    @property
    def n_reused(self) -> int:
        """Graphs that the context has reused so far."""
        return int(self._info.n_reused)


class RunResult(Results):
    """What the last run gave: the records of its `n_steps` steps, one step after the other.

    One object per stepper, overwritten by the next run; steps and runs share the memory of the
    records. `stop` says why the run ended; `code` is 0 or that of the step that could not be done
    any more; the records of the steps before it are valid either way. Those of step i begin at
    `steps[i]["first_result"]`.
    """

    __slots__ = ("stop",)

    def __init__(self, records: Any, top_token: I32, top_logprob: F32, steps: Any) -> None:
        super().__init__(records, top_token, top_logprob, steps)
        self.stop = 0


@dataclass(frozen=True)
class SlotInfo:
    """A slot's state: see `plb_slot_info` in native/plb.h."""

    active: bool
    finish: Finish
    error: int
    path: str
    n_generated: int
    n_left: int
    next_token: int
    next_pos: int
    seed: int | None  # the one in use, also when it was drawn at random; None when greedy
    logprobs: int | None
    n_draws: int  # random numbers taken since it was seeded
