"""One-time start of llama.cpp: the log ring, the backends, `llama_backend_init`."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import NamedTuple

from pyllamabatch import _native
from pyllamabatch.llama import log as _log
from pyllamabatch.raw import ffi, lib

_LIBRARIES = Path(_native.__file__).parent / "lib"  # of an editable install, not the sources
_started = threading.Event()
_lock = threading.Lock()


def ensure() -> None:
    """Start llama.cpp once per process. Every constructor of the typed layer calls it."""
    if _started.is_set():
        return
    with _lock:
        if _started.is_set():
            return
        lib.plb_log_install()
        lib.plb_guard_install()
        if lib.ggml_backend_reg_count() == 0:  # backends are files to load: a portable build
            lib.ggml_backend_load_all_from_path(os.fsencode(_LIBRARIES))
        lib.llama_backend_init()
        _started.set()
    _log.drain()


class Device(NamedTuple):
    name: str
    description: str
    kind: str  # "cpu", "gpu", "igpu", "accel"
    free: int  # bytes
    total: int


def devices() -> dict[str, Device]:
    """Every device of every backend, by name."""
    ensure()
    free, total = ffi.new("size_t *"), ffi.new("size_t *")
    kinds = ffi.typeof("enum ggml_backend_dev_type").elements
    found = {}
    for i in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(i)
        lib.ggml_backend_dev_memory(device, free, total)
        kind = kinds[int(lib.ggml_backend_dev_type(device))].rpartition("_")[2].lower()
        name = text(lib.ggml_backend_dev_name(device))
        description = text(lib.ggml_backend_dev_description(device))
        found[name] = Device(name, description, kind, int(free[0]), int(total[0]))
    return found


def mmap_works() -> bool:
    """Files can be mapped on this system, which libllama then does by default."""
    return bool(lib.llama_supports_mmap())


def text(pointer: object) -> str:
    """A C string of llama.cpp; "" for NULL."""
    if pointer == ffi.NULL:
        return ""
    string: bytes = ffi.string(pointer)
    return string.decode("utf-8", "replace")
