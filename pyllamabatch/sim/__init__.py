"""The simulator: the engine's own scheduler, accounting, prefix tree and policies under a clock
that is
a number, with a cost model in the place of the device."""

from __future__ import annotations

from .formats import load_trace
from .metrics import Histogram, Load, Outcome, parse_slo, summarise
from .replica import Machine, Replica
from .router import ROUTERS, LeastOutstanding, PrefixAffinity, RoundRobin, Router, make_router
from .simulate import Simulated, SimulationStuck, simulate
from .workload import DRAWN, Lengths, Request, draw

__all__ = [
    "DRAWN",
    "ROUTERS",
    "Histogram",
    "LeastOutstanding",
    "Lengths",
    "Load",
    "Machine",
    "Outcome",
    "PrefixAffinity",
    "Replica",
    "Request",
    "RoundRobin",
    "Router",
    "Simulated",
    "SimulationStuck",
    "draw",
    "load_trace",
    "make_router",
    "parse_slo",
    "simulate",
    "summarise",
]
