"""How much memory a context takes at least, before libllama tries.

libllama zeroes what it allocates, and a system that overcommits kills the process for that, so
what can't fit is refused here. The figure is a lower bound on purpose (a sliding window or hybrid
model keeps less than a plain one): a refusal is always right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyllamabatch.errors import NotEnoughMemory
from pyllamabatch.llama import runtime as _backend
from pyllamabatch.planner.machines import host_available
from pyllamabatch.raw import lib

if TYPE_CHECKING:
    from pyllamabatch.llama.model import Model

_CELL_BYTES = 4 + 4 + 32  # libllama's own notes on a cell: position, shift, a bit per sequence


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
    return host_available() + sum(d.free for d in _backend.devices().values() if d.kind != "cpu")
