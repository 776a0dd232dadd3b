"""The policies that ship, by name. Packages can add theirs under the entry point group
`pyllamabatch.policies`: a name and a callable that returns a policy."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from ..policy import Policy
from .fcfs import fcfs

GROUP = "pyllamabatch.policies"

SHIPPED: dict[str, Callable[..., Policy]] = {"fcfs": fcfs}


def policy_names() -> tuple[str, ...]:
    return tuple(sorted({*SHIPPED, *(point.name for point in entry_points(group=GROUP))}))


def make_policy(name: str, **options: object) -> Policy:
    """The policy called `name`; `options` go to its constructor. KeyError names the known ones."""
    make = SHIPPED.get(name)
    if make is None:
        for point in entry_points(group=GROUP):
            if point.name == name:
                make = point.load()
                break
        else:
            raise KeyError(f"no policy {name!r}; there are: {', '.join(policy_names())}")
    policy: Policy = make(**options)
    return policy


__all__ = ["GROUP", "fcfs", "make_policy", "policy_names"]
