"""Parameters by name into llama.cpp's parameter structs, checked against their fields.

The fields, their types, ranges and enum names come from the compiled declarations: a field that a
later llama.cpp adds is accepted under its own name without a change here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import (
    ArgumentError,
    ModelLoadCancelled,
    choice,
    flag,
    integer,
    number,
    unknown_keyword,
)
from pyllamabatch.llama import runtime
from pyllamabatch.raw import ffi, lib

KvOverride = bool | int | float | str
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
Progress = Callable[[float], bool | None]


def fill(struct: Any, params: Mapping[str, object], reserved: frozenset[str]) -> None:
    """Set the fields of a parameter struct. `reserved` fields are managed by us and refused.

    Enums take their number or the distinctive part of their name in lower case ("q8_0", "mean",
    "enabled"); pointers take cdata, which the caller keeps alive."""
    fields = {name: field.type for name, field in ffi.typeof(struct).fields}
    for name, value in params.items():
        if name not in fields or name in reserved:
            raise unknown_keyword(name, value, set(fields) - reserved)
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
        return flag(name, value)
    if ctype.cname in ("float", "double"):
        return number(name, value)
    return _int(name, value, ctype)


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
    if isinstance(value, int) and not isinstance(value, bool) and value in numbers.values():
        return int(value)
    words = {key[len(prefix) :].lower(): n for key, n in numbers.items()}
    if ctype.cname == "enum ggml_type":
        words = {word: words[word] for word in CACHE_TYPES}
    return words[choice(name, value.lower() if isinstance(value, str) else value, words)]


def flat_integers(name: str, values: object) -> npt.NDArray[Any]:
    """A sequence, an array or any iterable of integers as an array of one dimension."""
    try:
        given = values if isinstance(values, (np.ndarray, Sequence)) else list(values)  # type: ignore[call-overload]
        array = np.asarray(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise ArgumentError(name, values, "must be integers") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(name, values, "must be a flat sequence of integers")
    return array if array.size else array.astype(np.int32)


def check_range(name: str, values: npt.NDArray[Any], low: int, high: int) -> None:
    """Raise `ArgumentError`, with its index, for the first value that is not in low..high."""
    bad = (values < low) | (values > high)
    if bad.any():
        at = tuple(np.argwhere(bad)[0].tolist())
        index = ", ".join(map(str, at))
        raise ArgumentError(f"{name}[{index}]", values[at].item(), f"must be in {low}..{high}")


def device_list(names: Sequence[str]) -> Any:
    known = runtime.devices()
    found = []
    for name in names:
        if name not in known:
            raise ArgumentError("devices", name, f"no such device; there are {', '.join(known)}")
        if known[name].kind == "cpu":
            raise ArgumentError("devices", name, "the CPU is always there; [] means CPU only")
        found.append(lib.ggml_backend_dev_by_name(name.encode()))
    return ffi.new("ggml_backend_dev_t[]", [*found, ffi.NULL])


def share_array(shares: Sequence[float]) -> Any:
    limit = int(lib.llama_max_devices())
    if len(shares) > limit:
        raise ArgumentError("tensor_split", shares, f"at most {limit} devices")
    values = np.zeros(max(1, limit))
    values[: len(shares)] = shares
    if not np.isfinite(values).all() or (values < 0).any():
        raise ArgumentError("tensor_split", shares, "must be shares of 0 or more")
    return ffi.new("float[]", values.tolist())


_OVERRIDES: dict[type, tuple[str, str]] = {  # the name of the tag, the field
    bool: ("BOOL", "val_bool"),
    int: ("INT", "val_i64"),
    float: ("FLOAT", "val_f64"),
    str: ("STR", "val_str"),
}


def override_array(overrides: Mapping[str, KvOverride]) -> Any:
    array = ffi.new("struct llama_model_kv_override[]", len(overrides) + 1)  # ends with no key
    for item, (key, value) in zip(array, overrides.items(), strict=False):
        name = key.encode()
        if not 0 < len(name) < 128:
            raise ArgumentError("kv_overrides", key, "a key has 1 to 127 bytes")
        item.key = name
        try:
            tag, field = _OVERRIDES[type(value)]
            setattr(item, field, f"{value}\0".encode() if isinstance(value, str) else value)
        except (KeyError, OverflowError, IndexError):
            limit = "must be bool, int (64 bits), float or str (< 128 bytes)"
            raise ArgumentError(f"kv_overrides[{key}]", value, limit) from None
        item.tag = getattr(lib, f"LLAMA_KV_OVERRIDE_TYPE_{tag}")
    return array


_CALLBACKS = frozenset({"progress_callback", "progress_callback_user_data"})
_ARRAYS: dict[str, Callable[[Any], Any]] = {
    "devices": device_list,
    "tensor_split": share_array,
    "kv_overrides": override_array,
}


def model_params(given: Mapping[str, Any]) -> tuple[Any, list[object]]:
    """The `llama_model_params` of the keywords of a `Model`, and what it points to, which must live
    until the model is loaded."""
    load_mode = given.get("load_mode", "auto")
    if given.get("no_alloc"):  # libllama asserts that nothing is mapped
        if load_mode not in ("auto", "none"):
            raise ArgumentError("load_mode", load_mode, "no_alloc reads nothing: leave it out")
        load_mode = "none"
    native = lib.llama_model_default_params()
    fields = {name: value for name, value in given.items() if name not in _ARRAYS}
    fill(native, {**fields, "load_mode": load_mode}, _CALLBACKS)
    arrays = {
        name: make(given[name]) for name, make in _ARRAYS.items() if given.get(name) is not None
    }
    for name, array in arrays.items():
        setattr(native, name, array)
    return native, list(arrays.values())


def progress_handle(progress: Progress, failure: list[BaseException]) -> Any:
    """The user data of `plb_py_progress`. What stops the load is put into `failure`."""

    def report(fraction: float) -> bool:
        try:
            if progress(fraction) is False:
                failure.append(ModelLoadCancelled(f"cancelled at {fraction:.0%}"))
        except BaseException as error:
            failure.append(error)
        return not failure

    return ffi.new_handle(report)


@ffi.def_extern(name="plb_py_progress", error=False)  # type: ignore[untyped-decorator]
def _on_progress(fraction: float, user_data: Any) -> bool:
    report: Callable[[float], bool] = ffi.from_handle(user_data)
    return report(fraction)


# -- strings of llama.cpp --


def metadata(kind: str, ptr: Any) -> dict[str, str]:
    """The scalar metadata of a "model" or an "adapter"."""
    count, key, value = (
        getattr(lib, f"llama_{kind}_meta_{name}")
        for name in ("count", "key_by_index", "val_str_by_index")
    )
    return {string(key, ptr, i): string(value, ptr, i) for i in range(count(ptr))}


def string(call: Callable[..., int], *arguments: Any) -> str:
    """What a function says that writes like `snprintf`; "" where it has nothing to say."""
    data = runtime.filled(lambda *out: call(*arguments, *out) + 1, 256)
    return data[:-1].decode("utf-8", "replace")
