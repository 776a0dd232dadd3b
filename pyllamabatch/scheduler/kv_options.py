"""How sequences share and keep KV cells: what a scheduler is told of it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..kv import Sharing, SwapChoice
from .invariance import Invariance
from .view import Limits


class Pool(NamedTuple):
    """What the streams of a context become when a sequence needs more cells than one has; and what
    there is to go back to."""

    limits: Limits
    sharing: Sharing


@dataclass(frozen=True, slots=True)
class KvOptions:
    """`sharing`: what sequences can take over from each other, default nothing. `retain`: what
    sequences leave behind stays cached, for others that begin in the same way. `swap`: what becomes
    of the preempted, default recompute. `pool`: see `Pool`, with as many slots as the streams;
    without it a sequence has no more cells than a stream. `invariance`: see there; only for
    streams, and with its `grid` that of `sharing`."""

    sharing: Sharing = field(default_factory=Sharing)
    retain: bool = True
    swap: SwapChoice = field(default_factory=lambda: SwapChoice("recompute"))
    pool: Pool | None = None
    invariance: Invariance | None = None

    def __post_init__(self) -> None:
        grid = 1 if self.invariance is None else self.invariance.grid
        if grid != self.sharing.grid:
            raise ValueError(f"prefixes on a grid of {self.sharing.grid}, prompts on one of {grid}")
        if self.invariance is not None and self.pool is not None:
            raise ValueError("a pool of cells is not batch-invariant")
