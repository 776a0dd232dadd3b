"""Compile for platforms that this machine is not: `pip install -e '.[cross]'`, then

    python -m tools.cross_build                  # the shim and the module's C file, every target
    python -m tools.cross_build --whole          # all of it by CMake, ggml and llama.cpp included
    python -m tools.cross_build --whole --run --targets aarch64-linux-musl   # and its native tests

`ziglang` brings the compiler and each platform's headers. The first form links nothing: it finds
what a platform lacks in our code, in a minute a target on two cores. `--whole` takes about nine
minutes of CPU time a target, and little when little has changed; Metal's own files need a Mac.
`--run` needs qemu-aarch64-static (Debian: qemu-user-static).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cross"
LLAMA = ROOT / "vendor" / "llama.cpp"
ZIG = [sys.executable, "-m", "ziglang"]
WARNINGS = ("-Wall", "-Wextra", "-Werror")
QEMU = "qemu-aarch64-static"


@dataclass(frozen=True)
class Target:
    """`system`, `processor`: CMake's names. cpu: of the whole build, as `-mcpu` takes it."""

    name: str
    system: str
    processor: str
    cpu: str = ""


TARGETS = {
    target.name: target
    for target in (
        Target("aarch64-macos", "Darwin", "arm64", "apple_m1"),
        Target("aarch64-linux-musl", "Linux", "aarch64", "generic+dotprod+i8mm+fp16fml"),
        Target("x86_64-windows-gnu", "Windows", "AMD64", "x86_64_v3"),
    )
}

# What a Windows build of Python has in its pyconfig.h, as far as its stable interface asks.
WINDOWS_PYCONFIG = """\
#define MS_WINDOWS
#define MS_WIN64
#define MS_WIN32
#define HAVE_DECLSPEC_DLL
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_LONG 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_INT 4
#define SIZEOF_SHORT 2
#define SIZEOF_WCHAR_T 2
#define SIZEOF_TIME_T 8
#define SIZEOF_PID_T 4
#define ALIGNOF_MAX_ALIGN_T 16
#define HAVE_STDARG_PROTOTYPES 1
#define HAVE_PY_SSIZE_T 1
typedef long long Py_ssize_t;
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma separated")
    parser.add_argument("--whole", action="store_true", help="all of it, by CMake")
    parser.add_argument("--run", action="store_true", help="native tests, emulated (aarch64-linux)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"--targets {unknown[0]}: one of {', '.join(TARGETS)}")
    if options.run and (names != ["aarch64-linux-musl"] or not options.whole):
        parser.error("--run: with --whole --targets aarch64-linux-musl")
    if options.run and shutil.which(QEMU) is None:
        parser.error(f"--run: there is no {QEMU}")
    bring_sources()
    failed = []
    for name in names:
        began, target = time.monotonic(), TARGETS[name]
        good = whole(target, options.jobs) if options.whole else check(target, options.jobs)
        if good and options.run:
            good = run_tests(target)
        print(
            f"{name}: {'good' if good else 'FAILED'}, {time.monotonic() - began:.0f} s", flush=True
        )
        failed += [] if good else [name]
    return int(bool(failed))


def bring_sources() -> None:
    """llama.cpp unpacked, and the module's C file."""
    subprocess.run([sys.executable, str(ROOT / "vendor" / "unpack.py")], check=True)
    BUILD.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(ROOT / "vendor" / "declarations.py")]
    for folder in includes():
        words += ["--include", str(folder)]
    for header in ("llama.h", "plb.h", "tests/plb_testing.h"):
        words += ["--header", header]
    words += ["--dynamic", "ggml-cpu.h", "--cdef", str(ROOT / "native" / "python_callbacks.cdef")]
    subprocess.run([*words, "--output", str(BUILD / "_native.c")], check=True)


def includes() -> list[Path]:
    return [LLAMA / "include", LLAMA / "ggml" / "include", ROOT / "native"]


def check(target: Target, jobs: int) -> bool:
    """Every file of the shim, the converter of JSON schemas and the module's C file compile for
    the target. Prints what the compiler says of those that do not."""
    sources = sorted((ROOT / "native").glob("*/*.cpp"))
    flags = [f"-I{ROOT / 'native'}", f"-I{python_headers(target)}", '-DPLB_LLAMA_CPP_BUILD="check"']
    for upstream in ("include", "ggml/include", "src", "common", "vendor"):
        flags += ["-isystem", str(LLAMA / upstream)]

    def compiles(source: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
        own = source.suffix == ".cpp" and source.parent.name != "common"  # with upstream's warnings
        words = ["c++", "-std=c++17"] if source.suffix == ".cpp" else ["cc", "-DPy_LIMITED_API"]
        words += ["-target", target.name, *(WARNINGS if own else ("-w",)), *flags]
        command = [*ZIG, *words, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        return source, subprocess.run(command, capture_output=True, text=True, check=False)

    good, folder = True, BUILD / target.name / "check"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        for source, done in pool.map(compiles, [*sources, BUILD / "_native.c"]):
            if done.returncode:
                print(f"{target.name}: {source.relative_to(ROOT)}\n{done.stderr[:4000]}")
                good = False
    return good


def python_headers(target: Target) -> Path:
    """Python's, for the target: this interpreter's own, whose types have the same sizes on every
    64-bit system but Windows."""
    folder = BUILD / "python" / target.name
    if not folder.exists():
        shutil.copytree(sysconfig.get_path("include"), folder)
        if target.system == "Windows":
            (folder / "pyconfig.h").write_text(WINDOWS_PYCONFIG)
    return folder


def toolchain(target: Target) -> Path:
    """CMake's file for the target, and the commands that it names."""
    folder = BUILD / target.name
    folder.mkdir(parents=True, exist_ok=True)
    aimed = f"-target {target.name}" + (f" -mcpu={target.cpu}" if target.cpu else "")
    zig = " ".join(ZIG)
    for tool, flags in (("cc", aimed), ("c++", aimed), ("ar", ""), ("ranlib", ""), ("rc", "")):
        command = folder / f"zig-{tool}"
        command.write_text(f'#!/bin/sh\nexec {zig} {tool} {flags} "$@"\n')
        command.chmod(0o755)
    file = folder / "toolchain.cmake"
    settings = {
        "CMAKE_SYSTEM_NAME": target.system,
        "CMAKE_SYSTEM_PROCESSOR": target.processor,
        "CMAKE_C_COMPILER": folder / "zig-cc",
        "CMAKE_CXX_COMPILER": folder / "zig-c++",
        "CMAKE_AR": folder / "zig-ar",
        "CMAKE_RANLIB": folder / "zig-ranlib",
        "CMAKE_RC_COMPILER": folder / "zig-rc",
        "CMAKE_INSTALL_NAME_TOOL": shutil.which("true"),  # for installing, which is not done
        "CMAKE_OSX_SYSROOT": "",
        "CMAKE_FIND_ROOT_PATH_MODE_PROGRAM": "NEVER",
        "Python_INCLUDE_DIR": python_headers(target),
        "PLB_BUILD_TESTS": "ON",
        # The machine that compiles is not the one that runs; Apple's frameworks are on a Mac only.
        **dict.fromkeys(("GGML_NATIVE", "GGML_METAL", "GGML_ACCELERATE", "GGML_BLAS"), "OFF"),
    }
    lines = [f'set({name} "{value}" CACHE STRING "" FORCE)' for name, value in settings.items()]
    file.write_text("\n".join(lines) + "\n")
    return file


def whole(target: Target, jobs: int) -> bool:
    """As CMakeLists.txt has it: libraries, module and native tests. On Windows without the module,
    which wants Python's own import library."""
    folder = BUILD / target.name / "build"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DCMAKE_TOOLCHAIN_FILE={toolchain(target)}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    goals = ["plb", "llama", "ggml"] if target.system == "Windows" else []
    build = ["cmake", "--build", str(folder), "--parallel", str(jobs)]
    build += ["--target", *goals] if goals else []
    for words in (configure, build):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            print((done.stdout + done.stderr)[-6000:])
            return False
    return True


def run_tests(target: Target) -> bool:
    """The native tests of a build, each under QEMU with every instruction that it knows."""
    folder = BUILD / target.name / "build"
    model = folder / "tiny.gguf"
    write = ROOT / "native" / "tests" / "write_model.py"
    subprocess.run([sys.executable, str(write), str(model)], check=True)
    good = True
    for test in sorted((folder / "native" / "tests").glob("test_*")):
        if not os.access(test, os.X_OK) or test.is_dir():
            continue
        began = time.monotonic()
        words = [QEMU, "-cpu", "max", str(test), str(model), str(LLAMA)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        state = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"  {test.name}: {state}, {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            print((done.stdout + done.stderr)[-3000:])
            good = False
    return good


if __name__ == "__main__":
    sys.exit(main())
