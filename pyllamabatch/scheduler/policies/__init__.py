"""The policies that ship, by name, and how to name one of your own: as `FILE.py:NAME`, as
`MODULE:NAME`, or by an entry point of a package in the group `pyllamabatch.policies`. NAME is a
callable that returns a policy."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
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


def policy_names() -> tuple[str, ...]:
    return tuple(sorted({*SHIPPED, *(point.name for point in entry_points(group=GROUP))}))


def make_policy(spec: str, **options: Any) -> Policy:
    """The policy that `spec` names: "NAME" or "NAME:option=value,option=value", values as Python
    writes them, text without quotes; more `options` as keywords. A shipped name may have _ for -.
    One of your own is "FILE.py:NAME" or "MODULE:NAME", with options behind another colon.

    ArgumentError names the policies, or the options of this one, or what is wrong with a value, or
    says that one of your own or of another package can't be loaded, or makes something else."""
    name, _, rest = spec.partition(":")
    factory = _factory(name)
    if factory is None and rest and "=" not in rest.partition(":")[0]:
        attribute, _, rest = rest.partition(":")
        name = f"{name}:{attribute}"
        factory = partial(_own, *name.rsplit(":", 1))
    if factory is None:
        limit = f"one of {', '.join(policy_names())}, or your own: FILE.py:NAME, MODULE:NAME"
        raise ArgumentError("policy", name, limit)
    make = _loaded(name, factory)
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


def _factory(name: str) -> Callable[[], Any] | None:
    """What loads the policy of this name; None when there is none."""
    shipped = SHIPPED.get(name.replace("_", "-"))
    if shipped is not None:
        return lambda: shipped
    return next((point.load for point in entry_points(group=GROUP) if point.name == name), None)


def _own(source: str, attribute: str) -> Any:
    """From a file or a module."""
    if not source.endswith(".py"):
        return getattr(importlib.import_module(source), attribute)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, attribute)


def _loaded(name: str, load: Callable[[], Any]) -> Callable[..., Policy]:
    try:
        make = load()
    except (ImportError, AttributeError, OSError, SyntaxError) as problem:
        raise ArgumentError("policy", name, f"it can't be loaded: {problem}") from problem
    if not callable(make):
        raise ArgumentError("policy", name, f"it must make a policy, and is {make!r}")
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
    "width",
]
