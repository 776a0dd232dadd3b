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

Steady decoding needs no rows: `stepper.run([0], 16)` makes sixteen steps of the slots' own next
tokens in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import (
    ArgumentError,
    ClosedError,
    FatalDecodeError,
    GrammarError,
    NoCandidate,
    SamplingError,
    UnsupportedOperation,
    integer,
)
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.handle import owned
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.params import check_range, flat_integers
from pyllamabatch.llama.runtime import text
from pyllamabatch.llama.vocab import TokenArray
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.native import (
    PATH_NAMES,
    DetachedSlot,
    drafts_of,
    results_of,
    rows_of,
    sampling_struct,
    slot_failure,
)
from pyllamabatch.step.sampling_params import SEED_MAX, SamplingParams
from pyllamabatch.step.stepper_options import StepperOptions, engine_params, sampler_path
from pyllamabatch.step.types import (
    OUTPUT,
    RESULT_DTYPE,
    SAMPLE,
    STEP_DTYPE,
    DraftColumns,
    Finish,
    Results,
    Rows,
    SlotInfo,
    Stop,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "OUTPUT", "RESULT_DTYPE", "SAMPLE", "STEP_DTYPE", "DetachedSlot", "DraftColumns", "Finish",
    "Results", "Rows", "SlotInfo", "Stepper", "Stop",
]  # fmt: skip

_REFUSED: int = lib.PLB_E_ARGUMENT  # and below: ours, not llama_decode's
_THREW: int = lib.PLB_E_DECODE
_NO_SLOTS = np.zeros(0, np.int32)
_NOT_THERE = np.zeros(0, np.int8)  # outputs of a step whose rows lie elsewhere


class Stepper:
    """Rows in, one native call, sampled tokens out, on one `Context`.

    For its options see `StepperOptions`. Raises `ArgumentError` for one out of its range,
    `UnsupportedOperation` for a model without weights, MemoryError.

    Keeps the context alive. Like the context it serves one thread at a time: a second one gets
    `ContextBusy`. Closing the context first is fine, the stepper then raises `ClosedError`."""

    _stream = False  # whether another thread reads the results: `ring_reader.StreamStepper`

    def __init__(self, context: Context, **options: Unpack[StepperOptions]) -> None:
        params, path = engine_params(context, options), sampler_path(options)
        params.stream = self._stream
        out = ffi.new("plb_engine **")
        with context.exclusive():
            code = lib.plb_engine_new(context.ptr, params, out)
        if code == lib.PLB_E_MEMORY:
            raise MemoryError("no memory for the stepper")
        if code:
            raise UnsupportedOperation(text(lib.plb_code_text(code)))
        engine = owned(out[0], free=lib.plb_engine_free)
        context._attached.append(engine)  # the context may come to point into it
        views = ffi.new("plb_views *")
        lib.plb_engine_views(engine, views)

        self._path = path
        self._context: Context | None = context
        self._exclusive = context.exclusive()
        self._encoder_first = context.model.has_encoder
        self._info: Any = owned(views.info, engine)
        self._engine: Any = engine
        self.n_rows_max: int = views.n_rows_max
        self.n_seq_max: int = views.n_seq_max
        self.n_vocab: int = views.n_vocab
        self.n_pos_max: int = views.n_pos_max
        self.n_logprobs_max: int = views.n_logprobs_max
        self.n_steps_max: int = views.n_steps_max
        self.rows = rows_of(views, engine)
        self.result = results_of(views, engine)
        self.drafts: DraftColumns | None = None  # with n_draft_max
        if params.n_draft_max:
            self.drafts = drafts_of(engine, self.n_seq_max, self.n_rows_max)
        self._slots: dict[int, DetachedSlot] = {}  # by sequence id
        self._run: Any = ffi.new("plb_run_info *")
        self._finished: Any = views.finished

    @property
    def model(self) -> Model:
        """Of its context."""
        return self._open()[1].model

    def step(self, n_rows: int) -> Results:
        """Decode rows 0 to n_rows - 1 and sample those that ask for it. Returns `result`.

        `result.code` is llama_decode's: 0, or nothing was sampled and no slot has changed
        (`result.raise_for_code()` turns it into an exception). Raises `ArgumentError`, with the row
        and the limit, for rows that libllama would stumble over, before it sees them."""
        context = self._ready()
        if not 0 < n_rows <= self.n_rows_max:
            raise ArgumentError("n_rows", n_rows, f"must be in 1..{self.n_rows_max}")
        result = self.result
        with self._exclusive:
            result.code = code = lib.plb_step(self._engine, n_rows)
            result.n_results = self._info.n_results
            result.n_steps = 0 if code else 1
            self._note(context, code, n_rows, result.n_steps, _NO_SLOTS)
        return result

    def run(self, slots: npt.NDArray[np.int32] | Sequence[int], n_steps: int) -> Results:
        """Up to n_steps steps of pure decoding in one call. Returns `result`.

        In each step every sequence of `slots` (all different; each with a slot that has sampled and
        not finished) computes its slot's next token and samples another one, as `step` would with
        those rows. The run ends after the step in which a slot finishes or `interrupt` was called,
        and before a step that llama_decode has no cells for or fails at: `result.code` then, and
        the steps before it are done and their results valid. Rows 0 to len(slots) - 1 are
        overwritten. Raises as `step` does.

        Where `drafts` has tokens to check, a step may sample several tokens of a sequence: the same
        ones, with the same draws, as so many steps."""
        seqs = self._seqs(slots)
        if not 0 < seqs.size <= self.n_seq_max:
            raise ArgumentError("slots", f"{seqs.size} of them", f"must be 1..{self.n_seq_max}")
        if not 0 < n_steps <= self.n_steps_max:
            raise ArgumentError("n_steps", n_steps, f"must be in 1..{self.n_steps_max}")
        result, info = self.result, self._run
        result.code = result.n_steps = result.n_results = 0
        result.code = self._run_native(0, seqs, n_steps)
        result.stop = info.stop
        result.n_steps = info.n_steps
        result.n_results = info.n_results
        return result

    def _run_native(
        self, n_before: int, slots: npt.NDArray[np.int32], n_steps: int, n_pad: int = 0
    ) -> int:
        """`plb_run`; its code. What it did is in `_run`."""
        context, n = self._ready(), len(slots)
        pointer = ffi.from_buffer("int32_t[]", slots)
        with self._exclusive:
            code: int = lib.plb_run(self._engine, n_before, pointer, n, n_pad, n_steps, self._run)
            self._note(context, code, n_before + n, self._run.n_steps, slots)
        return code

    def _note(
        self, context: Context, code: int, n_rows: int, n_steps: int, slots: npt.NDArray[np.int32]
    ) -> None:
        """Raise for a call that was refused. For any other, tell the typed layer what went into the
        memory, and raise when it threw before its first step was done."""
        if code <= _REFUSED and code != _THREW:
            raise _refused(self, code, n_rows, slots)
        if code != -1 or n_steps:
            moved = self._info.n_filled or self._info.on_device
            context._outputs = _NOT_THERE if moved else None
            context.memory.applied()
        if code == _THREW and not n_steps:
            raise FatalDecodeError(code, self.last_error)

    def interrupt(self) -> None:
        """End the run that is going on, or if there is none the next one, after the step that it is
        in. From any thread; an interrupt is never lost. Nothing happens when the stepper is
        closed."""
        engine = self._engine
        if engine is not None:
            lib.plb_interrupt(engine)

    def _ready(self) -> Context:
        context = self._context
        if context is None:
            raise ClosedError("the stepper is closed")
        if self._encoder_first and not context._encoded:
            raise UnsupportedOperation("this model's decoder needs `Context.encode` first")
        return context

    def set_slot(
        self,
        seq_id: int,
        params: SamplingParams,
        prompt_tokens: Iterable[int] | TokenArray | None = None,
    ) -> None:
        """Give a sequence its sampler, replacing the one it had.

        prompt_tokens are the tokens that came before, oldest first: the penalties look back at
        them. Raises `GrammarError` for a grammar that does not parse and `ArgumentError` for token
        ids outside the vocabulary; the slot that was there stays then."""
        self.put_slot(seq_id, self.make_slot(params, prompt_tokens))

    def make_slot(
        self, params: SamplingParams, prompt_tokens: Iterable[int] | TokenArray | None = None
    ) -> DetachedSlot:
        """What `set_slot` makes, with the same errors, for `put_slot` later.

        From any thread, also while another one is in `step`. The caller sees to it that the context
        is not closed meanwhile."""
        _, context = self._open()
        given = () if prompt_tokens is None else prompt_tokens
        return self.new_slot(params, context.model.vocab.check_tokens(given, "prompt_tokens"))

    def new_slot(self, params: SamplingParams, prompt: TokenArray) -> DetachedSlot:
        """`make_slot` for tokens that were checked: contiguous int32."""
        engine, context = self._open()
        if params.logprobs is not None:
            integer("logprobs", params.logprobs, 0, self.n_logprobs_max)
        struct, keep = sampling_struct(params, self._path)
        out, why = ffi.new("plb_slot **"), ffi.new("char[]", 512)
        code = lib.plb_slot_new(
            engine, struct, ffi.from_buffer("llama_token[]", prompt), len(prompt), out, why, 512
        )
        del keep
        if code:
            raise slot_failure(code, -1, text(why))
        return DetachedSlot(owned(out[0], context._model_ptr, free=lib.plb_slot_free))

    def clear_slot(self, seq_id: int) -> None:
        """Forget a sequence's sampler; fine when there is none."""
        engine, context = self._open()
        seq = self._seq(seq_id)
        with context.exclusive():
            lib.plb_slot_clear(engine, seq)
            self._let_go(seq)

    def copy_slot(self, src: int, dst: int, *, seed: int | None = None) -> None:
        """Fork: dst gets a copy of src, penalties, grammar state, budget and draws included.

        With the same draws both would choose the same tokens from the same logits; `seed` gives
        dst its own."""
        engine, context = self._open()
        source, target = self._seq(src, "src"), self._seq(dst, "dst")
        draws = None if seed is None else integer("seed", seed, 0, SEED_MAX)
        with context.exclusive():
            self._check_slot(lib.plb_slot_copy(engine, source, target), src)
            self._let_go(target)
            if draws is not None:
                self._check_slot(lib.plb_slot_reseed(engine, target, draws), dst)

    def take_slot(self, seq_id: int) -> DetachedSlot:
        """Take a slot out, to `put_slot` it under any sequence id later."""
        engine, context = self._open()
        out, seq = ffi.new("plb_slot **"), self._seq(seq_id)
        with context.exclusive():
            self._check_slot(lib.plb_slot_take(engine, seq, out), seq)
        slot = self._let_go(seq) or DetachedSlot(None)
        slot._slot = owned(out[0], context._model_ptr, free=lib.plb_slot_free)
        return slot

    def put_slot(
        self,
        seq_id: int,
        slot: DetachedSlot,
        next_row: tuple[int, int] | None = None,
        *,
        report: bool = False,
    ) -> None:
        """Put a slot that was taken under a sequence id, replacing what is there.

        next_row: token and position of the row that a run computes next for it, such as the last
        token of a prompt; None: that behind what it has sampled. report: `Run.results` has each of
        its results, not only the one that ends it.

        Raises `ArgumentError`, and what was there stays, for a next_row out of its range, and for a
        slot of another model or with more log-probabilities than this stepper has room for."""
        engine, context = self._open()
        if slot._slot is None:
            raise ArgumentError("slot", slot, "must be a slot that was not put back yet")
        seq = self._seq(seq_id)
        if next_row is not None:
            token = integer("next_row[0]", next_row[0], 0, self.n_vocab - 1)
            pos = integer("next_row[1]", next_row[1], 0, self.n_pos_max - 1)
        with context.exclusive():
            code = lib.plb_slot_put(engine, seq, slot._slot)
        if code:
            limit = f"must be of this model, with logprobs of at most {self.n_logprobs_max}"
            raise ArgumentError("slot", slot, limit)
        self._let_go(seq)
        ffi.gc(slot._slot, None)  # the engine's from now on
        slot._inside, slot._slot = owned(slot._slot, engine), None
        self._slots[seq] = slot
        if next_row is not None:
            with context.exclusive():
                self._check_slot(lib.plb_slot_next(engine, seq, token, pos, report), seq)

    def _let_go(self, seq: int) -> DetachedSlot | None:
        """The slot of a sequence is not the stepper's any more."""
        slot = self._slots.pop(seq, None)
        if slot is not None:
            slot._inside = None
        return slot

    def replay(
        self, slot: DetachedSlot, tokens: Iterable[int] | TokenArray, n_draws: int, next_pos: int
    ) -> None:
        """Take a new slot of `make_slot` to where it would be after sampling `tokens` (at least
        one, fewer than its budget), with as many random numbers; the last of them is the row that
        comes next, at position `next_pos`. For restoring a sequence: `SlotInfo.n_draws` is what to
        save. `GrammarError` when the grammar does not lead there; the slot is of no use then."""
        _, context = self._open()
        ids = context.model.vocab.check_tokens(tokens, "tokens")
        draws = integer("n_draws", n_draws, 0, 2**31 - 1)
        pos = integer("next_pos", next_pos, 0, self.n_pos_max - 1)
        if slot._slot is None:
            raise ArgumentError("slot", slot, "must be a slot that was not put back yet")
        if not len(ids):
            raise ArgumentError("tokens", tokens, "must be at least one")
        pointer = ffi.from_buffer("llama_token[]", ids)
        code = lib.plb_slot_replay(slot._slot, pointer, len(ids), draws, pos)
        if code == lib.PLB_E_ARGUMENT:
            limit = f"must be new, for more than {len(ids)} tokens, and without n_draws if greedy"
            raise ArgumentError("slot", slot, limit)
        if code in (lib.PLB_E_GRAMMAR_STATE, lib.PLB_E_NO_CANDIDATE):
            raise GrammarError("the grammar does not lead to these tokens")
        if code:
            raise slot_failure(code, -1, "")

    def slot(self, seq_id: int) -> SlotInfo:
        """A slot's state; `ArgumentError` when the sequence has none."""
        engine, _ = self._open()
        info = ffi.new("plb_slot_info *")
        self._check_slot(lib.plb_slot_get_info(engine, self._seq(seq_id), info), seq_id)
        return SlotInfo(
            active=bool(info.active),
            finish=Finish(info.finish),
            error=info.error,
            path=PATH_NAMES[info.path],
            n_generated=info.n_generated,
            n_left=info.n_left,
            next_token=info.next_token,
            next_pos=info.next_pos,
            seed=None if info.seed == lib.LLAMA_DEFAULT_SEED else info.seed,
            logprobs=None if info.n_logprobs < 0 else info.n_logprobs,
            n_draws=info.n_draws,
        )

    def slot_error(self, seq_id: int) -> SamplingError:
        """Why the sequence's last result was an error."""
        engine, _ = self._open()
        why = text(lib.plb_slot_error(engine, self._seq(seq_id)))
        none_left = self.slot(seq_id).error == lib.PLB_E_NO_CANDIDATE
        return NoCandidate(why) if none_left else SamplingError(why)

    @property
    def last_error(self) -> str:
        """Text of the last failure."""
        engine, _ = self._open()
        return text(lib.plb_last_error(engine))

    def close(self) -> None:
        """Free the slots; safe to call twice. Views still held elsewhere stay readable.
        `ContextBusy` while another thread is inside."""
        engine, context = self._engine, self._context
        if context is None:
            return
        with nullcontext() if context.closed else context.exclusive():
            self._engine = self._context = None
            for seq_id in range(self.n_seq_max):
                lib.plb_slot_clear(engine, seq_id)
                self._let_go(seq_id)
            if not context.closed:
                lib.plb_engine_detach(engine)
                context._attached.remove(engine)

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> tuple[Any, Context]:
        context = self._context
        if context is None:
            raise ClosedError("the stepper is closed")
        _ = context.ptr  # raises ClosedError when the context is closed
        return self._engine, context

    def _seq(self, seq_id: int, name: str = "seq_id") -> int:
        return integer(name, seq_id, 0, self.n_seq_max - 1)

    def _seqs(self, slots: npt.NDArray[np.int32] | Sequence[int]) -> npt.NDArray[np.int32]:
        array = flat_integers("slots", slots)
        if array.dtype != np.int32:  # the native side checks these
            check_range("slots", array, 0, self.n_seq_max - 1)
        return np.ascontiguousarray(array, np.int32)

    def _check_slot(self, code: int, seq_id: int) -> None:
        if code:
            raise slot_failure(code, seq_id, self.last_error)


def _refused(stepper: Stepper, code: int, n_rows: int, slots: npt.NDArray[np.int32]) -> Exception:
    """The exception for a call that was refused before libllama saw it: of a run of `slots`, or of
    n_rows rows."""
    if code == lib.PLB_E_MEMORY:
        return MemoryError(stepper.last_error)
    limits = {
        lib.PLB_E_TOKEN: ("token", f"must be in 0..{stepper.n_vocab - 1}"),
        lib.PLB_E_SEQ: ("seq", f"must be in 0..{stepper.n_seq_max - 1}"),
        lib.PLB_E_POS: ("pos", f"must be in 0..{stepper.n_pos_max - 1}"),
        lib.PLB_E_FLAGS: ("flags", "must be OUTPUT and SAMPLE only"),
        lib.PLB_E_NO_SLOT: ("seq", "must be a sequence with a slot, to be sampled"),
        lib.PLB_E_SLOT_FINISHED: ("seq", "must be a sequence whose slot has not finished"),
        lib.PLB_E_NO_TOKEN: ("seq", "must be a sequence that has a next token"),
        lib.PLB_E_SEQ_TWICE: ("seq", "must be named once"),
        lib.PLB_E_DRAFT: ("drafts", "must have drafts of at most n_draft_max tokens"),
    }
    at = stepper._info.bad_row
    if code not in limits or at < 0:
        return ArgumentError("slots" if len(slots) else "n_rows", n_rows, stepper.last_error)
    name, limit = limits[code]
    i = at - (n_rows - len(slots))  # among the slots, whose rows are the last ones
    if i >= 0:
        if name == "drafts":
            return ArgumentError("drafts", f"those of sequence {slots[i]}", limit)
        if name == "pos":
            limit = f"its next position must be below {stepper.n_pos_max}"
        return ArgumentError(f"slots[{i}]", int(slots[i]), limit)
    return ArgumentError(f"rows.{name}[{at}]", int(getattr(stepper.rows, name)[at]), limit)
