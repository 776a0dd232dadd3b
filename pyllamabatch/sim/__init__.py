"""The simulator: an engine's own scheduler, KV accounting and policies in virtual time, with a cost
model in the place of the device."""

from pyllamabatch.sim.formats import load_acceptance, load_trace
from pyllamabatch.sim.metrics import Histogram, Load, Outcome, parse_slo, summarise
from pyllamabatch.sim.replica import EngineSpec
from pyllamabatch.sim.simulate import Simulated, SimulationStuck, at_load, simulate
from pyllamabatch.sim.workload import TraceRequest, acceptance_of, draw, draw_acceptance

__all__ = [
    "EngineSpec", "Histogram", "Load", "Outcome", "Simulated", "SimulationStuck",
    "TraceRequest", "acceptance_of", "at_load", "draw", "draw_acceptance", "load_acceptance",
    "load_trace", "parse_slo", "simulate", "summarise",
]  # fmt: skip
