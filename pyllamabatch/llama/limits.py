"""What libllama would abort on when a context is made or run, checked before.

Each rule names the assertion's reason, not its line: they are re-read when llama.cpp moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyllamabatch.errors import ArgumentError, NotEnoughMemory, UnsupportedOperation
from pyllamabatch.llama import runtime
from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.host import host_available
from pyllamabatch.raw import lib

if TYPE_CHECKING:
    from pyllamabatch.llama.context import Context
    from pyllamabatch.llama.model import Model

MAX_CTX = 2**31 - 256  # cells are counted in 32 bits and n_ctx is rounded up to 256
_CELL_BYTES = 4 + 4 + 32  # libllama's own notes on a cell: position, shift, a bit per sequence


def check_params(model: Model, params: Any) -> int:
    """Check parameters together; returns the rows with output that a batch may have."""
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
    for name, width in zip(("type_k", "type_v"), model.head_dims, strict=True):
        _check_cache_type(name, getattr(params, name), width)
    if not model._no_alloc:
        check_fits(model, params, n_ctx, n_batch, params.n_seq_max)
    return int(n_outputs)


def _check_cache_type(name: str, ggml_type: int, width: int) -> None:
    kinds = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
    if ggml_type not in {getattr(lib, f"GGML_TYPE_{kind}") for kind in kinds}:
        raise ArgumentError(name, ggml_type, f"a cache can be {', '.join(kinds).lower()}")
    block = int(lib.ggml_blck_size(ggml_type))
    if width % block:
        raise ArgumentError(name, ggml_type, f"its block of {block} does not divide {width} (head)")


def max_position(model: Model) -> int:
    """The last position that a row may have: ggml aborts past the end of a table of positions."""
    return model.n_ctx_train - 1 if model.has_position_table else 2**31 - 2


def check_batch(context: Context, batch: Batch, encoder: bool) -> None:
    """Check the rows that are about to run in this context."""
    if context.model._no_alloc:
        raise UnsupportedOperation("the model was loaded with no_alloc: it has no weights")
    n = batch.n_tokens
    if n == 0:
        raise ArgumentError("batch", batch, "has no rows")
    if n > context.n_batch:
        raise ArgumentError("batch.n_tokens", n, f"the context takes n_batch={context.n_batch}")
    causal = lib.llama_get_causal_attn(context.ptr)
    at_once = encoder or not causal or (context.params["embeddings"] and context.pooling_type > 0)
    if at_once and n > context.n_ubatch:
        raise ArgumentError(
            "batch.n_tokens", n, f"must be computed at once, n_ubatch={context.n_ubatch}"
        )
    batch.check(context.model.n_vocab, context.n_seq_max, max_position(context.model))
    n_outputs = n if context.params["embeddings"] else int(np.count_nonzero(batch.logits[:n]))
    if n_outputs > context.n_outputs_max:
        raise ArgumentError(
            "batch.logits", n_outputs, f"rows with output, n_outputs_max={context.n_outputs_max}"
        )
    can = context.capabilities
    if (can.recurrent or not can.unified) and (batch.n_seq_id[:n] > 1).any():
        raise UnsupportedOperation(
            "a row in several sequences needs kv_unified=True and a model that is not recurrent"
        )


def check_fits(model: Model, params: Any, n_ctx: int, n_batch: int, n_outputs: int) -> None:
    """Raise `NotEnoughMemory` when the context that `params` asks for can't fit.

    Bytes: n_ctx x (40 + layers x kv heads x (key + value bytes)) for the cache, n_ctx x n_ubatch
    x 2 for the attention mask, outputs x n_vocab x 4 for the logits. Recurrent models have no
    cells.
    """
    n_ubatch = min(n_batch, params.n_ubatch or n_batch)
    needed = 4 * n_outputs * model.n_vocab
    if not model.is_recurrent:
        needed += n_ctx * (_CELL_BYTES + _layers(model) * _row(model, params) + 2 * n_ubatch)
    available = _available()
    if needed > available:
        raise NotEnoughMemory(
            needed, available, f"lower n_ctx ({n_ctx}), n_ubatch ({n_ubatch}) or n_batch"
        )


def cell_bytes(model: Model, params: dict[str, Any]) -> float:
    """Bytes of one cell in all layers that keep cells, roughly: what a state has per token."""
    heads = model.n_layer * model.n_head_kv
    key, value = model.head_dims
    return heads * (_bytes(params["type_k"], key) + _bytes(params["type_v"], value))


def _layers(model: Model) -> int:
    """Layers that are sure to keep n_ctx cells: one where the model mixes kinds of layers."""
    prefix = f"{model.architecture}.attention."
    mixed = model.is_hybrid or model.n_swa or f"{prefix}shared_kv_layers" in model.metadata
    same = f"{prefix}head_count_kv" in model.metadata  # a list is not in it
    return model.n_layer if same and not mixed else 1


def _row(model: Model, params: Any) -> int:
    """Bytes of one cell in one layer."""
    key, value = model.head_dims
    if f"{model.architecture}.attention.key_length_mla" in model.metadata:
        value = 0  # latent attention keeps keys only
    return model.n_head_kv * (_bytes(params.type_k, key) + _bytes(params.type_v, value))


def _bytes(ggml_type: int, width: int) -> int:
    return int(lib.ggml_type_size(ggml_type)) * width // int(lib.ggml_blck_size(ggml_type))


def _available() -> int:
    """Bytes that host and devices together could still give."""
    devices = [d.free for d in runtime.devices().values() if d.kind != "cpu"]
    return host_available() + sum(devices)
