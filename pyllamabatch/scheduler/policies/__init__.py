"""The policies that ship, by name, and how to name one of your own: as `FILE.py:NAME`, as
`MODULE:NAME`, or by an entry point of a package in the group `pyllamabatch.policies`. NAME is a
callable that returns a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..policy import Policy, check_policy
from ..registry import Registry
from .device_aware import device_aware
from .fair import fair
from .fcfs import fcfs
from .mlfq import mlfq
from .prefill_first import prefill_first
from .prefix import prefix
from .sarathi import sarathi
from .shortest import shortest
from .slo import slo
from .static import static
from .width import width

GROUP = "pyllamabatch.policies"

SHIPPED: dict[str, Callable[..., Policy]] = {
    "static": static,
    "fcfs": fcfs,
    "prefill-first": prefill_first,
    "sarathi": sarathi,
    "slo": slo,
    "shortest": shortest,
    "mlfq": mlfq,
    "fair": fair,
    "prefix": prefix,
    "width": width,
    "device-aware": device_aware,
}
DEFAULT = "device-aware"

_POLICIES = Registry("policy", GROUP, SHIPPED, check_policy)


def policy_names() -> tuple[str, ...]:
    return _POLICIES.names()


def make_policy(spec: str, **options: Any) -> Policy:
    """The policy that `spec` names, as `Registry.make` reads it: "NAME", "NAME:option=value",
    "FILE.py:NAME" or "MODULE:NAME". ArgumentError."""
    return _POLICIES.make(spec, **options)
