"""The layout and the context of an engine on a profile machine."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError, UnsupportedOperation
from ..llama.model import Model
from ..machine.context import MachineContext
from ..machine.profile_machine import ProfileMachine
from ..models import default_model_path
from .layout import LEAST_STREAM_CELLS, N_CTX_AT_LEAST, STREAM_CELLS, Layout, n_copies
from .options import EngineOptions


def vocabulary() -> Model:
    """The embedded model's, of which nothing else is loaded."""
    return Model(default_model_path(), vocab_only=True)


def make_context(
    machine: ProfileMachine, model: Model, options: EngineOptions, params: dict[str, Any]
) -> tuple[MachineContext, Layout]:
    """As `layout.make_context`. The machine's memory has no end."""
    if options.loras:
        raise UnsupportedOperation("a profile machine has no weights that an adapter could change")
    n_ctx, n_batch = params.pop("n_ctx"), params.pop("n_batch")
    unified = params.pop("kv_unified")
    layout = choose_layout(
        machine, options.n_seq_max, n_ctx, unified, n_batch if options.prefix_cache else 0
    )
    each = layout.n_ctx if layout.unified else layout.n_ctx // options.n_seq_max
    n_slots = options.n_seq_max + layout.n_cached
    context = MachineContext(
        machine,
        model,
        n_ctx=each if layout.unified else each * n_slots,
        n_seq_max=n_slots,
        kv_unified=layout.unified,
        n_batch=min(n_batch, layout.pool or layout.n_ctx),
        n_logprobs_max=options.n_logprobs_max,
        **params,
    )
    return context, layout


def choose_layout(
    machine: ProfileMachine, n_seq_max: int, n_ctx: int, given: Any, n_batch: int
) -> Layout:
    """As `layout.choose_layout`. n_batch: 0 without a prefix cache."""
    if given not in (True, False, "auto"):
        raise ArgumentError("kv_unified", given, 'True (a pool), False (streams) or "auto"')
    pool = n_ctx or max(N_CTX_AT_LEAST, n_seq_max * STREAM_CELLS)
    each = -(-(n_ctx // n_seq_max or STREAM_CELLS) // 256) * 256
    why = ""
    if given != "auto":
        why = "as was asked for"
    elif n_seq_max == 1:
        why, given = "one sequence runs at a time", True
    elif n_ctx and n_ctx // n_seq_max < LEAST_STREAM_CELLS:
        why, given = f"a stream would have {n_ctx // n_seq_max} cells", True
    elif not machine.has(unified=False):
        why, given = "the machine's profile has no streams", True
    if given is True:
        return Layout(True, pool, n_copies(n_seq_max, n_batch, unified=True), why)
    why = why or f"{each} cells for each of {n_seq_max} sequences"
    copies = n_copies(n_seq_max, n_batch, unified=False)
    return Layout(False, each * n_seq_max, copies, why, pool if given == "auto" else 0)
