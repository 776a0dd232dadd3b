"""llama.cpp's own tools, built on demand from the tree that pyllamabatch is built from, and on the
ggml of the installed package: the same kernels on both sides, which are compiled once."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.cache import REPOSITORY, cache_folder
from pyllamabatch.llama.host import usable_cores

UPSTREAM = Path(__file__).resolve().parent / "upstream"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_UI": "OFF",  # the server without its web pages, which would be fetched
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "GGML_NATIVE": "ON",
}
"""What sets this build apart from upstream's defaults; the compiler flags are upstream's."""


READY = "PLB_LLAMA_CPP_TOOLS"


class ToolError(Exception):
    """A tool could not be built or run; the message says what to do."""


def source_tree() -> Path:
    """llama.cpp's tree: `$PLB_LLAMA_CPP_DIR`, else `vendor/llama.cpp` (unpacked when missing)."""
    named = os.environ.get("PLB_LLAMA_CPP_DIR")
    tree = Path(named) if named else REPOSITORY / "vendor" / "llama.cpp"
    if not named and not (tree / "include" / "llama.h").is_file():
        subprocess.run([sys.executable, str(REPOSITORY / "vendor" / "unpack.py")], check=True)
    if not (tree / "include" / "llama.h").is_file():
        raise ToolError(f"no llama.cpp in {tree}: set PLB_LLAMA_CPP_DIR to a checkout")
    return tree.resolve()


def vocabulary_file(name: str) -> Path:
    """Upstream's `models/ggml-vocab-NAME.gguf`."""
    path = source_tree() / "models" / f"ggml-vocab-{name}.gguf"
    if not path.is_file():
        raise ToolError(f"{path} is missing: this tree was unpacked without the vocabulary")
    return path


def build_number() -> int:
    """llama.cpp's build number, as the unpacked tree says it; 0 for another checkout."""
    stamp = source_tree() / ".pyllamabatch-lock"
    return int(stamp.read_text().split()[1]) if stamp.is_file() else 0


def build_options() -> dict[str, str]:
    """CMake options of the tool build; CMAKE_ARGS (as for the package) may add -D options."""
    number = build_number()
    options = OPTIONS | {"LLAMA_BUILD_NUMBER": str(number), "LLAMA_BUILD_COMMIT": f"b{number}"}
    for word in os.environ.get("CMAKE_ARGS", "").split():
        key, equals, value = word.removeprefix("-D").partition("=")
        if word.startswith("-D") and equals and key.startswith(("GGML_", "CMAKE_")):
            options[key.partition(":")[0]] = value
    return options


def ggml_folder() -> Path | None:
    """Of the package's ggml; None where the tools need one of their own: without the package, made
    of another llama.cpp than it, on Windows, which links to import libraries, and beside a portable
    build, which finds its backends in its own folder."""
    try:
        from pyllamabatch import _native
        from pyllamabatch.raw import ffi, lib
    except ImportError:
        return None
    folder = Path(_native.__file__).parent / "lib"
    same = ffi.string(lib.plb_llama_cpp_build()).decode() == f"b{build_number()}"
    return folder if same and list(folder.glob("libggml-cpu.*")) else None


def tool(name: str, *, log: bool = True) -> Path:
    """The path of llama.cpp's tool `name` (for example llama-batched-bench), built if missing.

    Takes three to five minutes on two cores at first, then no time: the build stays in the cache
    folder, one per source tree and set of options. `$PLB_LLAMA_CPP_TOOLS` names a folder of tools
    that were built elsewhere from the same llama.cpp; if they have a ggml of their own, that of
    upstream's own build, the bench compares with llama.cpp without our patches.
    """
    suffix = ".exe" if sys.platform == "win32" else ""
    if ready := os.environ.get(READY):
        binary = Path(ready, name + suffix)
        if not binary.is_file():
            raise ToolError(f"{binary} is missing: {READY}={ready} names its folder")
        return binary
    tree, options = source_tree(), build_options()
    if ggml := ggml_folder():
        options["PLB_GGML_DIR"] = str(ggml)
    key = hashlib.sha256(f"{tree}{sorted(options.items())}".encode()).hexdigest()[:12]
    build = cache_folder("tools", key)
    binary = build / "bin" / (name + suffix)
    # Ask the build system each time: a tree that changed under the same path is rebuilt.
    cmake, ninja = program("cmake"), program("ninja")
    if log:
        print(f"building {name} in {build} (minutes at first, then seconds) …", file=sys.stderr)
    definitions = [f"-D{key}={value}" for key, value in options.items()]
    if not (build / "build.ninja").is_file():
        definitions.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        definitions.append(f"-DPLB_LLAMA_CPP_DIR={tree}")
        _run([cmake, "-G", "Ninja", "-S", str(UPSTREAM), "-B", str(build), *definitions])
    _run([cmake, "--build", str(build), "--target", name, "-j", str(usable_cores())])
    return binary


def own_ggml() -> bool:
    """Whether the tools that `$PLB_LLAMA_CPP_TOOLS` names bring a ggml."""
    ready = os.environ.get(READY)
    return ready is not None and any(Path(ready).glob("*ggml-cpu*"))


def program(name: str) -> str:
    """The path of a program that pip may have put beside this Python, or that is on PATH."""
    beside = Path(sys.executable).parent
    found = shutil.which(name, path=str(beside)) or shutil.which(name)
    if found is None:
        raise ToolError(f"{name} is neither on PATH nor in {beside}: python -m pip install {name}")
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ToolError(f"{' '.join(command[:3])} failed:\n{tail}")
