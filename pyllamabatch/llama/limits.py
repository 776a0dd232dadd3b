"""What libllama would abort on when a context is made, or what can't fit, checked before. And what
a context takes up.

Each rule names the assertion's reason, not its line: they are re-read when llama.cpp moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pyllamabatch.errors import ArgumentError, NotEnoughMemory, PyllamabatchError
from pyllamabatch.llama import runtime
from pyllamabatch.llama.host import host_available
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.params import CACHE_TYPES
from pyllamabatch.llama.tensors import tensors
from pyllamabatch.raw import ffi, lib

if TYPE_CHECKING:
    from pyllamabatch.llama.context import Context

MAX_CTX = 2**31 - 256  # cells are counted in 32 bits and n_ctx is rounded up to 256
_SEVERAL_NEXTN = ("hy_v3", "mimo2", "step35")
_CELL_BYTES = 4 + 4 + 32  # libllama's own notes on a cell: position, shift, a bit per sequence


def streams_of(n_ctx: int | None) -> int:
    """Cells of the streams that a context was made with; ArgumentError for None, a pool."""
    if n_ctx is None:
        raise ArgumentError("pool", 0, "this context was made as a pool: it never had streams")
    return n_ctx


def check_params(model: Model, params: Any) -> int:
    """Check the parameters of a context together. Returns the rows with output that a batch may
    have. Raises `ArgumentError` or `NotEnoughMemory`."""
    n_ctx = params.n_ctx or model.n_ctx_train
    causal = model.is_causal and params.attention_type != lib.LLAMA_ATTENTION_TYPE_NON_CAUSAL
    n_batch = min(n_ctx, params.n_batch) if causal else params.n_batch
    n_ubatch = min(n_batch, params.n_ubatch or n_batch)
    n_outputs = params.n_outputs_max
    if n_outputs == 0 or model.has_encoder:
        n_outputs = n_batch
    if n_batch < params.n_seq_max:
        raise ArgumentError(
            "n_batch", n_batch, f"must hold a row of each sequence, n_seq_max={params.n_seq_max}"
        )
    if n_outputs < params.n_seq_max:
        raise ArgumentError(
            "n_outputs_max", n_outputs, f"must be at least n_seq_max={params.n_seq_max}"
        )
    if params.n_rs_seq and params.n_rs_seq + 1 >= n_ubatch:
        raise ArgumentError("n_rs_seq", params.n_rs_seq, f"must be below n_ubatch-1={n_ubatch - 1}")
    if params.ctx_type == lib.LLAMA_CONTEXT_TYPE_MTP and model.n_layer_nextn:
        _check_mtp(model)
    for name, width in zip(("type_k", "type_v"), model.head_dims, strict=True):
        _check_cache_type(name, getattr(params, name), width)
    if not model._no_alloc:
        _check_fits(model, params, n_ctx, n_ubatch)
    return int(n_outputs)


def _check_mtp(model: Model) -> None:
    """Its graphs assert that the layers are there, and most of them that it is one."""
    if not model._load.get("load_mtp"):
        raise ArgumentError("ctx_type", "mtp", "needs Model(path, load_mtp=True)")
    first = f"blk.{model.n_layer}."
    if not any(name.startswith(first) for name, *_ in tensors(model)):
        raise ArgumentError("ctx_type", "mtp", "the file lacks the layers that its metadata names")
    if model.n_layer_nextn > 1 and model.architecture not in _SEVERAL_NEXTN:
        limit = f"{model.architecture} can have one layer that predicts, not {model.n_layer_nextn}"
        raise ArgumentError("ctx_type", "mtp", limit)


def _check_cache_type(name: str, ggml_type: int, width: int) -> None:
    if ggml_type not in {getattr(lib, f"GGML_TYPE_{kind.upper()}") for kind in CACHE_TYPES}:
        raise ArgumentError(name, ggml_type, f"a cache can be {', '.join(CACHE_TYPES)}")
    block = int(lib.ggml_blck_size(ggml_type))
    if width % block:
        raise ArgumentError(name, ggml_type, f"its block of {block} does not divide {width} (head)")


def _check_fits(model: Model, params: Any, n_ctx: int, n_ubatch: int) -> None:
    """Raise `NotEnoughMemory` when the context that `params` asks for can't fit.

    libllama zeroes what it allocates, and a system that overcommits kills the process for that.
    The figure is a lower bound (a sliding window or hybrid model keeps less than a plain one), so
    a refusal is always right. Bytes: n_ctx x (40 + layers x kv heads x (key + value bytes)) for
    the cache, n_ctx x n_ubatch x 2 for the attention mask, n_seq_max x n_vocab x 4 for the logits.
    Recurrent models have no cells."""
    needed = 4 * params.n_seq_max * model.n_vocab
    if not model.is_recurrent:
        mtp = params.ctx_type == lib.LLAMA_CONTEXT_TYPE_MTP
        n_layers = 1 if mtp else _layers(model)
        cell = _CELL_BYTES + n_layers * _cell_bytes_of_layer(model, params) + 2 * n_ubatch
        needed += n_ctx * cell
    own = (device.free for device in model.devices() if not device.on_mac)
    available = host_available() + sum(own)
    if needed > available:
        advice = f"lower n_ctx ({n_ctx}), n_ubatch ({n_ubatch}) or n_batch"
        raise NotEnoughMemory(needed, available, advice)


def _layers(model: Model) -> int:
    """Layers that are sure to keep n_ctx cells: one where the model mixes kinds of layers."""
    prefix = f"{model.architecture}.attention."
    mixed = model.is_hybrid or model.n_swa or f"{prefix}shared_kv_layers" in model.metadata
    same = f"{prefix}head_count_kv" in model.metadata  # a list is not in it
    return model.n_layer if same and not mixed else 1


def _cell_bytes_of_layer(model: Model, params: Any) -> int:
    key, value = model.head_dims
    if f"{model.architecture}.attention.key_length_mla" in model.metadata:
        value = 0  # latent attention keeps keys only
    return model.n_head_kv * (_row_bytes(params.type_k, key) + _row_bytes(params.type_v, value))


def _row_bytes(ggml_type: int, width: int) -> int:
    return int(lib.ggml_type_size(ggml_type)) * width // int(lib.ggml_blck_size(ggml_type))


def cell_bytes(model: Model, params: Mapping[str, Any]) -> float:
    """Bytes of one cell in all layers that keep cells, roughly: what a state has per token."""
    key, value = model.head_dims
    one = _row_bytes(params["type_k"], key) + _row_bytes(params["type_v"], value)
    return model.n_layer * model.n_head_kv * one


def max_position(model: Model) -> int:
    """The last position that a row may have: ggml aborts past the end of a table of positions."""
    return model.n_ctx_train - 1 if model.has_position_table else 2**31 - 2


class Part(NamedTuple):
    """Bytes in buffers of one type. model: weights; context: KV cells and states; compute: graphs.
    host: memory that the CPU can use."""

    buffer_type: str
    device: str
    host: bool
    model: int
    context: int
    compute: int


def memory_parts(context: Context) -> list[Part]:
    """The buffers of a context, without that of the logits; of a model loaded with no_alloc, the
    buffers that it would have."""
    with context.exclusive():
        n = lib.plb_memory_breakdown(context.ptr, ffi.NULL, 0)
        parts = ffi.new("plb_memory_part[]", max(n, 1))
        n = lib.plb_memory_breakdown(context.ptr, parts, n)
    if n < 0:
        raise PyllamabatchError("libllama can't say what the context takes up")
    text = runtime.text
    return [
        Part(text(p.buffer_type), text(p.device), bool(p.host), p.model, p.context, p.compute)
        for p in parts[0:n]
    ]
