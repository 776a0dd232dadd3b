"""How much comes, measured by what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..errors import ArgumentError
from ..scheduler import Policy
from .formats import at_rate
from .replica import Machine
from .simulate import simulate
from .workload import Request


def at_load(
    requests: Sequence[Request], machine: Machine, policy: str | Callable[[], Policy], load: float
) -> list[Request]:
    """Their arrivals stretched so that `load` of what the machine can do comes: of the requests a
    second that it ends when all are there from the start."""
    if not 0 < load < 100:
        raise ArgumentError("load", load, "a share of what the machine can do, 0.6 say")
    if any(request.after is not None for request in requests):
        raise ArgumentError("load", load, "arrivals of a trace without sessions")
    at_once = [replace(request, arrival=0.0) for request in requests]
    figures = simulate(at_once, machine, policy).summary()
    return at_rate(list(requests), load * figures["requests_per_s"])
