"""A Debian of another release or processor, and the tests of a wheel in it. As root, on Debian:

    python -m tools.debian_root --wheel FILE.whl --suite forky        # a newer Python
    python -m tools.debian_root --wheel FILE.whl --arch arm64         # emulated

Needs mmdebstrap, and for another processor qemu-user-static. Roots stay in build/roots. The wheel
is installed in an environment of the root's own Python; the tests lie apart from any checkout.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ROOT / "build" / "roots"
PACKAGES = "ca-certificates,python3-venv"
TESTS = "tests/test_smoke.py tests/step/test_stepper.py tests/properties/test_invariance_engine.py"
NEEDED = ("pytest", "pytest-timeout", "hypothesis", "gguf")  # by the tests
BINFMT = Path("/proc/sys/fs/binfmt_misc")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
# An ELF program's first bytes, and which of them count: class, order and processor.
ARM64_MAGIC = r"\x7fELF\x02\x01\x01\x00" + r"\x00" * 8 + r"\x02\x00\xb7\x00"
ARM64_MASK = r"\xff" * 7 + r"\x00" + r"\xff" * 8 + r"\xfe\xff\xff\xff"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--suite", default="bookworm", help="Debian's release (bookworm)")
    own = MACHINES.get(platform.machine(), platform.machine())
    parser.add_argument("--arch", default=own, choices=["amd64", "arm64"], help=f"({own})")
    parser.add_argument(
        "--snapshot", action="store_true", help="the mirror is one: how old it is does not matter"
    )
    parser.add_argument("--tests", default=TESTS, help=f"files or folders of tests ({TESTS})")
    options = parser.parse_args()
    if not options.wheel.is_file():
        parser.error(f"--wheel {options.wheel}: no such file")
    if os.geteuid() != 0:
        parser.error("as root: a root folder is entered by chroot")
    if shutil.which("mmdebstrap") is None:
        parser.error("there is no mmdebstrap (Debian: apt install mmdebstrap)")
    with foreign_programs(needed=options.arch != own):
        root = made(options.suite, options.arch, snapshot=options.snapshot)
        with mounted(root):
            return tested(root, options.wheel, options.tests.split())


@contextmanager
def foreign_programs(*, needed: bool) -> Iterator[None]:
    """Inside, the kernel starts programs for Arm with QEMU."""
    name = BINFMT / "qemu-aarch64"
    if not needed or name.exists():
        yield
        return
    qemu = shutil.which("qemu-aarch64-static")
    if qemu is None:
        raise SystemExit("there is no qemu-aarch64-static (Debian: apt install qemu-user-static)")
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "none", str(BINFMT)], check=True)
    # F: the kernel opens QEMU now, so that a root needs no copy of it.
    (BINFMT / "register").write_text(f":{name.name}:M::{ARM64_MAGIC}:{ARM64_MASK}:{qemu}:F")
    try:
        yield
    finally:
        name.write_text("-1")


def made(suite: str, arch: str, *, snapshot: bool) -> Path:
    """The root, which is made where it is not there yet."""
    root = ROOTS / f"{suite}-{arch}"
    if not root.exists():
        began, parts = time.monotonic(), root.with_suffix(".new")
        shutil.rmtree(parts, ignore_errors=True)
        parts.parent.mkdir(parents=True, exist_ok=True)
        words = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}"]
        words += ["--aptopt=Acquire::Check-Valid-Until false"] if snapshot else []
        subprocess.run([*words, f"--architectures={arch}", suite, str(parts)], check=True)
        parts.rename(root)
        print(f"{root.name}: made in {time.monotonic() - began:.0f} s", flush=True)
    return root


@contextmanager
def mounted(root: Path) -> Iterator[None]:
    """Inside, the root has the kernel's own files, and this machine's way into the network."""
    for file in ("resolv.conf", "ssl/certs/ca-certificates.crt"):
        shutil.copy(Path("/etc") / file, root / "etc" / file)
    mounts: list[Path] = []
    try:
        for kind, place in (("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "dev/shm")):
            (root / place).mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", kind, kind, str(root / place)], check=True)
            mounts.append(root / place)
        yield
    finally:
        for mount in reversed(mounts):
            subprocess.run(["umount", str(mount)], check=True)


def tested(root: Path, wheel: Path, tests: list[str]) -> int:
    """pytest's exit status, or that of what fails before it."""
    place = root / "work"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copy(wheel, place)
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    python = "environment/bin/python"
    pip = [python, "-m", "pip", "install", "-q", "--prefer-binary"]
    steps = (
        ["python3", "-m", "venv", "environment"],
        [*pip, f"./{wheel.name}", *NEEDED],
        [python, "-c", "import sys, platform; print(sys.version, platform.machine())"],
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
    )
    for step in steps:
        began = time.monotonic()
        words = ["chroot", str(root), "/bin/sh", "-c", 'cd /work && exec "$@"', "sh", *step]
        status = subprocess.run(words, check=False).returncode
        print(f"{' '.join(step)}: {status}, {time.monotonic() - began:.0f} s", flush=True)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
