"""Parameters by name into llama.cpp's parameter structs, checked against their fields.

The fields, their types, ranges and enum names come from the compiled declarations, so a field that
a later llama.cpp adds is accepted under its own name without a change here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pyllamabatch.errors import ArgumentError
from pyllamabatch.raw import ffi


def fill(struct: Any, params: Mapping[str, object], reserved: frozenset[str]) -> None:
    """Set the fields of a parameter struct. `reserved` fields are managed by us and refused.

    Enums take their number or the distinctive part of their name in lower case ("q8_0", "mean",
    "enabled"); pointers take cdata, which the caller keeps alive.
    """
    fields = {name: field.type for name, field in ffi.typeof(struct).fields}
    for name, value in params.items():
        if name not in fields or name in reserved:
            known = sorted(set(fields) - reserved)
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ArgumentError(name, value, f"no such parameter; {hint}")
        setattr(struct, name, convert(name, value, fields[name]))


def read(struct: Any) -> dict[str, Any]:
    """A struct's fields as a dict."""
    return {name: getattr(struct, name) for name, _ in ffi.typeof(struct).fields}


def convert(name: str, value: object, ctype: Any) -> Any:
    """`value` as the field `name` of that C type takes it, or `ArgumentError`."""
    if ctype.kind == "enum":
        return _enum(name, value, ctype)
    if ctype.kind in ("pointer", "function"):
        if value is None:
            return ffi.NULL
        if not isinstance(value, ffi.CData):
            raise ArgumentError(name, value, f"must be cdata of type {ctype.cname}, or None")
        return ffi.cast(ctype, value)
    if ctype.cname in ("_Bool", "bool"):
        if not isinstance(value, bool):
            raise ArgumentError(name, value, "must be True or False")
        return value
    if ctype.cname in ("float", "double"):
        return _float(name, value)
    return _int(name, value, ctype)


def _float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise ArgumentError(name, value, "must be a number")
    return float(value)


def _int(name: str, value: object, ctype: Any) -> int:
    signed = int(ffi.cast(ctype, -1)) < 0
    bits = 8 * ffi.sizeof(ctype)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return integer(name, value, low, high)


def _enum(name: str, value: object, ctype: Any) -> int:
    numbers: dict[str, int] = ctype.relements
    prefix = next(iter(numbers))
    while not all(name.startswith(prefix) for name in numbers):
        prefix = prefix[: prefix.rstrip("_").rfind("_") + 1]
    if isinstance(value, str):
        number = numbers.get(prefix + value.upper())
        if number is not None:
            return number
    elif isinstance(value, int) and not isinstance(value, bool) and value in numbers.values():
        return int(value)
    names = ", ".join(key[len(prefix) :].lower() for key in numbers)
    raise ArgumentError(name, value, f"must be one of {names} (or its number)")


def integer(name: str, value: object, low: int, high: int) -> int:
    """An integer (NumPy's too) in low..high, or `ArgumentError`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError(name, value, "must be an integer") from None
    if not low <= number <= high:
        raise ArgumentError(name, value, f"must be in {low}..{high}")
    return number
