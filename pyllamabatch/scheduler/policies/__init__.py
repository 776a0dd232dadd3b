"""The policies that ship, by name, and how to name one of your own: as `FILE.py:NAME`, as
`MODULE:NAME`, or by an entry point of a package in the group `pyllamabatch.policies`. NAME is a
callable that returns a policy."""

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

_FACTORIES: tuple[Callable[..., Policy], ...] = (
    static, fcfs, prefill_first, sarathi, slo, shortest, mlfq, fair, prefix, width, device_aware,
)  # fmt: skip
SHIPPED = {factory.__name__.replace("_", "-"): factory for factory in _FACTORIES}
DEFAULT = "device-aware"

_POLICIES = Registry("policy", GROUP, SHIPPED, check_policy)


def policy_names() -> tuple[str, ...]:
    return _POLICIES.names()


def make_policy(spec: str, **options: Any) -> Policy:
    """The policy that `spec` names, as `Registry.make` reads it: "NAME", "NAME:option=value",
    "FILE.py:NAME" or "MODULE:NAME". ArgumentError."""
    return _POLICIES.make(spec, **options)
