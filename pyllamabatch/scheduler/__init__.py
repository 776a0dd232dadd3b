"""The scheduler and its policies: pure Python, no model needed."""

from .gather import CostWindow, ExpectedSequence, Gather, Gathering, Window
from .invariance import Invariance
from .kv_options import KvOptions
from .policies import make_policy, policy_names
from .policies.composed import ComposedPolicy
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
from .policies.width import width
from .policy import Mix, PlanBuilder, Policy, Round, Speculation, Verdict, Width
from .queue import SequenceList
from .rules import RULES
from .scheduler import Scheduler
from .step import Counters, PromptChunk, Step
from .view import Drafts, KvView, Limits, Plan, Prefix, Prices, SequenceView, StepView

__all__ = [
    "RULES", "ComposedPolicy", "CostWindow", "Counters", "Drafts", "ExpectedSequence", "Gather",
    "Gathering", "Invariance", "KvOptions", "KvView", "Limits", "Mix", "Plan", "PlanBuilder",
    "Policy", "Prefix", "Prices", "PromptChunk", "Round", "Scheduler", "SequenceList",
    "SequenceView", "Speculation", "Step", "StepView", "Verdict", "Width", "Window", "device_aware",
    "fair", "fcfs", "make_policy", "mlfq", "policy_names", "prefill_first", "prefix", "sarathi",
    "shortest", "slo", "static", "width",
]  # fmt: skip
