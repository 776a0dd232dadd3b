"""What goes into a native step and what comes out: rows, results, the state of a slot."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import decode_error

OUTPUT = 1  # this row's logits can be read with Context.logits(row)
SAMPLE = 2  # this row is sampled with its sequence's slot; OUTPUT besides, to read its logits

I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
S = TypeVar("S", bound=np.generic)


def _fields(kind: type[np.generic], names: str) -> list[tuple[str, type[np.generic]]]:
    return [(name, kind) for name in names.split()]


RESULT_DTYPE = np.dtype(
    [*_fields(np.int32, "seq row token index finish error n_top"), ("logprob", np.float32)]
)

# plb_step_info: what one step did; times in ns.
STEP_DTYPE = np.dtype(
    [
        *_fields(np.int64, "t_start_ns build_ns decode_ns sync_ns sample_ns n_reused"),
        *_fields(np.int32, "code n_rows n_outputs n_results first_result bad_row on_device"),
        *_fields(np.int32, "n_filled n_drafted n_accepted"),
    ]
)


class Finish(enum.IntEnum):
    """Why a sampled token is a request's last one; the values of `Results.finish`."""

    NONE = 0  # it isn't
    EOG = 1  # end-of-generation token
    STOP = 2  # one of stop_token_ids
    LENGTH = 3  # max_tokens reached
    ERROR = 4  # no token: Results.error says why


class Stop(enum.IntEnum):
    """Why a run made no more steps; the values of `Results.stop`."""

    STEPS = 0  # all are done, or as many as the model has positions for
    FINISH = 1  # a slot has finished or failed in the last one
    INTERRUPT = 2  # `Stepper.interrupt`
    CODE = 3  # the next one returned `Results.code`
    FULL = 4  # the ring is full (never in a `Stepper`, whose results are read in between)


class Rows(NamedTuple):
    """The rows of the next step: persistent NumPy views, `n_rows_max` long each.

    flags: any of OUTPUT and SAMPLE. A step reads rows 0 to n - 1 and leaves them as they
    are, so a steady batch only rewrites what changes."""

    token: I32
    pos: I32
    seq: I32
    flags: U8


class DraftColumns(NamedTuple):
    """What a run's steps check beside the slots' next tokens (speculative decoding): persistent
    NumPy views, by sequence; see `plb_drafts` in native/plb.h.

    - n_most: drafted rows of each sequence in a step of the runs to come; 0 at first, and at most
      the stepper's n_draft_max.
    - n_given, token: so many tokens of the sequence's row of `token` are drafts for the first step
      of the next run, which sets n_given to 0.
    - n_taken: tokens that the last run has sampled of each of its slots.
    - found, right: shape (n_seq_max, n_draft_max), of the slots of the last run: how often, lately,
      there was a draft with this many tokens, and how often all of them were the sampled ones.
    - n_drafted, n_accepted: rows of drafted tokens that the last run had of each of its slots, and
      how many of them stay. n_drafts: in how many steps it had some.
    - n_lacks: tokens of each sequence that a draft model has to compute before it can draft, where
      these are more than it lacks in any step; 0 where none drafts for it.
    - n_right: shape (n_draft_max,), of how many drafts of that run token i stays.
    - n_priced (one value): with 0 a step has as many drafted rows as n_most says. Otherwise it has
      as many as give most tokens a second, if that is `gain` (one value) more than without.
    - seconds, worst: of a step with 0, 1, ... n_priced - 1 rows, as they are expected, and if it
      takes longer; seconds 0: there is no such step. credit (one value): seconds that drafts may
      lose at worst; runs change it by what they lose and gain, and below 0 there are none.
      new_graph (one value): seconds that a step takes longer where it has not as many rows as the
      last one with drafts.
    - n_timed, ns_timed: how many steps of the last run had 0, 1, ... rows, and their nanoseconds at
      their mean speed. Without drafts these are steps with the graph of the one before."""

    n_most: I32
    n_given: I32
    token: I32
    n_taken: I32
    found: F32
    right: F32
    n_drafts: I32
    n_right: I32
    n_drafted: I32
    n_accepted: I32
    n_lacks: I32
    n_priced: I32
    seconds: F32
    worst: F32
    credit: F32
    gain: F32
    new_graph: F32
    n_timed: I32
    ns_timed: npt.NDArray[np.int64]


class _Valid(Generic[S]):
    """A view of the results, as far as it is valid."""

    def __init__(self, length: str = "n_results") -> None:
        self._length = length

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, results: Results, owner: type) -> npt.NDArray[S]:
        view: npt.NDArray[S] = results._views[self._name][: getattr(results, self._length)]
        return view


class Results:
    """What the last `step` or `run` gave. One object per stepper, overwritten by the next call.

    `records` is a structured array (RESULT_DTYPE) of `n_results` records, step by step and in row
    order; seq, row, token, index, finish, error, n_top and logprob are its columns. token is -1 on
    an error. index counts the slot's tokens from 0. logprob is NaN unless asked for. top_token and
    top_logprob have shape (n_results, n_logprobs_max), most likely first; the first n_top columns
    are valid.

    `steps` (STEP_DTYPE, times in ns) tells what each of the `n_steps` steps did; the records of
    step i begin at `steps[i]["first_result"]`. `stop` says why a run ended (`Stop`). `code` is 0,
    or that of the step that could not be done; the records of the steps before it are valid.

    All are views of memory that the next call overwrites: copy what must last."""

    __slots__ = ("_views", "code", "n_results", "n_steps", "stop")

    records = _Valid[np.void]()
    seq = _Valid[np.int32]()
    row = _Valid[np.int32]()
    token = _Valid[np.int32]()
    index = _Valid[np.int32]()
    finish = _Valid[np.int32]()
    error = _Valid[np.int32]()
    n_top = _Valid[np.int32]()
    logprob = _Valid[np.float32]()
    top_token = _Valid[np.int32]()
    top_logprob = _Valid[np.float32]()
    steps = _Valid[np.void]("n_steps")

    def __init__(self, records: Any, **views: Any) -> None:
        self._views = {name: records[name] for name in RESULT_DTYPE.fields or ()}
        self._views.update(records=records, **views)
        self.code = self.n_results = self.n_steps = 0
        self.stop = Stop.STEPS.value

    def raise_for_code(self) -> None:
        """Raise the `DecodeError` that `code` stands for; nothing when it is 0."""
        if self.code:
            raise decode_error(self.code)


class Run(NamedTuple):
    """What a run of a `StreamStepper` did."""

    code: int  # llama_decode's: 0, or that of the step after the last one
    n_steps: int  # steps that were computed
    n_reused: int  # graphs that they reused
    seconds: float  # of all of them
    # Of the last step, where a sequence finished and of slots with `report`: slot, token, finish
    # and log-probability. Token is -1 and finish `Finish.ERROR` where a row could not be sampled.
    results: Sequence[tuple[int, int, int, float]] = ()
    first_seconds: float = 0.0  # of its first step
    # Of all steps: rows, drafted ones included; drafted rows, and those that stay. `taken`: tokens
    # sampled, by slot; None: one a step of each.
    n_rows: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    taken: I32 | None = None
    # Of a draft model: seconds of these for what it lacked of sequences that are new to it, and the
    # last code of its calls that was not 0.
    catch_up_seconds: float = 0.0
    draft_code: int = 0


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
