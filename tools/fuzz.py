"""Build and run the fuzzers: `python -m tools.fuzz --minutes 5`, or `… grammar schema` for some.

They need Clang with its run-time library (Debian: clang, libclang-rt-dev). Each fuzzer starts from
its committed corpus, native/fuzz/corpus/NAME, and collects what reaches new code in
build/fuzz/corpus.
An input that crashes, hangs or breaks a check stays in build/fuzz/found, and ends this with 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES, BUILD = ROOT / "native/fuzz", ROOT / "build/fuzz"
NAMES = tuple(sorted(path.stem.removeprefix("fuzz_") for path in SOURCES.glob("fuzz_*.cpp")))
QUICK = "-O0 -g1 -DNDEBUG"  # what is not instrumented
LONGEST = 8192  # bytes of an input
MEMORY_MB, HANGS_S = 3000, 3600  # of one input; a limit of CPU time is in native/fuzz/fuzz.hpp


def clang() -> tuple[str, str]:
    """The C and the C++ compiler, the newest there is. Raises SystemExit without one."""
    for suffix in ("", *(f"-{version}" for version in range(30, 13, -1))):
        found = shutil.which(f"clang{suffix}"), shutil.which(f"clang++{suffix}")
        if found[0] and found[1]:
            return found[0], found[1]
    raise SystemExit("the fuzzers need Clang: apt install clang libclang-rt-dev")


def build(names: list[str]) -> Path:
    """Returns the folder of the programs."""
    c, cxx = clang()
    options = [
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        "-DPLB_BUILD_FUZZERS=ON",
        f"-DCMAKE_C_COMPILER={c}",
        f"-DCMAKE_CXX_COMPILER={cxx}",
        f"-DCMAKE_C_FLAGS_RELWITHDEBINFO={QUICK}",
        f"-DCMAKE_CXX_FLAGS_RELWITHDEBINFO={QUICK}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options], check=True)
    targets = [f"fuzz_{name}" for name in names]
    subprocess.run(["cmake", "--build", BUILD, "--target", *targets], check=True)
    return BUILD / "native/fuzz"


def fuzz(program: Path, name: str, seconds: int, model: Path) -> bool:
    """Whether nothing was found."""
    collected, found = BUILD / "corpus" / name, BUILD / "found"
    collected.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [
            program, collected, SOURCES / "corpus" / name, f"-max_total_time={seconds}",
            f"-max_len={LONGEST}", f"-rss_limit_mb={MEMORY_MB}", f"-timeout={HANGS_S}",
            f"-artifact_prefix={found}/{name}-", "-print_final_stats=1", "-verbosity=0",
        ],
        env={**os.environ, "PLB_TEST_MODEL": str(model)},
        check=False,
    )  # fmt: skip
    print(f"{name}: {'nothing found' if done.returncode == 0 else f'found: see {found}'}")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--minutes", type=float, default=5, help="for each")
    options = parser.parse_args()
    names = options.names or list(NAMES)
    if unknown := set(names) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(NAMES)}")
    programs, model = build(names), BUILD / "tiny.gguf"
    write = str(ROOT / "native/tests/write_model.py")
    subprocess.run([sys.executable, write, model], check=True)
    seconds = round(60 * options.minutes)
    passed = [fuzz(programs / f"fuzz_{name}", name, seconds, model) for name in names]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
