"""What a context needs to be batch-invariant, found out by trying.

Which numbers of rows the kernels tell apart depends on the machine, the types of the weights and
the build: x86 without AVX-512 has one kernel for a single row of F32 weights and another one for
more, other machines one for pairs, fours or eights. So a new context decodes the same token in
every stream, by different numbers of rows, and only those numbers are used that give each row the
same bits, at any place. `pyllamabatch.scheduler.invariance` says what is done with them.

One row alone is never among them: attention of a single row on a CPU is divided between the threads
where it is long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, UnsupportedOperation
from ..kv import Preemption
from ..llama.batch import Batch
from ..llama.context import Context
from ..llama.model import Model
from ..scheduler.invariance import GRID, LEAST_ROWS, Invariance, tried
from ..step.native import offloaded

N_BEFORE = 3  # tokens that each stream holds before

Bits = npt.NDArray[np.uint32]


def check_can(params: dict[str, Any], n_seq_max: int) -> None:
    """ArgumentError for a parameter of the context that stands in the way."""
    if params.get("kv_unified") is True:
        raise ArgumentError(
            "kv_unified",
            True,
            'False or "auto" with batch_invariant: in a pool rows share cells',
        )
    if not params.get("swa_full", True):
        raise ArgumentError(
            "swa_full", False, "True with batch_invariant: cells of a window change their order"
        )
    least = max(LEAST_ROWS, n_seq_max)
    for name in ("n_batch", "n_ubatch"):
        if params[name] < least:
            raise ArgumentError(name, params[name], f"at least {least} with batch_invariant")


def swaps(preemption: Preemption, window: int) -> bool:
    """Whether preempted sequences are saved, of a model whose sliding window has so many tokens (0:
    none). A state leaves the cells out that no window reaches any more: the others come back in
    another order. Where nothing is left out, rows that decoded need not decode one by one again."""
    if window and preemption == "swap":
        raise ArgumentError(
            "preemption",
            "swap",
            '"auto" or "recompute" with batch_invariant and a sliding window: a state has not all '
            "of its cells",
        )
    return preemption == "swap" or (preemption == "auto" and not window)


def find(context: Context, n_seq_max: int, *, nearly: bool = False) -> Invariance:
    """Of a new context, whose memory is empty before and after. UnsupportedOperation when rows that
    decode depend on their place, whatever their number, and for devices other than a CPU; these
    have one width for all that decode with `nearly`."""
    if offloaded(context):
        if not nearly:
            raise UnsupportedOperation(
                "batch_invariant=True is for CPUs: other devices divide the attention of a row by "
                'the longest sequence beside it; batch_invariant="nearly" is as close as they come'
            )
        return Invariance(min(GRID, context.n_ubatch), (max(LEAST_ROWS, n_seq_max),))
    widths = equal_widths(context, n_seq_max)
    if not widths:
        raise UnsupportedOperation(
            f"batch_invariant: on this machine a row of {context.model.description} depends on its "
            "place among the others"
        )
    return Invariance(min(GRID, context.n_ubatch), widths)


def equal_widths(context: Context, n_seq_max: int) -> tuple[int, ...]:
    """Numbers of rows that give every row the same logits, bit by bit, ascending; the last one is
    at least `n_seq_max`. Empty when there are none. With experts, all that were tried or none: how
    many rows an expert has is for the rows to say."""
    least = max(LEAST_ROWS, n_seq_max)
    found = {width: row_bits(context, width) for width in tried(least)}
    most = least
    while found[most] is None and most < context.n_seq_max:
        most += 1
        found[most] = row_bits(context, most)
    context.memory.clear()
    wanted = found[most]
    if wanted is None:
        return ()
    equal = [w for w, bits in found.items() if bits is not None and (bits == wanted).all()]
    if _has_experts(context.model) and len(equal) < len(found):
        return ()
    return tuple(sorted(equal))


def row_bits(context: Context, width: int) -> Bits | None:
    """Logits of a token in each of the first `width` streams, which hold the same tokens; None when
    not all rows have the same. The streams are empty before and after."""
    tokens = np.linspace(0, context.model.n_vocab - 1, N_BEFORE + 2).astype(int)[1:].tolist()
    batch = Batch(width)
    for pos, token in enumerate(tokens):
        batch.clear()
        for seq in range(width):
            batch.add(token, pos, seq, logits=True)
        context.decode(batch)
    rows: Bits = context.logits_all().view(np.uint32)
    same = bool((rows == rows[0]).all())
    bits = rows[0].copy() if same else None
    for seq in range(width):
        context.memory.seq_rm(seq)
    return bits


def _has_experts(model: Model) -> bool:
    return int(model.metadata.get(f"{model.architecture}.expert_count", 0)) > 0
