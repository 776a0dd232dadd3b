"""What sequences of an engine can share, from what the memory of its context can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..kv import Preemption, Sharing, SwapChoice
from ..llama.limits import cell_bytes, max_position
from ..llama.memory import copies_whole_only
from ..scheduler import Limits
from ..step.native import gap_max_of

if TYPE_CHECKING:
    from ..llama.context import Context
    from ..llama.model import Model

MOST_STATES = 8  # slots for cached recurrent states: each takes the memory of a whole one
LEAST_CACHED = 16  # slots for prefixes cached in shared cells: they cost a row of logits each


def n_cached(model: Model, n_seq_max: int, n_batch: int, params: dict[str, Any]) -> int:
    """Slots for cached prefixes, beyond the `n_seq_max` that may run.

    0 where a slot has cells of its own (separate streams, and sliding windows with
    `swa_full=False`): there a request goes on in the slot of the one that it continues.
    """
    windows_only = model.n_swa and not params.get("swa_full", True)
    if not params["kv_unified"] or windows_only:
        return 0
    lump = copies_whole_only(model)
    wanted = min(n_seq_max, MOST_STATES) if lump else max(n_seq_max, LEAST_CACHED)
    return max(0, min(wanted, 256 - n_seq_max, n_batch - n_seq_max))


def limits_of(context: Context, n_seq_max: int) -> Limits:
    """What a step on this context may not exceed; `n_seq_max` sequences may run at once."""
    can = context.capabilities
    n_cells_seq = min(context.n_ctx_seq, max_position(context.model) + 1)
    # A recurrent state has one size, however long the text: none takes cells from another.
    unified = can.unified and not can.recurrent
    return Limits(
        n_batch=context.n_batch,
        n_ubatch=context.n_ubatch,
        n_seq_max=n_seq_max,
        n_cells=context.n_ctx if unified else n_cells_seq * context.n_seq_max,
        n_cells_seq=n_cells_seq,
        unified=unified,
        gap_max=gap_max_of(context),
    )


def sharing_of(context: Context, n_seq_max: int) -> Sharing:
    """What sequences of this context can take over from each other. What libllama refuses all the
    same is computed."""
    can = context.capabilities
    swa_full = bool(context.params["swa_full"])
    # A cell of a small window that two sequences share is never given to others.
    shares = not can.unified or not can.swa_window or swa_full
    return Sharing(
        copy_part=can.prefix_copy and shares,
        copy_whole=shares,
        trim=can.partial_removal,
        window=can.swa_window,
        tries=swa_full,
        n_cached=context.n_seq_max - n_seq_max,
    )


def swap_choice(context: Context, mode: Preemption) -> SwapChoice:
    return SwapChoice(mode, bytes_per_token=cell_bytes(context.model, context.params))
