"""The layout and the context of an engine on a profile machine."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedOperation
from ..llama.host import PathLike
from ..llama.model import Model
from ..machine.context import MachineContext
from ..machine.profile_machine import ProfileMachine
from ..models import default_model_path
from .layout import Cells, Layout, lay_out
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
    streams = machine.has(unified=False)
    why = "" if streams else "the machine's profile has no streams"
    layout = lay_out(Cells(N_CTX_TRAIN, pool_only=why), options, params)
    return MachineContext(machine, model, **params), layout
