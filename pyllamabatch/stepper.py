"""Stepper: the Python face of the native step (native/plb.h).

Write rows into `stepper.rows`, call `stepper.step(n)`, read the result: one native call per step,
nothing allocated, whatever the number of sequences.

    stepper.set_slot(0, SamplingParams(temperature=0), prompt)
    rows = stepper.rows
    n = len(prompt)
    rows.token[:n], rows.pos[:n], rows.seq[:n], rows.flags[:n] = prompt, range(n), 0, 0
    rows.flags[n - 1] = SAMPLE
    result = stepper.step(n)
    result.raise_for_code()
    result.token[0], result.finish[0]
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyllamabatch._structs import integer
from pyllamabatch.errors import (
    ArgumentError,
    ClosedError,
    ContextBusy,
    FatalDecodeError,
    GrammarError,
    PyllamabatchError,
    UnsupportedOperation,
    decode_error,
)
from pyllamabatch.raw import ffi, lib
from pyllamabatch.sampling import LOGPROBS_MAX, SamplingParams

if TYPE_CHECKING:
    from pyllamabatch.context import Context

OUTPUT = 1  # this row's logits can be read with Context.logits(row)
SAMPLE = 2  # this row is sampled with its sequence's slot

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


class Finish(enum.IntEnum):
    """Why a sampled token is a request's last one; the values of `StepResult.finish`."""

    NONE = 0  # it isn't
    EOG = 1  # end-of-generation token
    STOP = 2  # one of stop_token_ids
    LENGTH = 3  # max_tokens reached
    ERROR = 4  # no token: StepResult.error says why


class Rows:
    """The rows of the next step: persistent NumPy views, `n_rows_max` long each.

    token, pos, seq: int32. flags: uint8, any of OUTPUT and SAMPLE. A step reads rows 0 to n - 1 and
    leaves them as they are, so a steady batch only rewrites what changes.
    """

    __slots__ = ("flags", "pos", "seq", "token")

    def __init__(self, token: I32, pos: I32, seq: I32, flags: U8) -> None:
        self.token = token
        self.pos = pos
        self.seq = seq
        self.flags = flags


class StepResult:
    """What the last step gave. One object per stepper, overwritten by the next step.

    `records` is a structured array (RESULT_DTYPE) of `n_results` records in row order; seq, row,
    token, index, finish, error, logprob and n_top are its columns. token is -1 on an error; index
    counts the slot's tokens from 0; logprob is NaN unless asked for. top_token and top_logprob have
    shape (n_results, n_logprobs_max), most likely first; the first n_top columns are valid.
    All are views of memory that the next step overwrites: copy what must last.
    """

    __slots__ = ("_columns", "_info", "_records", "_top_logprob", "_top_token", "code", "n_results")

    def __init__(self, info: Any, records: Any, top_token: I32, top_logprob: F32) -> None:
        self._info = info
        self._records = records
        self._columns = {name: records[name] for name in RESULT_DTYPE.fields or ()}
        self._top_token = top_token
        self._top_logprob = top_logprob
        self.code = 0
        self.n_results = 0

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

    def raise_for_code(self) -> None:
        """Raise the `DecodeError` that `code` stands for; nothing when it is 0."""
        if self.code:
            raise decode_error(self.code)


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
    seed: int
    logprobs: int | None


class DetachedSlot:
    """A slot outside of a stepper, to be put under any sequence id: made by `make_slot`, or taken
    out by `take_slot` (preemption)."""

    __slots__ = ("_slot",)

    def __init__(self, slot: Any) -> None:
        self._slot = slot


class Stepper:
    """Rows in, one native call, sampled tokens out, on one `Context`.

    - n_logprobs_max: the largest `SamplingParams.logprobs` that a slot may ask for.
    - n_threads: sampler threads, 0 chooses (one as yet).
    - sync: wait for the device at every step, also when no row has an output; for exact timings.

    Keeps the context alive. Like the context it serves one thread at a time: a second one gets
    `ContextBusy`. Closing the context first is fine, the stepper then raises `ClosedError`.
    """

    def __init__(
        self,
        context: Context,
        *,
        n_logprobs_max: int = 20,
        n_threads: int = 0,
        sync: bool = False,
    ) -> None:
        if context.model._no_alloc:
            raise UnsupportedOperation("the model was loaded with no_alloc: it has no weights")
        params = ffi.new("plb_engine_params *")
        params.n_outputs_max = context.n_outputs_max
        params.all_outputs = bool(context.params["embeddings"])
        params.n_logprobs_max = integer("n_logprobs_max", n_logprobs_max, 0, LOGPROBS_MAX)
        params.n_threads = integer("n_threads", n_threads, 0, 512)
        params.sync = bool(sync)
        out = ffi.new("plb_engine **")
        with context.exclusive():
            code = lib.plb_engine_new(context.ptr, params, out)
        if code == lib.PLB_E_MEMORY:
            raise MemoryError("no memory for the stepper")
        if code:
            raise UnsupportedOperation(_code_text(code))
        engine = ffi.gc(out[0], lib.plb_engine_free)
        views = ffi.new("plb_views *")
        lib.plb_engine_views(engine, views)

        self._context: Context | None = context
        self._encoder_first = context.model.has_encoder
        self._info: Any = views.info
        self._engine: Any = engine
        self.n_rows_max: int = views.n_rows_max
        self.n_seq_max: int = views.n_seq_max
        self.n_vocab: int = views.n_vocab
        self.n_pos_max: int = views.n_pos_max
        self.n_logprobs_max: int = views.n_logprobs_max
        rows, results, width = views.n_rows_max, views.n_results_max, views.n_logprobs_max
        self.rows = Rows(
            _view(engine, views.token, np.int32, (rows,)),
            _view(engine, views.pos, np.int32, (rows,)),
            _view(engine, views.seq, np.int32, (rows,)),
            _view(engine, views.flags, np.uint8, (rows,)),
        )
        self.result = StepResult(
            views.info,
            _view(engine, views.results, RESULT_DTYPE, (results,)),
            _view(engine, views.top_token, np.int32, (results, width)),
            _view(engine, views.top_logprob, np.float32, (results, width)),
        )

    def step(self, n_rows: int) -> StepResult:
        """Decode rows 0 to n_rows - 1 and sample those that ask for it; the reused `result`.

        `result.code` is llama_decode's: 0, or nothing was sampled and no slot has changed
        (`result.raise_for_code()` turns it into an exception). Rows that libllama would stumble
        over are refused before it sees them: `ArgumentError` with the row and the limit.
        """
        engine, context = self._open()
        if self._encoder_first and not context._encoded:
            raise UnsupportedOperation("this model's decoder needs `Context.encode` first")
        lock, result = context._lock, self.result
        if not lock.acquire(blocking=False):
            raise ContextBusy("another thread is inside this context")
        try:
            code = lib.plb_step(engine, n_rows)
            result.code = code
            result.n_results = self._info.n_results
            if code <= _REFUSED:
                raise self._refused(code, n_rows)
            if code != -1:
                context._outputs = None
                if context.memory._stale:
                    context.memory.applied()
                if context.capabilities.max_rollback:
                    context.memory.decoded(self.rows.seq[:n_rows])
        finally:
            lock.release()
        return result

    def set_slot(
        self,
        seq_id: int,
        params: SamplingParams,
        prompt_tokens: Sequence[int] | I32 | None = None,
    ) -> None:
        """Give a sequence its sampler, replacing the one it had.

        prompt_tokens are the tokens that came before, oldest first: the penalties look back at
        them. Raises `GrammarError` for a grammar that does not parse and `ArgumentError` for token
        ids outside the vocabulary; the slot that was there stays then.
        """
        engine, context = self._open()
        prompt = np.ascontiguousarray(() if prompt_tokens is None else prompt_tokens, np.int32)
        if prompt.ndim != 1:
            raise ArgumentError("prompt_tokens", prompt.shape, "a one-dimensional array")
        struct, keep = _sampling_struct(params)
        with context.exclusive():
            code = lib.plb_slot_set(
                engine, seq_id, struct, ffi.from_buffer("llama_token[]", prompt), len(prompt)
            )
        del keep
        self._check_slot(code, seq_id)

    def make_slot(
        self, params: SamplingParams, prompt_tokens: Sequence[int] | I32 | None = None
    ) -> DetachedSlot:
        """What `set_slot` makes, with the same errors, for `put_slot` later. From any thread, also
        while another one is in `step`; the caller sees to it that nobody closes the context."""
        engine, _ = self._open()
        prompt = np.ascontiguousarray(() if prompt_tokens is None else prompt_tokens, np.int32)
        if prompt.ndim != 1:
            raise ArgumentError("prompt_tokens", prompt.shape, "a one-dimensional array")
        struct, keep = _sampling_struct(params)
        out, text = ffi.new("plb_slot **"), ffi.new("char[]", 512)
        code = lib.plb_slot_new(
            engine, struct, ffi.from_buffer("llama_token[]", prompt), len(prompt), out, text, 512
        )
        del keep
        if code:
            raise self._slot_failure(code, -1, ffi.string(text).decode(errors="replace"))
        return DetachedSlot(ffi.gc(out[0], lib.plb_slot_free))

    def clear_slot(self, seq_id: int) -> None:
        """Forget a sequence's sampler; fine when there is none."""
        engine, context = self._open()
        with context.exclusive():
            code = lib.plb_slot_clear(engine, seq_id)
        self._check_slot(code, seq_id)

    def copy_slot(self, src: int, dst: int, *, seed: int | None = None) -> None:
        """Fork: dst gets a copy of src, penalties, grammar state, budget and draws included.

        With the same draws both would choose the same tokens from the same logits; `seed` gives
        dst its own.
        """
        engine, context = self._open()
        with context.exclusive():
            code = lib.plb_slot_copy(engine, src, dst)
            if code == 0 and seed is not None:
                code = lib.plb_slot_reseed(engine, dst, seed)
        self._check_slot(code, src)

    def take_slot(self, seq_id: int) -> DetachedSlot:
        """Take a slot out, to `put_slot` it under any sequence id later."""
        engine, context = self._open()
        out = ffi.new("plb_slot **")
        with context.exclusive():
            code = lib.plb_slot_take(engine, seq_id, out)
        self._check_slot(code, seq_id)
        return DetachedSlot(ffi.gc(out[0], lib.plb_slot_free))

    def put_slot(self, seq_id: int, slot: DetachedSlot) -> None:
        """Put a slot that was taken under a sequence id, replacing what is there."""
        engine, context = self._open()
        if slot._slot is None:
            raise ArgumentError("slot", slot, "a slot that was not put back yet")
        with context.exclusive():
            code = lib.plb_slot_put(engine, seq_id, slot._slot)
        self._check_slot(code, seq_id)
        ffi.gc(slot._slot, None)  # the engine's from now on
        slot._slot = None

    def slot(self, seq_id: int) -> SlotInfo:
        """A slot's state; `ArgumentError` when the sequence has none."""
        engine, _ = self._open()
        info = ffi.new("plb_slot_info *")
        self._check_slot(lib.plb_slot_get_info(engine, seq_id, info), seq_id)
        return SlotInfo(
            active=bool(info.active),
            finish=Finish(info.finish),
            error=info.error,
            path=_PATHS[info.path],
            n_generated=info.n_generated,
            n_left=info.n_left,
            next_token=info.next_token,
            next_pos=info.next_pos,
            seed=info.seed,
            logprobs=None if info.n_logprobs < 0 else info.n_logprobs,
        )

    def slot_error(self, seq_id: int) -> str:
        """Why the sequence's last result was an error; empty when it was not."""
        engine, _ = self._open()
        text: bytes = ffi.string(lib.plb_slot_error(engine, seq_id))
        return text.decode(errors="replace")

    @property
    def last_error(self) -> str:
        """Text of the last failure."""
        engine, _ = self._open()
        text: bytes = ffi.string(lib.plb_last_error(engine))
        return text.decode(errors="replace")

    def close(self) -> None:
        """Free the slots; safe to call twice. Views still held elsewhere stay readable."""
        engine, self._engine, self._context = self._engine, None, None
        if engine is not None:
            for seq_id in range(self.n_seq_max):
                lib.plb_slot_clear(engine, seq_id)

    def __enter__(self) -> Stepper:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> tuple[Any, Context]:
        context = self._context
        if context is None:
            raise ClosedError("the stepper is closed")
        _ = context.ptr  # raises ClosedError when the context is closed
        return self._engine, context

    def _check_slot(self, code: int, seq_id: int) -> None:
        if code:
            raise self._slot_failure(code, seq_id, self.last_error)

    def _slot_failure(self, code: int, seq_id: int, text: str) -> Exception:
        text = text or _code_text(code)
        if code == lib.PLB_E_GRAMMAR:
            return GrammarError(text)
        if code == lib.PLB_E_SEQ:
            return ArgumentError("seq_id", seq_id, f"0 to {self.n_seq_max - 1}")
        if code == lib.PLB_E_NO_SLOT:
            return ArgumentError("seq_id", seq_id, "a sequence with a slot")
        if code == lib.PLB_E_MEMORY:
            return MemoryError(text)
        if code == lib.PLB_E_EXCEPTION:
            return PyllamabatchError(text)
        return ArgumentError("params", text, "what the vocabulary and the stepper allow")

    def _refused(self, code: int, n_rows: int) -> Exception:
        """The exception for a step that was refused before libllama saw it."""
        row = self.result._info.bad_row
        limits = {
            lib.PLB_E_TOKEN: ("token", f"0 to {self.n_vocab - 1}"),
            lib.PLB_E_SEQ: ("seq", f"0 to {self.n_seq_max - 1}"),
            lib.PLB_E_POS: ("pos", f"0 to {self.n_pos_max - 1}"),
            lib.PLB_E_FLAGS: ("flags", "OUTPUT and SAMPLE only"),
            lib.PLB_E_NO_SLOT: ("seq", "a sequence with a slot, when it is sampled"),
            lib.PLB_E_SLOT_FINISHED: ("seq", "a sequence whose slot has not finished"),
        }
        if code in limits:
            name, limit = limits[code]
            return ArgumentError(f"rows.{name}[{row}]", int(getattr(self.rows, name)[row]), limit)
        if code == lib.PLB_E_N_ROWS:
            return ArgumentError("n_rows", n_rows, f"1 to {self.n_rows_max}")
        if code == lib.PLB_E_MEMORY:
            return MemoryError(self.last_error)
        if code == lib.PLB_E_DECODE:
            return FatalDecodeError(code, self.last_error)
        return ArgumentError("n_rows", n_rows, self.last_error)


_REFUSED: int = lib.PLB_E_ARGUMENT  # and below: ours, not llama_decode's
_PATHS = {lib.PLB_PATH_CHAIN: "chain"}


def _code_text(code: int) -> str:
    text: bytes = ffi.string(lib.plb_code_text(code))
    return text.decode()


def _view(engine: Any, pointer: Any, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Any:
    """A NumPy view on the engine's memory that keeps the engine alive."""
    kind = np.dtype(dtype)
    size = kind.itemsize * int(np.prod(shape))
    owner = ffi.gc(ffi.cast("char *", pointer), partial(_hold, engine))
    return np.frombuffer(ffi.buffer(owner, size), kind).reshape(shape)


def _hold(engine: Any, _pointer: Any) -> None:
    """A destructor whose only work is to have held the engine until now."""


def _sampling_struct(params: SamplingParams) -> tuple[Any, tuple[Any, ...]]:
    """The plb_sampling of params, and what must live as long as it."""
    biases = ffi.new("llama_logit_bias[]", list(params.logit_bias.items()))
    stops = ffi.new("llama_token[]", list(params.stop_token_ids))
    grammar = ffi.NULL if params.grammar is None else ffi.new("char[]", params.grammar.encode())
    struct = ffi.new("plb_sampling *")
    struct.max_tokens = params.max_tokens
    struct.min_tokens = params.min_tokens
    struct.temperature = params.temperature
    struct.top_k = params.top_k
    struct.top_p = params.top_p
    struct.min_p = params.min_p
    struct.typical_p = params.typical_p
    struct.repeat_penalty = params.repeat_penalty
    struct.frequency_penalty = params.frequency_penalty
    struct.presence_penalty = params.presence_penalty
    struct.penalty_last_n = params.penalty_last_n
    struct.seed = lib.LLAMA_DEFAULT_SEED if params.seed is None else params.seed
    struct.n_logprobs = -1 if params.logprobs is None else params.logprobs
    struct.ignore_eog = int(params.ignore_eog)
    struct.n_logit_bias, struct.logit_bias = len(params.logit_bias), biases
    struct.n_stop_tokens, struct.stop_tokens = len(params.stop_token_ids), stops
    struct.grammar = grammar
    return struct, (biases, stops, grammar)
