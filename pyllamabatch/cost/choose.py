"""The cost model that suits a context."""

import logging
from dataclasses import replace

from pyllamabatch.cost import where
from pyllamabatch.cost.fit import LEAST_SAMPLES
from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.prior import Sizes, in_turn, speeds_of
from pyllamabatch.cost.profile import find_profile
from pyllamabatch.llama.context import Context

log = logging.getLogger(__name__)


def cost_of(context: Context, *, unified: bool) -> CostModel:
    """A fit of the stored profile that matches the context's device, model and parameters best.
    Without a profile, or with one that lacks a kind of step, a prior (`calibrated` is False).
    unified: the cells are in one pool."""
    key, n_ubatch = where.key_of(context), context.n_ubatch
    profile = find_profile(key)
    if profile is not None and (lacking := profile.lacks(unified=unified)):
        log.warning("the profile is not used, it lacks %s", " and ".join(lacking))
    elif profile is not None and len(profile.samples) >= LEAST_SAMPLES:
        if profile.key.distance(key):
            log.info("the profile was measured with %s", dict(profile.key.context))
        profile = replace(profile, n_swa=context.model.n_swa)  # an older one does not know it
        swa_full = bool(context.params["swa_full"])
        return CostModel.fit(profile, unified=unified, n_ubatch=n_ubatch, swa_full=swa_full)
    model, backend = context.model, key.backend
    experts = where.experts_of(model)
    kind, has = where.file_type(model), where.cpu_features()
    known = kernels(backend, kind, moe=experts.n > 0, features=has, device=key.device)
    n_output = model.n_vocab * model.n_embd
    sizes = Sizes(model.size_bytes, model.n_params, n_output, model.n_layer, experts)
    shares = where.shares_of(context)
    speeds = speeds_of(backend, key.device, kind=shares.device.kind, n_threads=context.n_threads)
    if not backend.startswith("CPU"):
        cpu = speeds_of("CPU", "", kind="cpu", n_threads=context.n_threads)
        speeds = in_turn(speeds, cpu, shares.on_cpu)
    return CostModel.prior(known, sizes, speeds, n_ubatch, unified=unified)
