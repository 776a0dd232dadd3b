"""The policies that ship, by name. Packages can add theirs under the entry point group
`pyllamabatch.policies`: a name and a callable that returns a policy."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from types import UnionType
from typing import Any, Union, get_args, get_origin

from ...errors import ArgumentError
from ..policy import Policy, check_policy
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
from .tile_fill import tile_fill
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
    "tile-fill": tile_fill,
    "width": width,
    "device-aware": device_aware,
}
DEFAULT = "device-aware"


def policy_names() -> tuple[str, ...]:
    return tuple(sorted({*SHIPPED, *(point.name for point in entry_points(group=GROUP))}))


def make_policy(spec: str, **options: Any) -> Policy:
    """The policy that `spec` names: "NAME" or "NAME:option=value,option=value", values as Python
    writes them, text without quotes; more `options` as keywords. A name of ours may have _ for -.

    ArgumentError names the policies, or the options of this one, or what is wrong with a value, or
    says that another package's entry point can't be loaded, or makes something else."""
    name, _, rest = spec.partition(":")
    make = _factory(name)
    parameters = inspect.signature(make, eval_str=True).parameters
    for item in rest.split(",") if rest else ():
        option, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise ArgumentError("policy", spec, "NAME or NAME:option=value,option=value")
        if option not in parameters:
            known = ", ".join(parameters) or "none"
            raise ArgumentError("policy", spec, f"no option {option!r}; options of {name}: {known}")
        options[option] = _value(option, text, parameters[option].annotation)
    return check_policy(make(**options), spec)


def _factory(name: str) -> Callable[..., Policy]:
    make = SHIPPED.get(name.replace("_", "-"))
    if make is None:
        for point in entry_points(group=GROUP):
            if point.name == name:
                return _loaded(point)
        raise ArgumentError("policy", name, f"one of {', '.join(policy_names())}")
    return make


def _loaded(point: EntryPoint) -> Callable[..., Policy]:
    try:
        make = point.load()
    except (ImportError, AttributeError) as problem:
        limit = f"its entry point {point.value!r} can't be loaded: {problem}"
        raise ArgumentError("policy", point.name, limit) from problem
    if not callable(make):
        limit = f"its entry point {point.value!r} must make a policy, it is {make!r}"
        raise ArgumentError("policy", point.name, limit)
    loaded: Callable[..., Policy] = make
    return loaded


def _value(option: str, text: str, kind: Any) -> Any:
    """`text` as one of the types that the factory's annotation names, if it has one."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if kind is inspect.Parameter.empty or type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    names = " or ".join(
        "None" if k is type(None) else str(getattr(k, "__name__", k)) for k in kinds
    )
    raise ArgumentError(option, value, f"must be {names}")


__all__ = [
    "DEFAULT",
    "GROUP",
    "SHIPPED",
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
