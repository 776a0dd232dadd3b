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

from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyllamabatch._step import (
    OUTPUT,
    RESULT_DTYPE,
    SAMPLE,
    Finish,
    Rows,
    SlotInfo,
    StepResult,
)
from pyllamabatch._structs import integer
from pyllamabatch.errors import (
    ArgumentError,
    ClosedError,
    ContextBusy,
    FatalDecodeError,
    GrammarError,
    PyllamabatchError,
    UnsupportedOperation,
)
from pyllamabatch.raw import ffi, lib
from pyllamabatch.sampling import LOGPROBS_MAX, SEED_MAX, SamplingParams

if TYPE_CHECKING:
    from pyllamabatch.context import Context
    from pyllamabatch.vocab import TokenArray

__all__ = [
    "OUTPUT",
    "RESULT_DTYPE",
    "SAMPLE",
    "Finish",
    "Rows",
    "SlotInfo",
    "StepResult",
    "Stepper",
]


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
        self._lock = context._lock
        self._encoder_first = context.model.has_encoder
        self._rollback = context.capabilities.max_rollback > 0
        self._info: Any = ffi.gc(views.info, partial(_hold, engine))
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
            self._info,
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
        context = self._context
        if context is None or context.closed:
            self._open()  # raises
        if not 0 < n_rows <= self.n_rows_max:
            raise ArgumentError("n_rows", n_rows, f"must be in 1..{self.n_rows_max}")
        if self._encoder_first and not context._encoded:  # type: ignore[union-attr]
            raise UnsupportedOperation("this model's decoder needs `Context.encode` first")
        if not self._lock.acquire(blocking=False):
            raise ContextBusy("another thread is inside this context")
        try:
            result = self.result
            result.code = code = lib.plb_step(self._engine, n_rows)
            result.n_results = self._info.n_results
            if code <= _REFUSED and code != _THREW:
                raise self._refused(code, n_rows)
            if code != -1:
                self._decoded(context, n_rows)  # type: ignore[arg-type]
        finally:
            self._lock.release()
        if code == _THREW:
            raise FatalDecodeError(code, self.last_error)
        return result

    def _decoded(self, context: Context, n_rows: int) -> None:
        """Rows went into the memory: what the typed layer knows of it is no longer so."""
        context._outputs = None
        memory = context.memory
        if memory._stale:
            memory.applied()
        if self._rollback:
            memory.decoded(self.rows.seq[:n_rows])

    def set_slot(
        self,
        seq_id: int,
        params: SamplingParams,
        prompt_tokens: Iterable[int] | TokenArray | None = None,
    ) -> None:
        """Give a sequence its sampler, replacing the one it had.

        prompt_tokens are the tokens that came before, oldest first: the penalties look back at
        them. Raises `GrammarError` for a grammar that does not parse and `ArgumentError` for token
        ids outside the vocabulary; the slot that was there stays then.
        """
        self.put_slot(seq_id, self.make_slot(params, prompt_tokens))

    def make_slot(
        self, params: SamplingParams, prompt_tokens: Iterable[int] | TokenArray | None = None
    ) -> DetachedSlot:
        """What `set_slot` makes, with the same errors, for `put_slot` later. From any thread, also
        while another one is in `step`; the caller sees to it that nobody closes the context."""
        engine, context = self._open()
        given = () if prompt_tokens is None else prompt_tokens
        prompt = context.model.vocab.check_tokens(given, "prompt_tokens")
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
        seq = self._seq(seq_id)
        with context.exclusive():
            lib.plb_slot_clear(engine, seq)

    def copy_slot(self, src: int, dst: int, *, seed: int | None = None) -> None:
        """Fork: dst gets a copy of src, penalties, grammar state, budget and draws included.

        With the same draws both would choose the same tokens from the same logits; `seed` gives
        dst its own.
        """
        engine, context = self._open()
        source, target = self._seq(src, "src"), self._seq(dst, "dst")
        draws = None if seed is None else integer("seed", seed, 0, SEED_MAX)
        with context.exclusive():
            self._check_slot(lib.plb_slot_copy(engine, source, target), src)
            if draws is not None:
                self._check_slot(lib.plb_slot_reseed(engine, target, draws), dst)

    def take_slot(self, seq_id: int) -> DetachedSlot:
        """Take a slot out, to `put_slot` it under any sequence id later."""
        engine, context = self._open()
        out, seq = ffi.new("plb_slot **"), self._seq(seq_id)
        with context.exclusive():
            self._check_slot(lib.plb_slot_take(engine, seq, out), seq)
        return DetachedSlot(ffi.gc(out[0], lib.plb_slot_free))

    def put_slot(self, seq_id: int, slot: DetachedSlot) -> None:
        """Put a slot that was taken under a sequence id, replacing what is there."""
        engine, context = self._open()
        if slot._slot is None:
            raise ArgumentError("slot", slot, "must be a slot that was not put back yet")
        seq = self._seq(seq_id)
        with context.exclusive():
            self._check_slot(lib.plb_slot_put(engine, seq, slot._slot), seq)
        ffi.gc(slot._slot, None)  # the engine's from now on
        slot._slot = None

    def slot(self, seq_id: int) -> SlotInfo:
        """A slot's state; `ArgumentError` when the sequence has none."""
        engine, _ = self._open()
        info = ffi.new("plb_slot_info *")
        self._check_slot(lib.plb_slot_get_info(engine, self._seq(seq_id), info), seq_id)
        return SlotInfo(
            active=bool(info.active),
            finish=Finish(info.finish),
            error=info.error,
            path=_PATHS[info.path],
            n_generated=info.n_generated,
            n_left=info.n_left,
            next_token=info.next_token,
            next_pos=info.next_pos,
            seed=None if info.seed == lib.LLAMA_DEFAULT_SEED else info.seed,
            logprobs=None if info.n_logprobs < 0 else info.n_logprobs,
        )

    def slot_error(self, seq_id: int) -> str:
        """Why the sequence's last result was an error; empty when it was not."""
        engine, _ = self._open()
        text: bytes = ffi.string(lib.plb_slot_error(engine, self._seq(seq_id)))
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

    def _seq(self, seq_id: int, name: str = "seq_id") -> int:
        return integer(name, seq_id, 0, self.n_seq_max - 1)

    def _check_slot(self, code: int, seq_id: int) -> None:
        if code:
            raise self._slot_failure(code, seq_id, self.last_error)

    def _slot_failure(self, code: int, seq_id: int, text: str) -> Exception:
        text = text or _code_text(code)
        if code == lib.PLB_E_GRAMMAR:
            return GrammarError(text)
        if code == lib.PLB_E_NO_SLOT:
            return ArgumentError("seq_id", seq_id, "must be a sequence with a slot")
        if code == lib.PLB_E_MEMORY:
            return MemoryError(text)
        if code == lib.PLB_E_EXCEPTION:
            return PyllamabatchError(text)
        return ArgumentError("params", text, "what the vocabulary and the stepper allow")

    def _refused(self, code: int, n_rows: int) -> Exception:
        """The exception for a step that was refused before libllama saw it."""
        row = self.result._info.bad_row
        limits = {
            lib.PLB_E_TOKEN: ("token", f"must be in 0..{self.n_vocab - 1}"),
            lib.PLB_E_SEQ: ("seq", f"must be in 0..{self.n_seq_max - 1}"),
            lib.PLB_E_POS: ("pos", f"must be in 0..{self.n_pos_max - 1}"),
            lib.PLB_E_FLAGS: ("flags", "must be OUTPUT and SAMPLE only"),
            lib.PLB_E_NO_SLOT: ("seq", "must be a sequence with a slot, to be sampled"),
            lib.PLB_E_SLOT_FINISHED: ("seq", "must be a sequence whose slot has not finished"),
        }
        if code in limits:
            name, limit = limits[code]
            return ArgumentError(f"rows.{name}[{row}]", int(getattr(self.rows, name)[row]), limit)
        if code == lib.PLB_E_MEMORY:
            return MemoryError(self.last_error)
        return ArgumentError("n_rows", n_rows, self.last_error)


_REFUSED: int = lib.PLB_E_ARGUMENT  # and below: ours, not llama_decode's
_THREW: int = lib.PLB_E_DECODE
_PATHS = {lib.PLB_PATH_CHAIN: "chain"}


def _code_text(code: int) -> str:
    text: bytes = ffi.string(lib.plb_code_text(code))
    return text.decode()


def _view(engine: Any, pointer: Any, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Any:
    """A NumPy view on the engine's memory that keeps the engine alive."""
    kind = np.dtype(dtype)
    size = kind.itemsize * int(np.prod(shape))
    owner = ffi.gc(ffi.cast("char *", pointer), partial(_hold, engine))
    return np.ndarray(shape, kind, ffi.buffer(owner, size))


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
