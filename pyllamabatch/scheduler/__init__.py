"""The scheduler and its policies: pure Python, no model needed."""

from .gather import CostWindow, ExpectedSequence, Gather, Gathering, Window
from .policies import make_policy, policy_names
from .policies.device_aware import device_aware
from .policies.fair import fair
from .policies.fcfs import fcfs
from .policies.mlfq import mlfq
from .policies.prefill_first import prefill_first
from .policies.prefix import prefix
from .policies.sarathi import sarathi
from .policies.shortest import shortest
from .policies.slo import slo
from .policies.static import static
from .policies.tile_fill import tile_fill
from .policies.width import width
from .policy import ComposedPolicy, Decodes, PlanBuilder, Policy, Round, Verdict, Width
from .queue import SequenceList
from .rules import RULES
from .scheduler import Scheduler
from .step import Counters, PromptChunk, Step
from .tenants import Tenants
from .view import Limits, Plan, SequenceView, StepView

__all__ = [
    "RULES",
    "ComposedPolicy",
    "CostWindow",
    "Counters",
    "Decodes",
    "ExpectedSequence",
    "Gather",
    "Gathering",
    "Limits",
    "Plan",
    "PlanBuilder",
    "Policy",
    "PromptChunk",
    "Round",
    "Scheduler",
    "SequenceList",
    "SequenceView",
    "Step",
    "StepView",
    "Tenants",
    "Verdict",
    "Width",
    "Window",
    "device_aware",
    "fair",
    "fcfs",
    "make_policy",
    "mlfq",
    "policy_names",
    "prefill_first",
    "prefix",
    "sarathi",
    "shortest",
    "slo",
    "static",
    "tile_fill",
    "width",
]
