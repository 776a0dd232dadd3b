"""The layout and the context of an engine on a profile machine."""

from dataclasses import replace
from math import inf
from typing import Any

from ..cost.kernels import is_cuda
from ..cost.model import CostModel
from ..cost.profile import Profile
from ..errors import UnsupportedOperation
from ..llama.host import PathLike
from ..llama.model import Model
from ..machine.context import MachineContext
from ..machine.profile_machine import ProfileMachine
from ..models import default_model_path
from .context_defaults import ubatch, why_batch
from .layout import Cells, Layout, lay_out, with_speed
from .options import EngineOptions

N_CTX_TRAIN = 32768  # of a profile's model, which does not say it


def vocabulary() -> Model:
    """The embedded model's, of which nothing else is loaded."""
    return Model(default_model_path(), vocab_only=True)


def make_context(
    name: PathLike, model: Model | None, options: EngineOptions, params: dict[str, Any]
) -> tuple[MachineContext, Layout]:
    """As `layout.make_context`, on the machine of that name. Its memory has no end."""
    if options.loras:
        raise UnsupportedOperation("a profile machine has no weights that an adapter could change")
    model, machine = model or vocabulary(), ProfileMachine.named(name)
    rows = ubatch(params["n_ubatch"], cuda=is_cuda(machine.profile.key.backend), free=inf)
    params["n_ubatch"] = rows.value
    layout, given = lay_out_on(machine.profile, options, params)
    reasons = {"n_ubatch": rows.why, "n_batch": why_batch(params["n_batch"], given["n_batch"])}
    layout = replace(layout, reasons=reasons)
    return MachineContext(machine, model, **given), layout


def lay_out_on(
    profile: Profile, options: EngineOptions, params: dict[str, Any]
) -> tuple[Layout, dict[str, Any]]:
    """The layout where steps take what this profile says, and what of `params` a context with it
    is made with."""
    why = "" if profile.has(unified=False) else "the machine's profile has no streams"
    cells, given = Cells(N_CTX_TRAIN, pool_only=why), dict(params)
    layout = lay_out(cells, options, given)
    if layout.pool and options.cost == "auto":

        def cost_of(unified: bool) -> CostModel:
            return CostModel.fit(profile, unified=unified, n_ubatch=params["n_ubatch"])

        layout, pool = with_speed(layout, cost_of, options.n_seq_max)
        if pool:
            given = params | {"kv_unified": True}
            lay_out(cells, options, given)
    return layout, given
