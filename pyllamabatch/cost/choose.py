"""The cost model that suits a context."""

from __future__ import annotations

import logging
from dataclasses import replace

from pyllamabatch.cost import apple, where
from pyllamabatch.cost.fit import LEAST_SAMPLES
from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.model import CostModel
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
    model = context.model
    experts = where.experts_of(model)
    kind, has = where.file_type(model), where.cpu_features()
    known = kernels(key.backend, kind, moe=experts.n > 0, features=has, device=key.device)
    gpu = not key.backend.startswith("CPU")
    rate = apple.read_rate(key.device) if gpu else None
    n_bytes = model.size_bytes
    return CostModel.prior(
        known, n_bytes, n_ubatch, gpu=gpu, unified=unified, rate=rate, experts=experts
    )
