"""What the stepper needs of cffi: slots, parameters, views, exceptions for codes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import ArgumentError, GrammarError, PyllamabatchError, choice
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.grammar import Grammar
from pyllamabatch.llama.handle import view
from pyllamabatch.llama.runtime import text
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.json_schema import schema_to_gbnf
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.types import RESULT_DTYPE, STEP_DTYPE, DraftColumns, Results, Rows


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


PATHS = {"auto": lib.PLB_PATH_AUTO, "chain": lib.PLB_PATH_CHAIN, "fused": lib.PLB_PATH_FUSED}
"""The `plb_path` of each word of a `sampler` argument."""

PATH_NAMES = {path: name for name, path in PATHS.items()}

DEVICE_SAMPLING = {
    "auto": lib.PLB_DEVICE_SAMPLING_AUTO,
    "False": lib.PLB_DEVICE_SAMPLING_OFF,
    "True": lib.PLB_DEVICE_SAMPLING_ON,
}


def device_sampling_of(value: bool | str) -> int:
    """The `plb_device_sampling` of a `device_sampling` argument: "auto", True or False."""
    word = str(value) if isinstance(value, bool) else value
    return int(DEVICE_SAMPLING[choice("device_sampling", word, DEVICE_SAMPLING)])


def gap_max_of(context: Context) -> int:
    """The default of `Stepper`'s gap_max."""
    streams = not context.params["kv_unified"] or context.capabilities.recurrent
    return default_gap_max(streams=streams, on_gpu=bool(context.model.offloaded))


def default_gap_max(*, streams: bool, on_gpu: bool) -> int:
    """A row costs a device little beside reading the weights again, and a CPU more."""
    if not streams:
        return 0
    return 16 if on_gpu else 1


_SAME_NAME = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "repeat_penalty", "frequency_penalty", "presence_penalty", "penalty_last_n", "ignore_eog",
)  # fmt: skip


def sampling_struct(params: SamplingParams, path: int) -> tuple[Any, tuple[Any, ...]]:
    """The plb_sampling of params, and what must live as long as it."""
    biases = ffi.new("llama_logit_bias[]", list(params.logit_bias.items()))
    stops = ffi.new("llama_token[]", list(params.stop_token_ids))
    rules = params.grammar
    if isinstance(params.json_schema, str):
        rules = schema_to_gbnf(params.json_schema)
    start, keep = ffi.NULL, ()
    if isinstance(rules, Grammar):
        start, keep = grammar_start(rules)
        rules = rules.text
    grammar = ffi.NULL if rules is None else ffi.new("char[]", rules.encode())
    struct = ffi.new("plb_sampling *")
    for name in _SAME_NAME:
        setattr(struct, name, getattr(params, name))
    struct.seed = lib.LLAMA_DEFAULT_SEED if params.seed is None else params.seed
    struct.n_logprobs = -1 if params.logprobs is None else params.logprobs
    struct.path = path
    struct.n_logit_bias, struct.logit_bias = len(params.logit_bias), biases
    struct.n_stop_tokens, struct.stop_tokens = len(params.stop_token_ids), stops
    struct.grammar, struct.grammar_start = grammar, start
    return struct, (biases, stops, grammar, start, *keep)


def grammar_start(grammar: Grammar) -> tuple[Any, tuple[Any, ...]]:
    """The plb_grammar_start of a grammar, and what must live as long as it."""
    start = ffi.new("plb_grammar_start *")
    texts = [ffi.new("char[]", pattern.encode()) for pattern in grammar.trigger_patterns]
    patterns = ffi.new("const char *[]", texts)
    arrays = {
        "tokens": grammar.trigger_tokens,
        "prefill": grammar.prefill,
        "thinking_start": grammar.thinking_start,
        "thinking_ends": [
            token for end in grammar.thinking_ends for token in (*end, lib.LLAMA_TOKEN_NULL)
        ],
    }
    keep = [*texts, patterns]
    start.lazy, start.n_patterns, start.patterns = grammar.lazy, len(texts), patterns
    for name, tokens in arrays.items():
        keep.append(array := ffi.new("llama_token[]", list(tokens)))
        setattr(start, name, array)
        setattr(start, f"n_{name}", len(tokens))
    return start, tuple(keep)


def slot_failure(code: int, seq_id: int, why: str) -> Exception:
    """The exception for a slot that can't be made, put or changed."""
    why = why or text(lib.plb_code_text(code))
    if code == lib.PLB_E_GRAMMAR:
        return GrammarError(why)
    if code == lib.PLB_E_NO_SLOT:
        return ArgumentError("seq_id", seq_id, "must be a sequence with a slot")
    if code == lib.PLB_E_MEMORY:
        return MemoryError(why)
    if code == lib.PLB_E_EXCEPTION:
        return PyllamabatchError(why)
    if code == lib.PLB_E_GRAMMAR_STATE:
        return ArgumentError(
            "params", why, "the answer that goes on is not what its grammar allows"
        )
    return ArgumentError("params", why, "what the vocabulary and the stepper allow")


def rows_of(views: Any, engine: Any) -> Rows:
    """The rows of a `plb_engine` with these `plb_views`."""
    shape = (views.n_rows_max,)
    return Rows(
        view(views.token, np.int32, shape, engine),
        view(views.pos, np.int32, shape, engine),
        view(views.seq, np.int32, shape, engine),
        view(views.flags, np.uint8, shape, engine),
    )


def results_of(views: Any, engine: Any) -> Results:
    """Its results."""
    n, width = views.n_results_max, views.n_logprobs_max
    return Results(
        view(views.results, RESULT_DTYPE, (n,), engine),
        top_token=view(views.top_token, np.int32, (n, width), engine),
        top_logprob=view(views.top_logprob, np.float32, (n, width), engine),
        steps=view(views.steps, STEP_DTYPE, (views.n_steps_max,), engine),
    )


def drafts_of(engine: Any, n_seq_max: int, n_rows: int) -> DraftColumns:
    """Its drafts."""
    native = ffi.new("plb_drafts *")
    lib.plb_engine_drafts(engine, native)
    wide, one, rows = (n_seq_max, native.n_draft_max), (1,), (n_rows + 1,)
    shapes = {
        "token": wide, "found": wide, "right": wide, "n_right": wide[1:],
        "n_priced": one, "credit": one, "gain": one, "new_graph": one,
        "seconds": rows, "worst": rows, "n_timed": rows, "ns_timed": rows,
    }  # fmt: skip

    def column(name: str) -> Any:
        pointer = getattr(native, name)
        kind = ffi.typeof(pointer).item
        dtype = f"{'f' if kind.cname == 'float' else 'i'}{ffi.sizeof(kind)}"
        return view(pointer, np.dtype(dtype), shapes.get(name, (n_seq_max,)), engine)

    return DraftColumns(*map(column, DraftColumns._fields))
