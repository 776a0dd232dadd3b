"""libllama itself: `ffi, lib`.

Every public function and constant of llama.h, ggml.h, ggml-backend.h, ggml-cpu.h and gguf.h is on
`lib` under its own name, and so are the functions of our shim (`plb_*`, native/plb.h). Nothing is
checked: libllama aborts the process on arguments that it rejects by assertion, and a context may
be used by one thread at a time. Every call releases the GIL.
docs/reference/raw.md has a complete loop."""

import os
import sys
from pathlib import Path

from pyllamabatch.errors import NotBuilt

_libraries = Path(__file__).parent / "lib"
if sys.platform == "win32" and _libraries.is_dir():  # Windows has no rpath
    os.add_dll_directory(str(_libraries))
try:
    from pyllamabatch._native import ffi, lib
except ModuleNotFoundError as error:
    if error.name != "pyllamabatch._native":
        raise
    raise NotBuilt from None

__all__ = ["ffi", "lib"]
