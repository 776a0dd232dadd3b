"""The wheel that travels: built, checked, and tested in clean environments of several Pythons.

    pip install build auditwheel abi3audit uv
    python -m tools.wheels                        # build it (all CPU variants), check and test it
    python -m tools.wheels --wheel FILE.whl       # check and test one that is there
    python -m tools.wheels --pythons 3.10,debian:forky
    python -m tools.wheels --target aarch64-linux-gnu   # for its one CPU, as `tools.cross_build`

Pythons: versions, which `uv` finds or fetches; paths; or a release of Debian, whose own Python is
taken in a root of it (`tools.debian_root`). Each installs the wheel in an environment of its own
and answers two prompts with it; of another platform's wheel none does.
Checks: `abi3audit` (no symbol that is not in the stable interface of Python 3.10); `auditwheel
show` (a Linux wheel's platform tag); for a Mac's `delocate` (no library but the system's, arm64,
the macOS of its tag), which elsewhere reads it by Debian's `llvm`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tools import cross_build

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = "3.10,3.11,3.12,3.13,3.14"
DEBIAN = "debian:"
ANSWERS = """
import pyllamabatch
from pathlib import Path
assert Path(pyllamabatch.__file__).is_relative_to({inside!r}), pyllamabatch.__file__
with pyllamabatch.Model.default() as model, pyllamabatch.Engine(model, n_seq_max=2) as engine:
    params = pyllamabatch.SamplingParams(temperature=0, max_tokens=4)
    results = engine.generate(["Hello", "World"], params)
    assert [r.n_generated > 0 for r in results] == [True, True]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help="one that is there, instead of building it")
    parser.add_argument("--native", action="store_true", help="build for this machine's CPU alone")
    parser.add_argument(
        "--target", choices=list(cross_build.TARGETS), help="build it for another platform"
    )
    parser.add_argument("--pythons", default=PYTHONS, help=f"comma separated ({PYTHONS})")
    parser.add_argument(
        "--snapshot", action="store_true", help="for Debian's releases, as tools.debian_root"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "wheelhouse", help="folder to build to")
    options = parser.parse_args()
    wheel: Path = options.wheel or built(options.out, native=options.native, target=options.target)
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")
    if "-cp310-abi3-" not in wheel.name:
        print("its name is not of the stable interface of Python 3.10")
        return 1
    found = [passes("abi3audit", sys.executable, "-m", "abi3audit", "--strict", str(wheel))]
    if "linux" in wheel.name:
        found.append(passes("auditwheel", sys.executable, "-m", "auditwheel", "show", str(wheel)))
    if "macosx" in wheel.name:
        found.append(delocates(wheel))
    if own(wheel):
        pythons = options.pythons.split(",")
        found += [works(wheel, python, snapshot=options.snapshot) for python in pythons]
    return 0 if all(found) else 1


def own(wheel: Path) -> bool:
    """It is of this machine's platform."""
    machine = os.uname().machine if hasattr(os, "uname") else "amd64"
    system = {"linux": "linux", "darwin": "macosx", "win32": "win"}[sys.platform]
    return f"{system}_" in wheel.name and wheel.stem.endswith(machine)


def built(out: Path, *, native: bool, target: str | None) -> Path:
    """Built from this checkout; the newest wheel in `out`."""
    words = [sys.executable, "-m", "build", "--wheel", "-o", str(out)]
    environment = dict(os.environ)
    if target:
        # With the packages that are here: pip would bring the other platform's.
        aim = cross_build.TARGETS[target]
        words.append("--no-isolation")
        words.append(f"-Ccmake.define.CMAKE_TOOLCHAIN_FILE={cross_build.toolchain(aim)}")
        words.append(f"-Cbuild-dir={cross_build.BUILD / target / 'wheel'}")
        environment["_PYTHON_HOST_PLATFORM"] = aim.wheel
    elif not native:
        words.append("-Ccmake.define.PLB_PORTABLE=ON")
    began = time.monotonic()
    subprocess.run([*words, str(ROOT)], check=True, env=environment)
    print(f"built in {time.monotonic() - began:.0f} s")
    return max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def delocates(wheel: Path) -> bool:
    """What delocate would do to the wheel: nothing but name its own libraries by their places. It
    needs none that the system has not, is for arm64, and for no newer macOS than its name says."""
    with mac_tools() as path, tempfile.TemporaryDirectory() as out:
        words = ["delocate-wheel", "--require-archs", "arm64", "-v", "-w", out, str(wheel)]
        listed = ["delocate-listdeps", "--all", "--depending", str(wheel)]
        if not passes("delocate-listdeps", *listed, path=path):
            return False
        if not passes("delocate-wheel", *words, path=path):
            return False
        repaired = (Path(out) / wheel.name).is_file()
    if not repaired:
        print(f"delocate-wheel: FAILED\n  it gives {wheel.name} another name")
    return repaired


@contextmanager
def mac_tools() -> Iterator[str]:
    """A PATH on which delocate finds a Mac's tools: where there are none, LLVM's."""
    path = os.environ["PATH"]
    if sys.platform == "darwin":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("otool", "install-name-tool", "lipo"):
            tool = cross_build.llvm(name)
            if tool is None:
                raise SystemExit(f"there is no llvm-{name} (Debian: apt install llvm)")
            script = Path(folder) / name.replace("-", "_")
            # LLVM's otool has no -m: it takes no brackets in a file's name for a member.
            script.write_text(f"""#!/bin/sh
for word do shift; [ "$word" = -m ] || set -- "$@" "$word"; done
exec {tool} "$@"
""")
            script.chmod(0o755)
        # What would be signed is thrown away.
        (Path(folder) / "codesign").symlink_to(shutil.which("true") or "/bin/true")
        yield os.pathsep.join((folder, path))


def works(wheel: Path, python: str, *, snapshot: bool = False) -> bool:
    """In a clean environment of this Python."""
    if python.startswith(DEBIAN):
        suite = python.removeprefix(DEBIAN)
        root = [sys.executable, "-m", "tools.debian_root", "--suite", suite]
        root += ["--snapshot"] if snapshot else []
        return passes(python, *root, "--wheel", str(wheel.resolve()), cwd=str(ROOT))
    uv = [sys.executable, "-m", "uv"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "environment"
        inside = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        steps = (
            [*uv, "venv", "-q", "--python", python, str(place)],
            [*uv, "pip", "install", "-q", "--python", str(inside), str(wheel.resolve())],
            [str(inside), "-I", "-c", ANSWERS.format(inside=folder)],
        )
        good = all(passes(f"Python {python}", *step, cwd=folder, quiet=True) for step in steps)
    if good:
        print(f"Python {python}: works")
    return good


def passes(
    name: str, *words: str, cwd: str | None = None, path: str | None = None, quiet: bool = False
) -> bool:
    """Whether the command ends with 0; prints what it says, where it is not `quiet`, or failed."""
    environment = {**os.environ, "PATH": path} if path else None
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=cwd, env=environment
    )
    if done.returncode or not quiet:
        print(f"{name}: {'passed' if not done.returncode else 'FAILED'}")
        print("".join(f"  {line}\n" for line in (done.stdout + done.stderr).strip().splitlines()))
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
