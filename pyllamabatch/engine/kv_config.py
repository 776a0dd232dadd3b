"""What the scheduler may use of a context, and what its sequences can share."""

from dataclasses import replace

from ..kv import Sharing
from ..llama.limits import max_position
from ..scheduler import Invariance, Limits
from ..scheduler.kv_options import Pool
from .protocols import EngineContext


def limits_of(
    context: EngineContext,
    n_seq_max: int,
    n_draft_max: int = 0,
    invariance: Invariance | None = None,
) -> Limits:
    """What a step on this context may not exceed; `n_seq_max` sequences may run at once, and may
    have drafts of so many tokens."""
    can = context.capabilities
    n_cells_seq = min(context.n_ctx_seq, max_position(context.model) + 1)
    if invariance is not None:
        n_cells_seq -= 1  # for a row that fills up a call
    # A recurrent state has one size, however long the text: none takes cells from another.
    unified = can.unified and not can.recurrent
    return Limits(
        n_batch=context.n_batch,
        n_ubatch=context.n_ubatch,
        n_seq_max=n_seq_max,
        n_cells=context.n_ctx if unified else n_cells_seq * n_seq_max,
        n_cells_seq=n_cells_seq,
        unified=unified,
        gap_max=context.gap_max,
        behind=context.computes_behind,
        n_draft_max=n_draft_max,
        n_outputs=context.n_outputs_max if n_draft_max else 0,
        even=can.recurrent or can.hybrid,
    )


def sharing_of(
    context: EngineContext, n_seq_max: int, invariance: Invariance | None = None
) -> Sharing:
    """What sequences of this context can take over from each other. What libllama refuses all the
    same is computed."""
    can = context.capabilities
    swa_full = bool(context.params["swa_full"])
    # A cell of a small window that two sequences share is never given to others.
    shares = not can.unified or not can.swa_window or swa_full
    return Sharing(
        copy_part=can.prefix_copy and shares,
        copy_whole=shares,
        at_once=not can.copies_wait,
        trim=can.partial_removal,
        window=can.swa_window,
        tries=swa_full,
        n_cached=context.n_seq_max - n_seq_max,
        grid=1 if invariance is None else invariance.grid,
    )


def pool_of(context: EngineContext, n_seq_max: int, n_cells: int, n_draft_max: int = 0) -> Pool:
    """What the streams of `context` become with `n_cells` for all sequences."""
    limits, sharing = limits_of(context, n_seq_max, n_draft_max), sharing_of(context, n_seq_max)
    n_cells_seq = min(n_cells, max_position(context.model) + 1)
    shares = not sharing.window or sharing.tries
    return Pool(
        replace(limits, n_cells=n_cells, n_cells_seq=n_cells_seq, unified=True, gap_max=0),
        replace(sharing, copy_part=shares, copy_whole=shares),
    )
