"""Compile for platforms that this machine is not: `pip install -e '.[cross]'`, then

    python -m tools.cross_build                  # the shim and the module's C file, every target
    python -m tools.cross_build --whole          # all of it by CMake, ggml and llama.cpp included
    python -m tools.cross_build --whole --run --targets aarch64-linux-gnu   # and its native tests

`ziglang` brings the compiler and each platform's headers. The first form links nothing: it finds
what a platform lacks in our code, in a minute a target on two cores, and whether what we change
in Metal's C++ compiles. `--whole` takes about five minutes of CPU time a target, and little when
little has changed; Metal's Objective-C and its kernels need a Mac.
For Arm Linux it takes the compiler of Debian's g++-aarch64-linux-gnu.
`--run` runs the native tests: for Arm with qemu-aarch64-static (Debian: qemu-user-static), for
Windows with Wine (Debian: wine64).
"""

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
EMBEDDED = ROOT / "pyllamabatch" / "models" / "default.gguf"
ZIG = [sys.executable, "-m", "ziglang"]
WARNINGS = ("-Wall", "-Wextra", "-Werror")
EMULATED_ROWS = "100"  # that native/tests/test_fused.cpp compares
QEMU = ("qemu-aarch64-static", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")
WINE = ("/usr/lib/wine/wine64",)


@dataclass(frozen=True)
class Target:
    """`system`, `processor`: CMake's names. Of the whole build: `cpu`, as the compiler takes it;
    `gnu`: what the commands of the compiler begin with, "" for zig. run: what runs its programs.
    wheel: what the name of a wheel calls it."""

    name: str
    system: str
    processor: str
    cpu: str
    gnu: str = ""
    run: tuple[str, ...] = ()
    wheel: str = ""


TARGETS = {
    target.name: target
    for target in (
        Target("aarch64-macos", "Darwin", "arm64", "-mcpu=apple_m1", wheel="macosx-15.0-arm64"),
        Target(
            "aarch64-linux-gnu",
            "Linux",
            "aarch64",
            "-march=armv8.2-a+dotprod+i8mm+fp16fml",
            "aarch64-linux-gnu-",
            QEMU,
            "linux-aarch64",
        ),
        Target("x86_64-windows-gnu", "Windows", "AMD64", "-mcpu=x86_64_v3", "", WINE, "win-amd64"),
    )
}

# zig exports what a library's start-up code defines, too; a second library has that as well.
WINDOWS_EXPORTS = """\
__attribute__((section(".drectve"), used)) static const char flags[] = " -exclude-symbols:atexit ";
"""

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
    parser.add_argument("--run", action="store_true", help="and its native tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"--targets {unknown[0]}: one of {', '.join(TARGETS)}")
    for target in (TARGETS[name] for name in names if options.run):
        if not target.run or not options.whole:
            parser.error("--run: with --whole, for aarch64-linux-gnu and x86_64-windows-gnu")
        if shutil.which(target.run[0]) is None:
            parser.error(f"--run: there is no {target.run[0]}")
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
    """Every file of the shim, the converter of JSON schemas, the module's C file, and for a Mac
    those of Metal that are C++ compile for the target. Prints what the compiler says of those that
    do not."""
    sources = sorted((ROOT / "native").glob("*/*.cpp"))
    if target.system == "Windows":  # the fuzzers stop by signals
        sources = [source for source in sources if source.parent.name != "fuzz"]
    metal = LLAMA / "ggml" / "src" / "ggml-metal"
    if target.system == "Darwin":
        sources += sorted(metal.glob("*.cpp"))
    flags = [f"-I{ROOT / 'native'}", f"-I{python_headers(target)}", '-DPLB_LLAMA_CPP_BUILD="check"']
    for upstream in ("include", "ggml/include", "ggml/src", "src", "common", "vendor"):
        flags += ["-isystem", str(LLAMA / upstream)]

    def compiles(source: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
        own = source.suffix == ".cpp" and source.parent not in (metal, ROOT / "native" / "common")
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


def windows_links(folder: Path) -> dict[str, object]:
    """What libraries and modules are linked with: `WINDOWS_EXPORTS`, and Python's stable interface,
    in python3.dll."""
    from abi3info import DATAS, FUNCTIONS

    names = [symbol.name for symbol in FUNCTIONS] + [f"{symbol.name} DATA" for symbol in DATAS]
    definition, library = folder / "python3.def", folder / "python3.lib"
    definition.write_text("\n".join(("LIBRARY python3.dll", "EXPORTS", *sorted(names))) + "\n")
    words = [*ZIG, "dlltool", "-m", "i386:x86-64", "-d", str(definition), "-l", str(library)]
    subprocess.run(words, check=True)
    source, exports = folder / "exports.c", folder / "exports.o"
    source.write_text(WINDOWS_EXPORTS)
    words = [*ZIG, "cc", "-target", "x86_64-windows-gnu", "-c", str(source), "-o", str(exports)]
    subprocess.run(words, check=True)
    # CMake takes a library that does not end with .dll for a static one, which needs what this
    # machine's Python is linked with.
    subprocess.run([*ZIG, "ar", "rc", str(folder / "libdl.a")], check=True)
    flags = ("CMAKE_SHARED_LINKER_FLAGS", "CMAKE_MODULE_LINKER_FLAGS")
    return {"Python_SABI_LIBRARY": library, **dict.fromkeys(flags, f"{exports} -L{folder}")}


def no_bundles(folder: Path) -> dict[str, object]:
    """zig's linker crashes where it is to make a bundle; Python loads a library as well."""
    rules = folder / "rules.cmake"
    rules.write_text('set(CMAKE_SHARED_MODULE_CREATE_CXX_FLAGS "-dynamiclib")\n')
    return {"CMAKE_USER_MAKE_RULES_OVERRIDE_CXX": rules}


def toolchain(target: Target) -> Path:
    """CMake's file for the target, and the commands that it names."""
    folder = BUILD / target.name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "toolchain.cmake"
    settings = {
        "CMAKE_SYSTEM_NAME": target.system,
        "CMAKE_SYSTEM_PROCESSOR": target.processor,
        **(gnu_commands(target) if target.gnu else zig_commands(target, folder)),
        "CMAKE_INSTALL_NAME_TOOL": llvm("install-name-tool") or shutil.which("true"),
        "CMAKE_OSX_SYSROOT": "",
        "CMAKE_FIND_ROOT_PATH_MODE_PROGRAM": "NEVER",
        "Python_INCLUDE_DIR": python_headers(target),
        **(windows_links(folder) if target.system == "Windows" else {}),
        **(no_bundles(folder) if target.system == "Darwin" else {}),
        "PLB_BUILD_TESTS": "ON",
        # The machine that compiles is not the one that runs; Apple's frameworks are on a Mac only.
        **dict.fromkeys(("GGML_NATIVE", "GGML_METAL", "GGML_ACCELERATE", "GGML_BLAS"), "OFF"),
    }
    lines = [f'set({name} "{value}" CACHE STRING "" FORCE)' for name, value in settings.items()]
    file.write_text("\n".join(lines) + "\n")
    return file


def gnu_commands(target: Target) -> dict[str, object]:
    return {
        "CMAKE_C_COMPILER": f"{target.gnu}gcc",
        "CMAKE_CXX_COMPILER": f"{target.gnu}g++",
        "CMAKE_C_FLAGS": target.cpu,
        "CMAKE_CXX_FLAGS": target.cpu,
    }


def llvm(tool: str) -> str | None:
    """LLVM's tool of this name, which Debian's `llvm` has: with the newest number, if with one."""
    found = [
        shutil.which(f"llvm-{tool}{end}") for end in ("", *(f"-{n}" for n in range(40, 13, -1)))
    ]
    return next(filter(None, found), None)


def zig_commands(target: Target, folder: Path) -> dict[str, object]:
    aimed, zig = f"-target {target.name} {target.cpu}", " ".join(ZIG)
    for tool, flags in (("cc", aimed), ("c++", aimed), ("ar", ""), ("ranlib", ""), ("rc", "")):
        command = folder / f"zig-{tool}"
        script = f'#!/bin/sh\nexec {zig} {tool} {flags} "$@"\n'
        if not command.exists() or command.read_text() != script:  # its time tells a compiler cache
            command.write_text(script)
            command.chmod(0o755)
    names = {"C": "cc", "CXX": "c++", "RC": "rc"}
    return {
        **{f"CMAKE_{name}_COMPILER": folder / f"zig-{tool}" for name, tool in names.items()},
        "CMAKE_AR": folder / "zig-ar",
        "CMAKE_RANLIB": folder / "zig-ranlib",
    }


def whole(target: Target, jobs: int) -> bool:
    """As CMakeLists.txt has it: libraries, module and native tests."""
    folder = BUILD / target.name / "build"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DCMAKE_TOOLCHAIN_FILE={toolchain(target)}", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    build = ["cmake", "--build", str(folder), "--parallel", str(jobs)]
    for words in (configure, build):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            print((done.stdout + done.stderr)[-6000:])
            return False
    return True


def run_tests(target: Target) -> bool:
    """The native tests of a build, each as its platform runs it: under QEMU with every instruction
    that it knows, or under Wine."""
    folder = BUILD / target.name / "build"
    model, *others = [str(folder / f"{name}.gguf") for name in ("tiny", "mtp", "hybrid")]
    write = ROOT / "native" / "tests" / "write_model.py"
    subprocess.run([sys.executable, str(write), model, *others], check=True)
    tests = [f for f in sorted((folder / "native" / "tests").glob("test_*")) if is_program(f)]
    if not tests:
        print(f"{target.name}: no native tests in {folder}")
    # Wine looks for libraries on its own path.
    places = ";".join(f"Z:{folder / part}" for part in ("bin", "llama.cpp/bin"))
    environment = {**os.environ, "WINEPATH": places, "WINEDEBUG": "-all"}
    environment["WINEPREFIX"] = str(BUILD / "wine")
    environment.setdefault("PLB_TEST_ROWS", EMULATED_ROWS)
    good = bool(tests)
    for test in tests:
        began = time.monotonic()
        words = [*target.run, str(test), model, str(LLAMA), str(EMBEDDED), *others]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env=environment, errors="replace"
        )
        state = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"  {test.name}: {state}, {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            print((done.stdout + done.stderr)[-3000:])
            good = False
    return good


def is_program(file: Path) -> bool:
    runs = file.suffix == ".exe" or (not file.suffix and os.access(file, os.X_OK))
    return runs and file.is_file()


if __name__ == "__main__":
    sys.exit(main())
