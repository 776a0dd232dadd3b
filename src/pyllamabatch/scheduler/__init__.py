"""The scheduler and its policies: pure Python, no model needed."""

from .gather import Gather, Gathering, Window
from .policies import fcfs, make_policy, policy_names
from .policy import ComposedPolicy, Decodes, Draft, Policy, Verdict
from .rules import RULES
from .scheduler import Scheduler
from .step import Chunk, Counters, Step
from .view import Limits, Plan, SequenceView, StepView

__all__ = [
    "RULES",
    "Chunk",
    "ComposedPolicy",
    "Counters",
    "Decodes",
    "Draft",
    "Gather",
    "Gathering",
    "Limits",
    "Plan",
    "Policy",
    "Scheduler",
    "SequenceView",
    "Step",
    "StepView",
    "Verdict",
    "Window",
    "fcfs",
    "make_policy",
    "policy_names",
]
