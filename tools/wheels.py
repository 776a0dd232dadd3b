"""The wheel that travels: built, checked, and tested in clean environments of several Pythons.

    pip install build auditwheel abi3audit uv
    python -m tools.wheels                        # build it (all CPU variants), check and test it
    python -m tools.wheels --wheel FILE.whl       # check and test one that is there
    python -m tools.wheels --pythons 3.10,3.14    # "3.12", or paths of interpreters

`uv` finds the interpreters, and fetches those that are not here. Checks: `abi3audit` (no symbol
that is not in the stable interface of Python 3.10), on Linux `auditwheel show` (which platform tag
it may have), on a Mac `delocate-listdeps` (nothing but the system's own libraries). Each Python
installs the wheel in an environment of its own and answers two prompts with it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = "3.10,3.11,3.12,3.13,3.14"
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="one that is there, instead of building it")
    parser.add_argument("--native", action="store_true", help="build for this machine's CPU alone")
    parser.add_argument("--pythons", default=PYTHONS, help="comma separated: versions or paths")
    parser.add_argument("--out", type=Path, default=ROOT / "wheelhouse", help="folder to build to")
    options = parser.parse_args()
    wheel: Path = options.wheel or built(options.out, native=options.native)
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")
    if "-cp310-abi3-" not in wheel.name:
        print("its name is not of the stable interface of Python 3.10")
        return 1
    checks = [["abi3audit", sys.executable, "-m", "abi3audit", "--strict"]]
    if sys.platform == "linux":
        checks.append(["auditwheel", sys.executable, "-m", "auditwheel", "show"])
    if sys.platform == "darwin":
        checks.append(["delocate", "delocate-listdeps", "--all", "--depending"])
    found = [passes(*check, str(wheel)) for check in checks]
    found += [works(wheel, python) for python in options.pythons.split(",")]
    return 0 if all(found) else 1


def built(out: Path, *, native: bool) -> Path:
    """Built from this checkout; the newest wheel in `out`."""
    words = [sys.executable, "-m", "build", "--wheel", "-o", str(out)]
    portable = [] if native else ["-Ccmake.define.PLB_PORTABLE=ON"]
    began = time.monotonic()
    subprocess.run([*words, *portable, str(ROOT)], check=True)
    print(f"built in {time.monotonic() - began:.0f} s")
    return max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def works(wheel: Path, python: str) -> bool:
    """In a clean environment of this Python."""
    uv = [sys.executable, "-m", "uv"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "environment"
        inside = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        steps = (
            [*uv, "venv", "-q", "--python", python, str(place)],
            [*uv, "pip", "install", "-q", "--python", str(inside), str(wheel)],
            [str(inside), "-I", "-c", ANSWERS.format(inside=folder)],
        )
        good = all(passes(f"Python {python}", *step, cwd=folder, quiet=True) for step in steps)
    if good:
        print(f"Python {python}: works")
    return good


def passes(name: str, *words: str, cwd: str | None = None, quiet: bool = False) -> bool:
    """Whether the command ends with 0; prints what it says, where it is not `quiet`, or failed."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode or not quiet:
        print(f"{name}: {'passed' if not done.returncode else 'FAILED'}")
        print("".join(f"  {line}\n" for line in (done.stdout + done.stderr).strip().splitlines()))
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
