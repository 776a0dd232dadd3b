"""What llama.cpp runs on: its backends, its devices, its log.

llama.cpp's log goes to Python's `logging` under the name "pyllamabatch.llama", which is silent
until the application gives it (or a parent) a handler. Lines arrive when one of our calls drains
the ring of native/guard/log.cpp, on the thread that made the call."""

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pyllamabatch.errors import UnsupportedOperation, integer
from pyllamabatch.raw import ffi, lib

_COMPILED = sys.modules["pyllamabatch._native"]  # of an editable install, not among the sources
_LIBRARIES = Path(str(_COMPILED.__file__)).parent / "lib"
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
    drain_log()


def keep_wired(seconds: int) -> None:
    """How long a Mac's GPU keeps weights and cells wired after its last step: at least one second,
    at most 10**7. While they are, the next step begins at once; afterwards the system may use their
    memory for others. llama.cpp's default is 180. Nothing elsewhere. It holds for all engines of
    the process: llama.cpp keeps the buffers of a GPU wired together.

    UnsupportedOperation once llama.cpp has started in this process: it reads this only then."""
    seconds = integer("seconds", seconds, 1, 10**7)  # llama.cpp counts 200 to a second, in an int
    with _lock:
        if _started.is_set():
            raise UnsupportedOperation("keep_wired comes before the first model of a process")
        os.environ["GGML_METAL_RESIDENCY_KEEP_ALIVE_S"] = str(seconds)


class BackendDevice(NamedTuple):
    name: str
    description: str
    kind: str  # "cpu", "gpu", "igpu", "accel"
    backend: str
    free: int  # bytes
    total: int

    @property
    def on_mac(self) -> bool:
        """A Mac's GPU, which has no memory but the host's."""
        return self.backend == "MTL"


def devices() -> dict[str, BackendDevice]:
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
        backend = text(lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(device)))
        found[name] = BackendDevice(name, description, kind, backend, int(free[0]), int(total[0]))
    return found


def default_devices() -> list[BackendDevice]:
    """Those that libllama takes where none are named (src/llama.cpp:
    `llama_prepare_model_devices`): the GPUs, or where there are none those that share the host's
    memory."""
    every = devices().values()
    return [d for d in every if d.kind == "gpu"] or [d for d in every if d.kind == "igpu"]


def features() -> dict[str, dict[str, str]]:
    """Of every backend, by name: what it was compiled with and finds on this machine."""
    ensure()
    found: dict[str, dict[str, str]] = {}
    for i in range(lib.ggml_backend_reg_count()):
        reg = lib.ggml_backend_reg_get(i)
        has = found[text(lib.ggml_backend_reg_name(reg))] = {}
        getter = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_get_features")
        if getter != ffi.NULL:
            feature = ffi.cast("ggml_backend_get_features_t", getter)(reg)
            while feature.name != ffi.NULL:
                has[text(feature.name)] = text(feature.value)
                feature += 1
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


def filled(call: Callable[[Any, int], int], size: int) -> bytes:
    """What `call(buffer, size)` writes. It returns how many bytes that is; when they are more
    than `size`, it is called again with room for them."""
    while True:
        buffer = ffi.new("char[]", size)
        needed = call(buffer, size)
        if needed <= size:
            return bytes(ffi.buffer(buffer, needed))
        size = needed


# -- the log --

logger = logging.getLogger("pyllamabatch.llama")
logger.addHandler(logging.NullHandler())  # silent until a program asks for it

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}


class _LogDrain:
    """Puts fragments together into lines; one thread at a time."""

    SIZE = 1 << 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buffer = ffi.new("char[]", self.SIZE)
        self._level = ffi.new("int32_t *")
        self._dropped = ffi.new("int64_t *")
        self._partial = ""
        self._lowest = 0  # the level below which the ring takes nothing

    def __call__(self) -> None:
        """Give what llama.cpp has logged so far to `logging`."""
        if not self._lock.acquire(blocking=False):
            return  # the thread that drains now takes our lines too
        try:
            lowest = next((n for n, level in _LEVELS.items() if logger.isEnabledFor(level)), 4)
            if lowest != self._lowest:
                lib.plb_log_set_level(lowest)
                self._lowest = lowest
            while True:
                size = lib.plb_log_drain(self._buffer, self.SIZE, self._level, self._dropped)
                if self._dropped[0]:
                    logger.warning("%d fragments of llama.cpp's log were lost", self._dropped[0])
                if size <= 0:
                    return
                text = ffi.buffer(self._buffer, size)[:].decode("utf-8", "replace")
                self._emit(_LEVELS.get(self._level[0], logging.INFO), self._partial + text)
        finally:
            self._lock.release()

    def _emit(self, level: int, text: str) -> None:
        *lines, self._partial = text.split("\n")
        for line in lines:
            if line.strip(" ."):  # the dots are llama.cpp's progress bar
                logger.log(level, "%s", line)


drain_log = _LogDrain()


def logged(call: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Call llama.cpp: what it returned, and the warnings and errors that it logged meanwhile.
    Raises `MemoryError` where it returned nothing for want of memory."""
    lib.plb_log_mark()
    value = call(*arguments)
    buffer = ffi.new("char[]", 4096)
    size = lib.plb_log_errors(buffer, 4096)
    drain_log()
    log = ffi.buffer(buffer, max(size, 0))[:].decode("utf-8", "replace").strip()
    if not value and log.rpartition("\n")[2] == text(lib.plb_code_text(lib.PLB_E_MEMORY)):
        raise MemoryError(log)
    return value, log
