"""What the stepper needs of cffi: views of native memory, parameters, exceptions for codes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import ArgumentError, GrammarError, PyllamabatchError
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.json_schema import schema_to_gbnf
from pyllamabatch.step.sampling_params import SamplingParams

if TYPE_CHECKING:
    from pyllamabatch.llama.context import Context
    from pyllamabatch.step.stepper import Stepper


def code_text(code: int) -> str:
    text: bytes = ffi.string(lib.plb_code_text(code))
    return text.decode()


def view_of(engine: Any, pointer: Any, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Any:
    """A NumPy view on the engine's memory that keeps the engine alive."""
    kind = np.dtype(dtype)
    size = kind.itemsize * int(np.prod(shape))
    owner = ffi.gc(ffi.cast("char *", pointer), partial(hold, engine))
    return np.ndarray(shape, kind, ffi.buffer(owner, size))


def hold(engine: Any, _pointer: Any) -> None:
    """A destructor whose only work is to have held the engine until now."""


class DetachedSlot:
    """The sampling state of one sequence. `make_slot` makes one, `put_slot` gives it to a sequence
    id, `take_slot` takes it out again (preemption). It stays the same object all the time."""

    __slots__ = ("_inside", "_slot")

    def __init__(self, slot: Any) -> None:
        self._slot = slot  # while it is outside
        self._inside: Any = None  # while it is the stepper's

    def tokens(self) -> npt.NDArray[np.int32]:
        """What it has generated so far, oldest first: int32. Between two steps."""
        slot, out = self._slot or self._inside, ffi.new("llama_token **")
        if slot is None:
            raise ArgumentError("slot", self, "must be a slot that was not cleared")
        n = lib.plb_slot_tokens(slot, out)
        return np.frombuffer(ffi.buffer(out[0], 4 * n), np.int32).copy() if n else NO_TOKENS


NO_TOKENS: npt.NDArray[np.int32] = np.zeros(0, np.int32)


PATHS = {lib.PLB_PATH_AUTO: "auto", lib.PLB_PATH_CHAIN: "chain", lib.PLB_PATH_FUSED: "fused"}
"""What `plb_path` values are called in Python."""


def path_of(name: str) -> int:
    """The `plb_path` of a `sampler` argument."""
    for path, known in PATHS.items():
        if known == name:
            return int(path)
    raise ArgumentError("sampler", name, f"must be one of {', '.join(PATHS.values())}")


DEVICE_SAMPLING = {
    "auto": lib.PLB_DEVICE_SAMPLING_AUTO,
    False: lib.PLB_DEVICE_SAMPLING_OFF,
    True: lib.PLB_DEVICE_SAMPLING_ON,
}


def device_sampling_of(value: bool | str) -> int:
    """The `plb_device_sampling` of a `device_sampling` argument."""
    if isinstance(value, bool) or value == "auto":
        return int(DEVICE_SAMPLING[value])
    raise ArgumentError("device_sampling", value, 'must be "auto", True or False')


def gap_max_of(context: Context) -> int:
    """The default of `Stepper`'s gap_max."""
    if context.params["kv_unified"] and not context.capabilities.recurrent:
        return 0
    return 16 if offloaded(context) else 1


def offloaded(context: Context) -> bool:
    """A device other than the CPU computes, some of it at least."""
    return bool(lib.llama_supports_gpu_offload()) and context.model._load["n_gpu_layers"] != 0


def sampling_struct(params: SamplingParams, path: int) -> tuple[Any, tuple[Any, ...]]:
    """The plb_sampling of params, and what must live as long as it."""
    biases = ffi.new("llama_logit_bias[]", list(params.logit_bias.items()))
    stops = ffi.new("llama_token[]", list(params.stop_token_ids))
    rules = params.grammar
    if isinstance(params.json_schema, str):
        rules = schema_to_gbnf(params.json_schema)
    grammar = ffi.NULL if rules is None else ffi.new("char[]", rules.encode())
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
    struct.path = path
    struct.n_logit_bias, struct.logit_bias = len(params.logit_bias), biases
    struct.n_stop_tokens, struct.stop_tokens = len(params.stop_token_ids), stops
    struct.grammar = grammar
    return struct, (biases, stops, grammar)


def slot_failure(code: int, seq_id: int, text: str) -> Exception:
    text = text or code_text(code)
    if code == lib.PLB_E_GRAMMAR:
        return GrammarError(text)
    if code == lib.PLB_E_NO_SLOT:
        return ArgumentError("seq_id", seq_id, "must be a sequence with a slot")
    if code == lib.PLB_E_MEMORY:
        return MemoryError(text)
    if code == lib.PLB_E_EXCEPTION:
        return PyllamabatchError(text)
    return ArgumentError("params", text, "what the vocabulary and the stepper allow")


def refused_step(stepper: Stepper, code: int, n_rows: int) -> Exception:
    """The exception for a step that was refused before libllama saw it."""
    row = stepper._info.bad_row
    limits = {
        lib.PLB_E_TOKEN: ("token", f"must be in 0..{stepper.n_vocab - 1}"),
        lib.PLB_E_SEQ: ("seq", f"must be in 0..{stepper.n_seq_max - 1}"),
        lib.PLB_E_POS: ("pos", f"must be in 0..{stepper.n_pos_max - 1}"),
        lib.PLB_E_FLAGS: ("flags", "must be OUTPUT, SAMPLE and REPORT only"),
        lib.PLB_E_NO_SLOT: ("seq", "must be a sequence with a slot, to be sampled"),
        lib.PLB_E_SLOT_FINISHED: ("seq", "must be a sequence whose slot has not finished"),
    }
    if code in limits:
        name, limit = limits[code]
        return ArgumentError(f"rows.{name}[{row}]", int(getattr(stepper.rows, name)[row]), limit)
    if code == lib.PLB_E_MEMORY:
        return MemoryError(stepper.last_error)
    return ArgumentError("n_rows", n_rows, stepper.last_error)


def refused_run(stepper: Stepper, code: int, seqs: npt.NDArray[np.int32]) -> Exception:
    at = stepper._info.bad_row
    limits = {
        lib.PLB_E_SEQ: f"must be in 0..{stepper.n_seq_max - 1}",
        lib.PLB_E_NO_SLOT: "must be a sequence with a slot",
        lib.PLB_E_SLOT_FINISHED: "must be a sequence whose slot has not finished",
        lib.PLB_E_NO_TOKEN: "must be a sequence that has sampled a token",
        lib.PLB_E_SEQ_TWICE: "must be named once",
        lib.PLB_E_POS: f"must be a sequence whose next position is below {stepper.n_pos_max}",
    }
    if code in limits and at >= 0:
        return ArgumentError(f"slots[{at}]", int(seqs[at]), limits[code])
    if code == lib.PLB_E_MEMORY:
        return MemoryError(stepper.last_error)
    return ArgumentError("slots", seqs.tolist(), stepper.last_error)
