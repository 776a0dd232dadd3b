"""Layout: how the KV cells of an engine's context are divided, and the context itself.

In *streams* every sequence has cells of its own: a row attends to its own sequence alone, and the
same tokens come whichever others are computed beside it. In a *pool* all sequences draw from the
same cells: one may be as long as all of them, prefixes are shared without a copy, and every row
looks over the cells of all. Streams are the default where their cells suffice, and become a pool
when a sequence needs more than one has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import ArgumentError, UnsupportedOperation
from ..llama.context import Context
from ..llama.host import host_available
from ..llama.limits import cell_bytes
from ..llama.memory import copies_whole_only
from ..llama.model import Model
from ..llama.params import fill, read
from ..planner.residency import device_free, fitting_n_ctx
from ..raw import lib
from .options import EngineOptions

MOST_STATES = 8  # slots for cached recurrent states: each takes the memory of a whole one
LEAST_CACHED = 16  # slots for prefixes cached in shared cells: they cost a row of logits each
LEAST_COPIES, STREAMS_A_COPY = 2, 4  # streams for what is cached: one to so many that run

STREAM_CELLS = 2048  # of a stream, where the model was trained with so many and memory has room
LEAST_STREAM_CELLS = 512  # fewer are of little use
MEMORY_SHARE = 1 / 4  # of what is free, for streams that were not asked for
N_CTX_AT_LEAST = 16384  # of the default pool, for models that were trained with less


@dataclass(frozen=True, slots=True)
class Layout:
    """n_ctx: cells of the sequences that run. n_cached: slots beyond theirs, for cached prefixes.
    why: the reason for this layout. pool: cells of the pool that streams become when a sequence
    needs more than a stream has; 0: they stay streams."""

    unified: bool
    n_ctx: int
    n_cached: int
    why: str
    pool: int = 0

    def __str__(self) -> str:
        return f"{'one pool of cells' if self.unified else 'a stream of cells each'}: {self.why}"


def choose_layout(
    model: Model, n_seq_max: int, n_ctx: int, *, prefix_cache: bool, params: dict[str, Any]
) -> Layout:
    """For `n_seq_max` sequences that run at once, with `n_ctx` cells for all of them (0: a choice
    of ours). `params`: of the context; its "kv_unified" is True, False or "auto". ArgumentError
    for another one."""
    given = params.get("kv_unified", "auto")
    if given not in (True, False, "auto"):
        raise ArgumentError("kv_unified", given, 'True (a pool), False (streams) or "auto"')
    n_batch = params["n_batch"] if prefix_cache else 0
    pool_cells = n_ctx or min(model.n_ctx_train * n_seq_max, max(model.n_ctx_train, N_CTX_AT_LEAST))
    stream_cells = n_ctx // n_seq_max or min(model.n_ctx_train, STREAM_CELLS)
    copies = n_copies(n_seq_max, n_batch, unified=False)

    def pool(why: str) -> Layout:
        n_cached = n_copies(n_seq_max, n_batch, unified=True)
        if copies_whole_only(model):
            n_cached = min(n_cached, n_seq_max, MOST_STATES)
        elif model.n_swa and not params.get("swa_full", True):
            n_cached = 0  # a request goes on in the slot of the one that it continues
        return Layout(True, pool_cells, n_cached, why)

    if given is True:
        return pool("as was asked for")
    if given is False:
        return Layout(False, stream_cells * n_seq_max, copies, "as was asked for")
    if copies_whole_only(model):
        return pool("a recurrent state has one size, however long its text is")
    if n_seq_max == 1:
        return pool("one sequence runs at a time")
    least = min(model.n_ctx_train, LEAST_STREAM_CELLS)
    if n_ctx == 0:
        room = MEMORY_SHARE * free_memory() / bytes_of_cell(model, params)
        while stream_cells > least and stream_cells * (n_seq_max + copies) > room:
            stream_cells //= 2
        if stream_cells * (n_seq_max + copies) > room:
            return pool(f"streams would take more than {MEMORY_SHARE:.0%} of the free memory")
    if stream_cells < least:
        return pool(f"a stream would have {stream_cells} cells")
    why = f"{stream_cells} cells for each of {n_seq_max} sequences"
    return Layout(False, stream_cells * n_seq_max, copies, why, pool_cells)


def n_copies(n_seq_max: int, n_batch: int, *, unified: bool) -> int:
    """Slots for cached prefixes, beside those of `n_seq_max` sequences that run. A batch must hold
    a row of each slot."""
    beside = max(LEAST_COPIES, -(-n_seq_max // STREAMS_A_COPY))
    wanted = max(n_seq_max, LEAST_CACHED) if unified else beside
    return max(0, min(wanted, min(256, n_batch) - n_seq_max))


def bytes_of_cell(model: Model, params: dict[str, Any]) -> float:
    native = lib.llama_context_default_params()
    fill(native, {k: v for k, v in params.items() if k in ("type_k", "type_v")}, frozenset())
    return cell_bytes(model, read(native))


def free_memory() -> int:
    """Bytes that a context may take: of the devices, or of the host where there is none."""
    return device_free() or host_available()


def make_context(
    model: Model, options: EngineOptions, params: dict[str, Any]
) -> tuple[Context, Layout]:
    """The context of an engine. `params`: the parameters of `Context`, with n_ctx 0 for a choice of
    ours, and kv_unified "auto". Raises as `Engine`."""
    if not isinstance(model, Model):
        raise ArgumentError("model", model, "must be a Model: Engine(Model(path), ...)")
    if model.has_encoder or not model.has_decoder:
        raise UnsupportedOperation(
            f"the engine runs decoder-only models, {model.architecture} has an encoder"
        )
    for name in ("embeddings", "n_outputs_max"):
        if params.get(name):
            raise ArgumentError(name, params[name], "the engine sets it itself")
    n_ctx = params.pop("n_ctx")
    layout = choose_layout(
        model, options.n_seq_max, n_ctx, prefix_cache=options.prefix_cache, params=params
    )
    n_seq_max, n_slots = options.n_seq_max, options.n_seq_max + layout.n_cached
    cells = layout.n_ctx
    if not layout.unified:  # libllama gives each stream a multiple of so many
        each = -(-layout.n_ctx // n_seq_max // 256) * 256
        cells = each * n_slots
        pool = min(layout.pool, each * n_slots) if n_ctx == 0 else layout.pool
        pool = -(-pool // 256) * 256
        layout = replace(layout, pool=pool if pool > each else 0)
    params |= {"n_seq_max": n_slots, "kv_unified": layout.unified}
    params["n_batch"] = min(params["n_batch"], layout.pool or cells)
    cells = fitting_n_ctx(model, cells, shrink=n_ctx == 0, **params)
    context = Context(model, n_ctx=cells, n_outputs_max=n_slots, **params)
    if not context.capabilities.has_memory or not context.capabilities.causal:
        context.close()
        raise UnsupportedOperation(f"{model.architecture} does not generate token by token")
    return context, layout
