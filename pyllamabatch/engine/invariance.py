"""What a context needs to be batch-invariant, found out by trying.

Which numbers of rows the kernels tell apart depends on the machine, the types of the weights and
the build: x86 without AVX-512 has one kernel for a single row of F32 weights and another one for
more, other machines one for pairs, fours or eights. So a new context decodes the same tokens in
every stream, by different numbers of rows, and only those numbers are used that give each row the
same bits, at any place. `pyllamabatch.scheduler.invariance` says what is done with them.

One row alone is never among them: attention of a single row on a CPU is divided between the threads
where it is long."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, UnsupportedOperation
from ..kv import Preemption
from ..llama.batch import Batch
from ..llama.context import Context
from ..llama.model import Model
from ..scheduler.invariance import GRID, LEAST_ROWS, ROWS_EACH, Invariance, tried

log = logging.getLogger(__name__)

N_BEFORE = 131  # tokens that each stream holds before: more than a kernel sums at a time

Bits = npt.NDArray[np.uint32]


def check_can(params: dict[str, Any], n_seq_max: int) -> None:
    """ArgumentError for a parameter of the context that stands in the way."""
    if params.get("kv_unified") is True:
        raise ArgumentError(
            "kv_unified", True, 'False or "auto" with batch_invariant: in a pool rows share cells'
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


def find(
    context: Context, n_seq_max: int, *, nearly: bool = False, drafts: bool = False
) -> Invariance:
    """Of a new context, whose memory is empty before and after. UnsupportedOperation when rows that
    decode depend on their place, whatever their number, and for devices other than a CPU; these
    have one width for all that decode with `nearly`. drafts: steps may have some."""
    if context.model.offloaded:
        if not nearly:
            raise UnsupportedOperation(
                "batch_invariant=True is for CPUs: other devices divide the attention of a row by "
                'the longest sequence beside it; batch_invariant="nearly" is as close as they come'
            )
        return Invariance(min(GRID, context.n_ubatch), (max(LEAST_ROWS, n_seq_max),))
    probe = Probe(context)
    widths = equal_widths(probe, n_seq_max)
    if not widths:
        raise UnsupportedOperation(
            f"batch_invariant: on this machine a row of {context.model.description} depends on its "
            "place among the others"
        )
    drafted = equal_drafts(probe, widths) if drafts else {}
    context.memory.clear()
    if drafts and not any(drafted.values()):
        log.warning(
            "batch_invariant: here a row of %s depends on the rows of its sequence beside it: "
            "there are no drafts",
            context.model.description,
        )
    return Invariance(min(GRID, context.n_ubatch), widths, drafted)


class Probe:
    """A context whose streams hold the same `N_BEFORE` tokens, and rows that are tried behind
    these."""

    def __init__(self, context: Context) -> None:
        self.context = context
        n_tokens = N_BEFORE + max(ROWS_EACH)
        vocabulary = np.linspace(0, context.model.n_vocab - 1, n_tokens + 2)
        self._tokens = vocabulary.astype(int)[1:-1].tolist()
        self._batch = batch = Batch(max(context.n_batch, context.n_seq_max))
        self._n_held = 1  # streams
        for first in range(0, N_BEFORE, context.n_ubatch):
            batch.clear()
            batch.extend(self._tokens[first : min(first + context.n_ubatch, N_BEFORE)], first, 0)
            context.decode(batch)

    def rows(self, width: int, each: int = 1, at: int = 0) -> Bits:
        """The logits of `each` tokens, those from number `at` behind the ones that are held, in
        each of the first `width` streams, by one call: shape (width, each, n_vocab)."""
        context, batch = self.context, self._batch
        for seq in range(self._n_held, width):
            context.memory.seq_cp(0, seq)
        self._n_held = max(self._n_held, width)
        batch.clear()
        for seq in range(width):
            for pos in range(N_BEFORE + at, N_BEFORE + at + each):
                batch.add(self._tokens[pos], pos, seq, logits=True)
        context.decode(batch)
        bits: Bits = context.logits_all().view(np.uint32)
        return bits.reshape(width, each, -1)

    def forget(self) -> None:
        """What was tried."""
        for seq in range(self._n_held):
            self.context.memory.seq_rm(seq, N_BEFORE)

    def row_bits(self, width: int) -> Bits | None:
        """Of one token in each of the first `width` streams; None when not all rows have the
        same."""
        rows = self.rows(width)[:, 0]
        bits = rows[0].copy() if (rows == rows[0]).all() else None
        self.forget()
        return bits


def equal_drafts(probe: Probe, widths: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """By width, how many rows of each sequence one call may have so that every row has the logits,
    bit by bit, that it has where they decode one by one. With experts, all that were tried or
    none."""
    context, most = probe.context, widths[-1]
    alone = np.stack([probe.rows(most, at=i)[0, 0].copy() for i in range(max(ROWS_EACH))])
    probe.forget()
    room = min(context.n_outputs_max, context.n_ubatch)
    found: dict[int, tuple[int, ...]] = {}
    n_tried = 0
    for width in widths:
        equal: list[int] = []
        for each in ROWS_EACH:
            if width * each > room:
                continue
            n_tried += 1
            if (probe.rows(width, each) == alone[:each]).all():
                equal.append(each)
            probe.forget()
        found[width] = tuple(equal)
    if _has_experts(context.model) and sum(map(len, found.values())) < n_tried:
        return {}
    return found


def equal_widths(probe: Probe, n_seq_max: int) -> tuple[int, ...]:
    """Numbers of rows that give every row the same logits, bit by bit, ascending; the last one is
    at least `n_seq_max`. Empty when there are none. With experts, all that were tried or none: how
    many rows an expert has is for the rows to say."""
    context, least = probe.context, max(LEAST_ROWS, n_seq_max)
    found = {width: probe.row_bits(width) for width in tried(least)}
    most = least
    while found[most] is None and most < context.n_seq_max:
        most += 1
        found[most] = probe.row_bits(most)
    wanted = found[most]
    if wanted is None:
        return ()
    equal = [w for w, bits in found.items() if bits is not None and (bits == wanted).all()]
    if _has_experts(context.model) and len(equal) < len(found):
        return ()
    return tuple(sorted(equal))


def _has_experts(model: Model) -> bool:
    return int(model.metadata.get(f"{model.architecture}.expert_count", 0)) > 0
