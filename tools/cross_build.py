"""Build for platforms that this machine is not: `pip install -e '.[cross]'`, then

    python -m tools.cross_build                      # all of it, not optimised, every target
    python -m tools.cross_build --optimised --targets aarch64-macos     # as a wheel has it
    python -m tools.cross_build --run --targets aarch64-linux-gnu       # and its native tests

ggml and its CPU backend, libllama, the shim, the module and the native tests are compiled and
linked as CMakeLists.txt has it; then each symbol that one of them needs is looked for. `ziglang`
brings the compiler and each platform's headers. The first form finds what a platform lacks in our
code. It links without the C++ library, which zig would compile for each platform. For a Mac it
compiles Metal's C++ and the fuzzers as well (`tools/cross_build.cmake`); Metal's Objective-C and
its kernels need a Mac. For Arm Linux it compiles all but libllama, chats and the module, which have
no code of their own there, and links nothing. Compilations go through ccache where it is installed.
For Arm Linux an optimised build takes the compiler of Debian's g++-aarch64-linux-gnu.
`--run` runs the native tests of an optimised build: for Arm with qemu-aarch64-static (Debian:
qemu-user-static), for Windows with Wine (Debian: wine64).
"""

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cross"
LLAMA = ROOT / "vendor" / "llama.cpp"
EMBEDDED = ROOT / "pyllamabatch" / "models" / "default.gguf"
ZIG = [sys.executable, "-m", "ziglang"]
UNOPTIMISED = "-O0 -g0 -fno-sanitize=all"  # zig adds a sanitizer where nothing is optimised
# zig compiles its own libraries in two thirds of the time for what is linked to be small; its C++
# library takes longer than all others.
UNOPTIMISED_LINKS = "-Os -Wl,--no-gc-sections -nostdlib++"
# The oldest macOS, which the wheel's name tells, too.
MACOS = re.findall(r'MACOSX_DEPLOYMENT_TARGET = "(.+)"', (ROOT / "pyproject.toml").read_text())[0]
# What the compiler adds to a library and shows: new and delete, types of functions (no visibility
# holds for them), and where a Mac's library begins.
OF_ZIG = re.compile(r"_+(Z[nd][wla]\w*|ZT[IS]P?F\w*|dso_handle|mh_dylib_header)")
# What the C++ library defines, which its headers have declared.
OF_CXX = re.compile(
    r"_+(Z(T[ISTV]|GV|Tv0_n\d+_|Thn\d+_)?(N[VK]*)?(S[absdiot]|10__cxxabiv1)\w*|Z[nd][wla]\w*"
    r"|ZT[IS]P?K?\w|cxa_\w+|dynamic_cast|gxx_personality_\w+|Unwind_\w+)"
)
EMULATED_ROWS = "100"  # that native/tests/test_fused.cpp compares
QEMU = ("qemu-aarch64-static", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu")
WINE = ("/usr/lib/wine/wine64",)


@dataclass(frozen=True)
class Target:
    """`system`, `processor`: CMake's names. zig: what zig is told. links: what it is told in
    order to link an unoptimised build. elsewhere: CMake's targets whose code an unoptimised build
    leaves to other platforms; it links nothing then. gnu: what the names of another compiler of
    optimised builds begin with, and what it is told. run: what runs the target's programs. wheel:
    what the name of a wheel calls it."""

    name: str
    system: str
    processor: str
    zig: str
    links: str = ""
    elsewhere: tuple[str, ...] = ()
    gnu: tuple[str, str] | None = None
    run: tuple[str, ...] = ()
    wheel: str = ""


TARGETS = {
    target.name: target
    for target in (
        Target(
            "aarch64-macos",
            "Darwin",
            "arm64",
            f"-target aarch64-macos.{MACOS} -mcpu=apple_m1",
            links="-Wl,-undefined,dynamic_lookup",
            wheel=f"macosx-{MACOS}-arm64",
        ),
        Target(
            "aarch64-linux-gnu",
            "Linux",
            "aarch64",
            # zig builds its libraries anew for programs that are not position independent.
            "-target aarch64-linux-gnu -mcpu=generic+v8_2a+dotprod+i8mm+fp16fml -fPIC",
            elsewhere=("llama", "plb_common"),
            gnu=("aarch64-linux-gnu-", "-march=armv8.2-a+dotprod+i8mm+fp16fml"),
            run=QEMU,
            wheel="linux-aarch64",
        ),
        Target(
            "x86_64-windows-gnu",
            "Windows",
            "AMD64",
            "-target x86_64-windows-gnu -mcpu=x86_64_v3 -Wno-unused-command-line-argument",
            run=WINE,
            wheel="win-amd64",
        ),
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma separated")
    parser.add_argument("--optimised", action="store_true", help="as a wheel has it")
    parser.add_argument("--run", action="store_true", help="optimised, and its native tests run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"--targets {unknown[0]}: one of {', '.join(TARGETS)}")
    for target in (TARGETS[name] for name in names if options.run):
        if not target.run:
            parser.error("--run: for aarch64-linux-gnu and x86_64-windows-gnu")
        if shutil.which(target.run[0]) is None:
            parser.error(f"--run: there is no {target.run[0]}")
    failed = []
    for name in names:
        began, before, target = time.monotonic(), cpu_seconds(), TARGETS[name]
        optimised = options.optimised or options.run
        good = built(target, optimised, options.jobs) and resolved(target, optimised)
        if good and options.run:
            good = run_tests(target)
        state = "good" if good else "FAILED"
        wall, cpu = time.monotonic() - began, cpu_seconds() - before
        print(f"{name}: {state}, {wall:.0f} s, {cpu:.0f} s of CPU time", flush=True)
        failed += [] if good else [name]
    return int(bool(failed))


def cpu_seconds() -> float:
    """What ended children of this process have used."""
    times = os.times()
    return times.children_user + times.children_system


def python_headers(target: Target) -> Path:
    """Python's, for the target: this interpreter's own, whose types have the same sizes on every
    64-bit system but Windows."""
    folder = BUILD / "python" / target.name
    if not folder.exists():
        shutil.copytree(sysconfig.get_path("include"), folder)
        if target.system == "Windows":
            (folder / "pyconfig.h").write_text(WINDOWS_PYCONFIG)
    return folder


def python_interface() -> tuple[set[str], set[str]]:
    """The functions and the data of the stable interface of Python 3.10."""
    from abi3info import DATAS, FUNCTIONS
    from abi3info.models import PyVersion

    functions, data = (
        {symbol.name for symbol, entry in known.items() if entry.added <= PyVersion(3, 10)}
        for known in (FUNCTIONS, DATAS)
    )
    return functions, data


def windows_links(folder: Path) -> dict[str, object]:
    """What libraries and modules are linked with: `WINDOWS_EXPORTS`, and Python's stable interface,
    in python3.dll."""
    functions, data = python_interface()
    names = [*functions, *(f"{name} DATA" for name in data)]
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
    kinds = ("CMAKE_SHARED_LINKER_FLAGS", "CMAKE_MODULE_LINKER_FLAGS")
    return {
        "Python_SABI_LIBRARY": library,
        **dict.fromkeys(kinds, f"{exports} -L{folder}"),
    }


def no_bundles(folder: Path) -> dict[str, object]:
    """zig's linker crashes where it is to make a bundle; Python loads a library as well."""
    rules = folder / "rules.cmake"
    rules.write_text('set(CMAKE_SHARED_MODULE_CREATE_CXX_FLAGS "-dynamiclib")\n')
    return {"CMAKE_USER_MAKE_RULES_OVERRIDE_CXX": rules}


def place(target: Target, optimised: bool) -> Path:
    return BUILD / target.name / ("optimised" if optimised else "unoptimised")


def toolchain(target: Target, optimised: bool = True) -> Path:
    """CMake's file for the target, and the commands that it names."""
    folder = place(target, optimised)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "toolchain.cmake"
    links = "" if optimised else unoptimised_links(target, folder)
    settings = {
        **({} if optimised else unoptimised()),
        "CMAKE_SYSTEM_NAME": target.system,
        "CMAKE_SYSTEM_PROCESSOR": target.processor,
        **(
            gnu_commands(*target.gnu)
            if target.gnu and optimised
            else zig_commands(target, folder, links)
        ),
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


def unoptimised() -> dict[str, object]:
    languages = ("CMAKE_C_FLAGS", "CMAKE_CXX_FLAGS")
    return {
        **dict.fromkeys(languages, UNOPTIMISED),
        **dict.fromkeys((f"{name}_DEBUG" for name in languages), ""),
    }


def unoptimised_links(target: Target, folder: Path) -> str:
    words = [UNOPTIMISED_LINKS, target.links]
    if target.system == "Windows":  # whose linker leaves nothing open
        stand_in(folder, set())
        words.append(f"{folder / 'cxx.o'}")
    return " ".join(words)


def stand_in(folder: Path, names: set[str]) -> None:
    """In place of the C++ library: an object in which each of the names is a place."""
    source = folder / "cxx.s"
    lines = (f".weak {name}\n{name}:\n" for name in sorted(names))
    source.write_text("\t.text\n" + "".join(lines) + "\tret\n")
    words = [*ZIG, "cc", "-target", "x86_64-windows-gnu", "-c", str(source)]
    subprocess.run([*words, "-o", str(folder / "cxx.o")], check=True)


def of_cxx(names: set[str]) -> set[str]:
    return {name for name in names if OF_CXX.fullmatch(name)}


def needed(file: Path) -> set[str]:
    """What an object for Windows needs of others. lief has no names that end a longer one."""
    data = file.read_bytes()
    big = data.startswith(b"\0\0\xff\xff")  # one with many sections
    entry = struct.Struct("<8sIiHBB" if big else "<8sIhHBB")
    start, count = struct.unpack_from("<II", data, 48 if big else 8)
    names, index = set(), 0
    while index < count:
        name, value, section, _, storage, more = entry.unpack_from(data, start + index * entry.size)
        index += 1 + more
        if storage == 2 and not section and not value:  # external, and not here
            if name.startswith(b"\0\0\0\0"):  # its place among the strings behind the entries
                at = start + count * entry.size + int.from_bytes(name[4:], "little")
                name = data[at : data.index(0, at)]
            names.add(name.rstrip(b"\0").decode())
    return names


def gnu_commands(prefix: str, flags: str) -> dict[str, object]:
    return {
        "CMAKE_C_COMPILER": f"{prefix}gcc",
        "CMAKE_CXX_COMPILER": f"{prefix}g++",
        "CMAKE_C_FLAGS": flags,
        "CMAKE_CXX_FLAGS": flags,
    }


def llvm(tool: str) -> str | None:
    """LLVM's tool of this name, which Debian's `llvm` has: with the newest number, if with one."""
    found = [
        shutil.which(f"llvm-{tool}{end}") for end in ("", *(f"-{n}" for n in range(40, 13, -1)))
    ]
    return next(filter(None, found), None)


def zig_commands(target: Target, folder: Path, links: str) -> dict[str, object]:
    """Commands that link with `links`, also where CMake asks which compiler it is."""
    from ziglang import __file__ as package

    zig = Path(package).with_name("zig")  # Python's start is a tenth of what a small file takes
    tools = dict.fromkeys(("cc", "c++"), target.zig) | dict.fromkeys(("ar", "ranlib", "rc"), "")
    for tool, flags in tools.items():
        command = folder / f"zig-{tool}"
        run = f'exec {zig} {tool} {flags} "$@"'
        script = f"#!/bin/sh\n{run}\n"
        if links and flags:
            script = f'#!/bin/sh\ncase " $* " in *" -c "*) {run} ;; esac\n{run} {links}\n'
        if not command.exists() or command.read_text() != script:  # its time tells a compiler cache
            command.write_text(script)
            command.chmod(0o755)
    names = {"C": "cc", "CXX": "c++", "RC": "rc"}
    return {
        **{f"CMAKE_{name}_COMPILER": folder / f"zig-{tool}" for name, tool in names.items()},
        "CMAKE_AR": folder / "zig-ar",
        "CMAKE_RANLIB": folder / "zig-ranlib",
    }


def built(target: Target, optimised: bool, jobs: int) -> bool:
    """As CMakeLists.txt has it: libraries, module and native tests. Of a target that leaves code to
    others the objects alone."""
    folder = place(target, optimised) / "build"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    configure += [f"-DCMAKE_TOOLCHAIN_FILE={toolchain(target, optimised)}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    if optimised:
        configure += ["-DCMAKE_BUILD_TYPE=Release"]
    else:
        beside = Path(__file__).with_suffix(".cmake")
        configure += ["-DCMAKE_BUILD_TYPE=Debug", "-DPLB_UNITY=ON"]
        configure += [f"-DCMAKE_PROJECT_pyllamabatch_INCLUDE={beside}"]
    if shutil.which("ccache"):
        configure += [f"-DCMAKE_{language}_COMPILER_LAUNCHER=ccache" for language in ("C", "CXX")]
    build = ["cmake", "--build", str(folder), "--parallel", str(jobs)]
    if not succeeds(configure):
        return False
    if not optimised and (target.elsewhere or target.system == "Windows"):
        entries = json.loads((folder / "compile_commands.json").read_text())
        files = [Path(entry["output"]).relative_to(folder) for entry in entries]
        # CMake has all libraries linked before it compiles the module.
        elsewhere = {f"{name}.dir" for name in ("_native", *target.elsewhere)}
        compiled = [str(file) for file in files if not elsewhere & set(file.parts)]
        if not succeeds([*build, "--target", *compiled]):
            return False
        if target.elsewhere:
            return True
        names = set().union(*(needed(folder / file) for file in compiled))
        stand_in(place(target, optimised), of_cxx(names))
    return succeeds(build)


def succeeds(words: list[str]) -> bool:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        print((done.stdout + done.stderr)[-6000:])
    return not done.returncode


def resolved(target: Target, optimised: bool) -> bool:
    """Each symbol that a library, a test or the module needs is in another of them, in a library of
    the system or in the stable interface of Python; and of ours the module shows Python's entry
    alone."""
    if target.elsewhere and not optimised:
        return True
    import lief

    lief.logging.disable()  # it warns of what zig's linker leaves empty
    folder = place(target, optimised) / "build"
    (module,) = folder.glob("_native*.[sp][oy]*")
    files = [file for end in ("so", "dylib", "dll") for file in folder.glob(f"bin/*.{end}")]
    files += test_programs(folder)
    binaries = {file.name: lief.parse(str(file)) for file in (*files, module)}
    shown = {name: exports(binary) for name, binary in binaries.items()}
    known = set().union(*shown.values())
    under = "_" if target.system == "Darwin" else ""  # what the names of C begin with
    python = {under + name for names in python_interface() for name in names}
    entry = f"{under}PyInit__native"
    wrong = [] if entry in shown[module.name] else [f"{module.name} exports no {entry}"]
    beyond = {name for name in shown[module.name] - {entry} if not OF_ZIG.fullmatch(name)}
    wrong += [f"{module.name} exports {symbol}" for symbol in sorted(beyond)]
    for name, binary in binaries.items():
        lacking = unbound(binary) - known - (python if name == module.name else set())
        lacking -= set() if optimised else of_cxx(lacking)
        wrong += [f"{name} needs {symbol}" for symbol in sorted(lacking)]
    print("".join(f"{target.name}: {line}\n" for line in wrong[:40]), end="")
    return not wrong


def exports(binary: Any) -> set[str]:
    import lief

    if isinstance(binary, lief.PE.Binary):
        return {s.name for s in binary.exported_functions}
    if isinstance(binary, lief.MachO.Binary):
        return {s.name for s in binary.exported_symbols}
    return {s.name for s in binary.dynamic_symbols if s.exported}


def unbound(binary: Any) -> set[str]:
    """What it needs and is bound to no library: on a Mac by its place, on Linux by its version. On
    Windows nothing is linked unbound."""
    import lief

    if isinstance(binary, lief.PE.Binary):
        return set()
    if isinstance(binary, lief.MachO.Binary):
        return {s.name for s in binary.imported_symbols if not s.binding_info.has_library}
    weak = lief.ELF.Symbol.BINDING.WEAK
    needed = [s for s in binary.dynamic_symbols if s.imported and s.binding != weak]
    return {s.name for s in needed if not getattr(s.symbol_version, "has_auxiliary_version", False)}


def run_tests(target: Target) -> bool:
    """The native tests of a build, each as its platform runs it: under QEMU with every instruction
    that it knows, or under Wine."""
    folder = place(target, True) / "build"
    model, *others = [str(folder / f"{name}.gguf") for name in ("tiny", "mtp", "hybrid")]
    write = ROOT / "native" / "tests" / "write_model.py"
    subprocess.run([sys.executable, str(write), model, *others], check=True)
    tests = test_programs(folder)
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


def test_programs(build: Path) -> list[Path]:
    return [f for f in sorted((build / "native" / "tests").glob("test_*")) if is_program(f)]


def is_program(file: Path) -> bool:
    runs = file.suffix == ".exe" or (not file.suffix and os.access(file, os.X_OK))
    return runs and file.is_file()


if __name__ == "__main__":
    sys.exit(main())
