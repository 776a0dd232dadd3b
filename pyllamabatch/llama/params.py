"""The arguments of a model load as llama.cpp takes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pyllamabatch.errors import ArgumentError, ModelLoadCancelled, ModelLoadError
from pyllamabatch.llama import runtime as _backend
from pyllamabatch.llama.structs import integer
from pyllamabatch.raw import ffi, lib

PathLike = str | os.PathLike[str]
KvOverride = bool | int | float | str
Progress = Callable[[float], bool | None]


def gguf_file(path: PathLike) -> bytes:
    """The path as llama.cpp takes it, after the checks whose failures it reports badly."""
    name = os.fspath(path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ArgumentError("path", path, "must be the name of a file")
    try:
        with open(name, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelLoadError(name, error.strerror or str(error)) from None
    if magic != b"GGUF":
        raise ModelLoadError(name, f"not a GGUF file: it begins with {magic!r}")
    return os.fsencode(name)


def device_list(names: Sequence[str]) -> Any:
    known = _backend.devices()
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


def override_array(overrides: Mapping[str, KvOverride]) -> Any:
    array = ffi.new("struct llama_model_kv_override[]", len(overrides) + 1)  # ends with no key
    for item, (key, value) in zip(array, overrides.items(), strict=False):
        name = key.encode()
        if not 0 < len(name) < 128:
            raise ArgumentError("kv_overrides", key, "a key has 1 to 127 bytes")
        item.key = name
        if isinstance(value, bool):
            item.tag, item.val_bool = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            item.tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
            item.val_i64 = integer(f"kv_overrides[{key}]", value, -(2**63), 2**63 - 1)
        elif isinstance(value, float):
            item.tag, item.val_f64 = lib.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        elif isinstance(value, str) and len(value.encode()) < 128:
            item.tag, item.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            raise ArgumentError(
                f"kv_overrides[{key}]", value, "must be bool, int, float or str of < 128 bytes"
            )
    return array


@contextmanager
def progress_callback(progress: Progress | None) -> Iterator[tuple[Any, Any, list[BaseException]]]:
    """The C callback, its user data, and the exception that stopped the load (0 or 1)."""
    failure: list[BaseException] = []
    if progress is None:
        yield ffi.NULL, ffi.NULL, failure
        return

    def report(fraction: float) -> bool:
        try:
            if progress(fraction) is False:
                failure.append(ModelLoadCancelled(f"cancelled at {fraction:.0%}"))
        except BaseException as error:
            failure.append(error)
        return not failure

    handle = ffi.new_handle(report)
    yield lib.plb_py_progress, handle, failure


@ffi.def_extern(name="plb_py_progress", error=False)  # type: ignore[untyped-decorator]
def _on_progress(fraction: float, user_data: Any) -> bool:
    report: Callable[[float], bool] = ffi.from_handle(user_data)
    return report(fraction)


# -- strings of llama.cpp --


def metadata(ptr: Any, count: Any, key_by_index: Any, value_by_index: Any) -> dict[str, str]:
    return {
        string(lambda buffer, size, i=i: key_by_index(ptr, i, buffer, size)): string(
            lambda buffer, size, i=i: value_by_index(ptr, i, buffer, size)
        )
        for i in range(count(ptr))
    }


def string(call: Callable[..., int]) -> str:
    """What a function that fills (buffer, size) and returns the length wants to say."""
    size = 256
    while True:
        buffer = ffi.new("char[]", size)
        length = call(buffer, size)
        if length < 0:
            return ""
        if length < size:
            return bytes(ffi.buffer(buffer, length)).decode("utf-8", "replace")
        size = length + 1
