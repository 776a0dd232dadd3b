"""Layout: how the KV cells of an engine's context are divided, and the context itself.

In *streams* every sequence has cells of its own: a row attends to its own sequence alone, and the
same tokens come whichever others are computed beside it. In a *pool* all sequences draw from the
same cells: one may be as long as all of them, prefixes are shared without a copy, and every row
looks over the cells of all. Streams are the default where their cells suffice, unless a pool is
faster on the device (`layout_cost`), and become a pool when a sequence needs more than one has."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from ..errors import ArgumentError, NotEnoughMemory, UnsupportedOperation, integer
from ..llama.host import host_available
from ..llama.limits import cell_bytes
from ..llama.memory import Capabilities, copies_whole_only
from ..llama.model import Model
from ..llama.params import fill, read
from ..planner.residency import device_free, fitting_n_ctx, why_not_back
from ..raw import lib
from ..scheduler.invariance import LEAST_ROWS
from .context_defaults import ubatch_of, why_batch
from .draft_feeds import LoadedDraft
from .invariance import check_can, swaps
from .layout_cost import CostOf, pool_pays, pool_speed
from .native_context import NativeContext
from .options import EngineOptions

MOST_STATES = 8  # slots for cached recurrent states: each takes the memory of a whole one
DRAFT_MOST = 16  # drafted tokens of a sequence in a step
SNAPSHOTS = 4  # the same where each takes a snapshot of a recurrent state; or as n_rs_seq says
MOST_DRAFT_ROWS = 64  # of a step
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
    needs more than a stream has; 0: they stay streams. reasons: of other parameters, by name."""

    unified: bool
    n_ctx: int
    n_cached: int
    why: str
    pool: int = 0
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{'one pool of cells' if self.unified else 'a stream of cells each'}: {self.why}"


@dataclass(frozen=True, slots=True)
class Cells:
    """What a layout is chosen by. n_ctx_train: of the model. room: cells that streams may take
    where no number was asked for. pool_only: why there can be no streams. n_cached: prefixes that a
    pool can cache at most."""

    n_ctx_train: int
    room: float = inf
    pool_only: str = ""
    n_cached: float = inf


def cells_of(
    model: Model, n_seq_max: int, params: dict[str, Any], draft: LoadedDraft | None
) -> Cells:
    """On this machine, for a context with these parameters, and that of a draft model."""
    n_ctx_train = model.n_ctx_train
    if copies_whole_only(model):
        why = "a recurrent state has one size, however long its text is"
        return Cells(n_ctx_train, 0, why, min(n_seq_max, MOST_STATES))
    each = bytes_of_cell(model, params)
    if draft is not None and not draft.n_ctx:
        each += draft.layers * bytes_of_cell(draft.model, {})
    room = MEMORY_SHARE * free_memory(model) / each
    if model.n_swa and not params.get("swa_full", True):
        return Cells(n_ctx_train, room, n_cached=0)  # a request goes on in the slot of its prefix
    return Cells(n_ctx_train, room)


def choose_layout(cells: Cells, options: EngineOptions, params: dict[str, Any]) -> Layout:
    """`params`: of the context; its "n_ctx" cells are for all sequences that run at once (0: a
    choice of ours), its "kv_unified" is True, False or "auto". ArgumentError for another one."""
    n_seq_max, n_ctx, given = options.n_seq_max, params["n_ctx"], params["kv_unified"]
    n_batch = params["n_batch"] if options.prefix_cache else 0
    if not isinstance(given, bool) and given != "auto":
        raise ArgumentError("kv_unified", given, 'True (a pool), False (streams) or "auto"')
    trained = cells.n_ctx_train
    pool_cells = n_ctx or min(trained * n_seq_max, max(trained, N_CTX_AT_LEAST))
    stream_cells = max(n_ctx // n_seq_max, 1) if n_ctx else min(trained, STREAM_CELLS)
    copies = n_copies(n_seq_max, n_batch, unified=False)
    invariant = options.batch_invariant
    if invariant:
        check_can(params, n_seq_max)
        if cells.pool_only:
            raise UnsupportedOperation(f"batch_invariant takes streams of cells: {cells.pool_only}")
        copies = max(copies, LEAST_ROWS - n_seq_max)

    def pool(why: str) -> Layout:
        n_cached = min(n_copies(n_seq_max, n_batch, unified=True), cells.n_cached)
        return Layout(True, pool_cells, int(n_cached), why)

    if given is True:
        return pool("as was asked for")
    if given is False:
        return Layout(False, stream_cells * n_seq_max, copies, "as was asked for")
    if cells.pool_only:
        return pool(cells.pool_only)
    if n_seq_max == 1 and not invariant:
        return pool("one sequence runs at a time")
    least = min(trained, LEAST_STREAM_CELLS)
    if n_ctx == 0:
        while stream_cells > least and stream_cells * (n_seq_max + copies) > cells.room:
            stream_cells //= 2
        if stream_cells * (n_seq_max + copies) > cells.room and not invariant:
            return pool(f"streams would take more than {MEMORY_SHARE:.0%} of the free memory")
    if stream_cells < least and not invariant:
        return pool(f"a stream would have {stream_cells} cells")
    why = f"{stream_cells} cells for each of {n_seq_max} sequences"
    if invariant:
        why += ", as batch_invariant needs"
    return Layout(False, stream_cells * n_seq_max, copies, why, 0 if invariant else pool_cells)


def lay_out(cells: Cells, options: EngineOptions, params: dict[str, Any]) -> Layout:
    """The layout; and `params` becomes what a context with it is made with."""
    layout = choose_layout(cells, options, params)
    n_seq_max, n_cells = options.n_seq_max, _padded(layout.n_ctx)
    n_slots = n_seq_max + layout.n_cached
    if not layout.unified:
        each = _padded(-(-layout.n_ctx // n_seq_max))
        n_cells = each * n_slots
        pool = _padded(layout.pool if params["n_ctx"] else min(layout.pool, n_cells))
        layout = replace(layout, pool=pool if pool > each else 0)
    params |= {"n_ctx": n_cells, "n_seq_max": n_slots, "kv_unified": layout.unified}
    params["n_batch"] = min(params["n_batch"], layout.pool or n_cells)
    return layout


def _padded(n_cells: int) -> int:
    """As libllama gives them to a stream and to a pool."""
    return -(-n_cells // 256) * 256


def n_draft_max(options: EngineOptions, can: Capabilities) -> int:
    """Drafted tokens of a sequence in a step. Those that are rejected must be taken back."""
    if options.speculate is None:
        return 0
    return DRAFT_MOST if can.partial_removal else min(DRAFT_MOST, can.max_rollback)


def most_draft_rows(n_seq_max: int, n_draft_max: int = DRAFT_MOST) -> int:
    """Rows of drafted tokens in a step: each takes a row of logits."""
    return min(MOST_DRAFT_ROWS, n_draft_max * n_seq_max)


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


def free_memory(model: Model) -> int:
    """Bytes that a context may take: of the devices, or of the host where none computes."""
    return device_free(model) or host_available()


def with_speed(layout: Layout, cost_of: CostOf, n_seq_max: int) -> tuple[Layout, bool]:
    """`layout`, streams that may become a pool, with the speeds of both in its reason; and whether
    a pool is to take its place from the start."""
    speed = pool_speed(cost_of, n_seq_max)
    if speed is None:
        return layout, False
    if pool_pays(speed):
        why = f"{speed:.2f} times as fast as streams by the profile of this device"
        return replace(layout, unified=True, n_ctx=layout.pool, pool=0, why=why), True
    why = f"{layout.why}, {1 / speed:.2f} times as fast as a pool by the profile of this device"
    return replace(layout, why=why), False


def _open(
    model: Model, options: EngineOptions, params: dict[str, Any], draft: LoadedDraft | None
) -> tuple[NativeContext, Layout]:
    """The context as `params` ask for it; without all cells of a sliding window where these do not
    fit, and they do not say that they want them."""
    reasons: dict[str, str] = {}
    if model.n_swa:
        fits = "on: all cells of the layers with a sliding window fit, as cached prefixes need them"
        reasons["swa_full"] = "as was asked for" if "swa_full" in params else fits
    try:
        n_ctx, given, layout = _fitting(model, options, params, draft)
    except NotEnoughMemory:
        if not model.n_swa or "swa_full" in params:
            raise
        n_ctx, given, layout = _fitting(model, options, params | {"swa_full": False}, draft)
        reasons["swa_full"] = "off: all cells of the layers with a sliding window do not fit"
    rows = ubatch_of(model, params["n_ubatch"])
    reasons["n_ubatch"] = rows.why
    reasons["n_batch"] = why_batch(params["n_batch"], given["n_batch"])
    if given.get("n_rs_seq"):
        reasons["n_rs_seq"] = "a snapshot of each state for each token that can be taken back"
    n_outputs = _n_outputs(model, options, given)
    outputs = {"n_outputs_max": n_outputs, "n_outputs_max_per_seq": _n_outputs_per_seq(options)}
    context = NativeContext(model, n_ctx=n_ctx, **(given | outputs))
    return context, replace(layout, reasons=reasons)


def _fitting(
    model: Model, options: EngineOptions, params: dict[str, Any], draft: LoadedDraft | None
) -> tuple[int, dict[str, Any], Layout]:
    """n_ctx that fits, the other parameters of the context, and the layout."""
    given = params | {"n_ubatch": ubatch_of(model, params["n_ubatch"]).value}
    layout = lay_out(cells_of(model, options.n_seq_max, given, draft), options, given)
    if options.speculate is not None and copies_whole_only(model):
        _check_rollback(model, options, layout)
        given["n_rs_seq"] = _snapshots(given)
    how: dict[str, Any] = {
        "shrink": params["n_ctx"] == 0,
        "n_outputs": _n_outputs(model, options, given),
        "beside": draft and draft.context(given["n_seq_max"]),
    }
    return fitting_n_ctx(model, given.pop("n_ctx"), **how, **given), given, layout


def _check_rollback(model: Model, options: EngineOptions, layout: Layout) -> None:
    """UnsupportedOperation where drafted tokens can't be taken back from a recurrent state."""
    refused = f"speculate={str(options.drafter)!r}: {model.architecture} keeps a recurrent state"
    if not layout.unified:
        limit = "drafted tokens are taken back from it in a pool of cells only"
        raise UnsupportedOperation(f"{refused}, and {limit}: kv_unified=True")
    if why := why_not_back(model):
        raise UnsupportedOperation(f"{refused}, from which drafts can't be taken back: {why}")


def _snapshots(given: dict[str, Any]) -> int:
    """Of each state: `n_rs_seq`. A ubatch must hold a row of each and more (`check_params`)."""
    n_ubatch = min(int(given["n_batch"]), int(given["n_ubatch"] or given["n_batch"]))
    if n_ubatch < 3:
        limit = "3 or more, for drafts of a model with a recurrent state"
        raise ArgumentError("n_ubatch", n_ubatch, limit)
    if "n_rs_seq" not in given:
        return min(SNAPSHOTS, n_ubatch - 2)
    return integer("n_rs_seq", given["n_rs_seq"], 1, n_ubatch - 2)


def _n_outputs(model: Model, options: EngineOptions, given: dict[str, Any]) -> int:
    """Rows of logits of a step."""
    n = int(given["n_seq_max"])
    if options.speculate is not None:
        each = given["n_rs_seq"] if copies_whole_only(model) else DRAFT_MOST
        n += most_draft_rows(options.n_seq_max, min(DRAFT_MOST, each))
    return min(n, int(given["n_batch"]))


def _n_outputs_per_seq(options: EngineOptions) -> int:
    """Rows of logits of a sequence: with it the device samples those of drafted tokens, too."""
    return 1 if options.speculate is None else 1 + DRAFT_MOST


def make_context(
    model: Model,
    options: EngineOptions,
    params: dict[str, Any],
    draft: LoadedDraft | None = None,
) -> tuple[NativeContext, Layout]:
    """The context of an engine, which leaves room for that of a draft model. `params`: the
    parameters of `Context`, with n_ctx 0 for a choice of ours, and kv_unified "auto". Raises as
    `Engine`."""
    if not isinstance(model, Model):
        raise ArgumentError("model", model, "must be a Model: Engine(Model(path), ...)")
    if model.has_encoder or not model.has_decoder:
        raise UnsupportedOperation(
            f"the engine runs decoder-only models, {model.architecture} has an encoder; "
            "for vectors of texts there is Embedder(model)"
        )
    for name in ("embeddings", "n_outputs_max", "n_outputs_max_per_seq"):
        if params.get(name):
            raise ArgumentError(name, params[name], "the engine sets it itself")
    if options.batch_invariant:
        swaps(options.preemption, model.n_swa)
    context, layout = _open(model, options, params, draft)
    if layout.pool and options.cost == "auto":
        layout, pool = with_speed(layout, context.cost_of, options.n_seq_max)
        if pool:
            context.close()
            context, opened = _open(model, options, params | {"kv_unified": True}, draft)
            layout = replace(layout, reasons=opened.reasons)
    if not context.capabilities.has_memory or not context.capabilities.causal:
        context.close()
        raise UnsupportedOperation(
            f"{model.architecture} does not generate token by token; for vectors of texts there is "
            "Embedder(model)"
        )
    return context, layout
