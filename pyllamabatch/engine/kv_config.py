"""What sequences of an engine can share, from what the memory of its context can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..kv import Preemption, Sharing, SwapChoice
from ..llama.limits import cell_bytes
from ..llama.memory import copies_whole_only

if TYPE_CHECKING:
    from ..llama.context import Context
    from ..llama.model import Model

MOST_STATES = 8  # slots for kept recurrent states: each takes the memory of a whole one
LEAST_KEPT = 16  # slots for what is kept in shared cells: they cost a row of logits each


def n_cached(model: Model, n_seq_max: int, n_batch: int, params: dict[str, Any]) -> int:
    """Slots for what is kept, beyond the `n_seq_max` that may run.

    None where a slot has cells of its own (separate streams, and sliding windows with
    `swa_full=False`): a request goes on in the slot of the one that it continues, there.
    """
    windows_only = model.n_swa and not params.get("swa_full", True)
    if not params["kv_unified"] or windows_only:
        return 0
    lump = copies_whole_only(model)
    wanted = min(n_seq_max, MOST_STATES) if lump else max(n_seq_max, LEAST_KEPT)
    return max(0, min(wanted, 256 - n_seq_max, n_batch - n_seq_max))


def sharing_of(context: Context, n_seq_max: int) -> Sharing:
    """What sequences of this context can take over from each other. libllama's own refusals are
    the last word: what it refuses is computed."""
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
