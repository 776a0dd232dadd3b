"""The parts of an engine, by its options: a context, the stepper on it, and the scheduler."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

from ..cost.model import CostModel
from ..llama.host import PathLike
from ..llama.lora import Loras
from ..llama.memory import copies_whole_only
from ..llama.model import Model
from ..scheduler import ComposedPolicy, Invariance, KvOptions, Scheduler
from ..scheduler.policies.speculate import ByGain
from . import on_machine
from .draft_feeds import LoadedDraft, feed_of, load_draft
from .drafters import Mtp, Ngram
from .invariance import swaps
from .kv_config import limits_of, pool_of, sharing_of
from .layout import Layout, make_context, n_draft_max
from .options import EngineOptions
from .protocols import Device, EngineContext

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """`device` closes all of them."""

    context: EngineContext
    layout: Layout
    scheduler: Scheduler
    adapters: Loras
    device: Device


def assemble(
    model: Model | None,
    options: EngineOptions,
    context_params: dict[str, Any],
    machine: PathLike | None,
) -> Parts:
    """`context_params`: see `layout.make_context`. `machine`: a profile's name or file, or None for
    this machine, which needs a model. Raises as `Engine`, and nothing is left open."""
    context: EngineContext
    if options.speculate == "auto":
        drafts = _may_draft(model, options, machine)
        options, why = replace(options, speculate="ngram" if drafts else None), ""
    else:
        options, why = _with_drafts(options)
    with ExitStack() as undo:
        draft = None
        if machine is None:
            if isinstance(model, Model):
                draft = load_draft(options.drafter, model)
            if draft is not None:
                undo.callback(draft.close)
            context, layout = make_context(cast("Model", model), options, context_params, draft)
        else:
            context, layout = on_machine.make_context(machine, model, options, context_params)
        undo.callback(context.close)
        if why:
            layout = replace(layout, reasons={**layout.reasons, "speculate": why})
        parts = _parts(context, layout, options, draft)
        undo.pop_all()
    return parts


def _may_draft(model: Model | None, options: EngineOptions, machine: PathLike | None) -> bool:
    """Whether an engine drafts without being asked: it can take tokens back, its rows may differ in
    their last bits, and a policy decides by a cost model whether that pays."""
    decides = options.policy is None or getattr(options.policy, "speculate", None) is not None
    takes_back = isinstance(model, Model) and not copies_whole_only(model)
    exact = bool(options.batch_invariant) or machine is not None
    return takes_back and decides and options.cost is not None and not exact


def _with_drafts(options: EngineOptions) -> tuple[EngineOptions, str]:
    """And why there are no drafts, though they were asked for."""
    policy = options.policy
    by_gain = policy is None or (
        isinstance(policy, ComposedPolicy) and isinstance(policy.speculate, ByGain | None)
    )
    if options.drafter is not None and by_gain and options.cost is None:
        why = "off: without a cost model nothing says whether drafts pay"
        log.warning("speculate is %s", why)
        return replace(options, speculate=None), why
    return options, ""


def _parts(
    context: EngineContext, layout: Layout, options: EngineOptions, draft: LoadedDraft | None
) -> Parts:
    invariance = None
    if options.batch_invariant:
        nearly = options.batch_invariant == "nearly"
        drafts = options.speculate is not None
        invariance = context.find_invariance(options.n_seq_max, nearly=nearly, drafts=drafts)
    cost = make_cost(context, options)
    scheduler = make_scheduler(context, layout, options, cost, invariance)
    ngram = options.drafter if isinstance(options.drafter, Ngram) else None
    stepper: Any = context.stepper(
        n_logprobs_max=options.n_logprobs_max,
        device_sampling=options.device_sampling,
        n_draft_max=n_draft_max(options, context.capabilities),
        drafter="ngram" if ngram else None,
        n_corpus=ngram.corpus if ngram else 0,
    )
    adapters = Loras(context.model, options.loras, context.set_loras)
    cells = min(max(layout.n_ctx, layout.pool), context.n_ctx)
    feed = feed_of(options.drafter, draft, stepper, cells, context.params)

    def renewed(seconds: float) -> None:
        scheduler.renewed(make_cost(context, options), seconds)

    def close() -> None:
        feed.close()
        stepper.close()
        context.close()
        adapters.close()

    threads = None if invariance is not None else context.thread_watch()
    device = Device(
        stepper, context.memory, context, adapters, close, renewed, context.asynchronous, feed,
        threads,
    )  # fmt: skip
    return Parts(context, layout, scheduler, adapters, device)


def make_cost(context: EngineContext, options: EngineOptions) -> CostModel | None:
    cost = context.cost() if options.cost == "auto" else options.cost
    if cost is not None:
        if not context.rebuilds_for_others(options.device_sampling):
            cost.switch = 0.0
        elif not cost.switch:
            cost.switch = None  # it was not measured: it will show
    return cost


def make_scheduler(
    context: EngineContext,
    layout: Layout,
    options: EngineOptions,
    cost: CostModel | None,
    invariance: Invariance | None,
) -> Scheduler:
    n_draft, n_seq_max = n_draft_max(options, context.capabilities), options.n_seq_max
    limits = limits_of(context, n_seq_max, n_draft, invariance)
    pool = pool_of(context, n_seq_max, layout.pool, n_draft) if layout.pool else None
    if n_draft:
        how: dict[str, Any] = {
            "drafts_take_time": not isinstance(options.drafter, Ngram),
            "behind": limits.behind and not isinstance(options.drafter, Mtp),
        }
        limits = replace(limits, **how)
        pool = pool and pool._replace(limits=replace(pool.limits, **how))
    mode = options.preemption
    if invariance is not None:
        mode = "swap" if swaps(mode, context.capabilities.swa_window) else "recompute"
    return Scheduler(
        limits,
        options.policy,
        gather=options.gather,
        patience=options.patience,
        cost=cost,
        kv=KvOptions(
            sharing_of(context, options.n_seq_max, invariance),
            options.prefix_cache,
            context.swap_choice(mode),
            pool,
            invariance,
        ),
    )
