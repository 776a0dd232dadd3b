"""GGUF files of a Hugging Face hub, by `huggingface_hub` (extra `hub`).

    Model.from_hub("bartowski/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M")

Its cache, its token and its settings apply: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. A
download that was broken off goes on where it ended."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pyllamabatch.errors import ArgumentError, DownloadError

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
"""What is taken of a repository when none is named: the first of these, else its first file."""

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def hub_file(repository: str, *, token: str | None = None, endpoint: str | None = None) -> Path:
    """The path of a model's file, or of the first one of a split model, downloaded when it is not
    in the cache.

    `repository`: "owner/name", or "owner/name:quant" for the files whose names end with it.
    Raises `ArgumentError` for another form and for a quant that is not there (it names those that
    are), `DownloadError` when there is no such repository, no access, or no network."""
    try:
        from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
    except ImportError:
        raise DownloadError(
            "the hub needs the package huggingface_hub: pip install 'pyllamabatch[hub]'"
        ) from None
    name, _, quant = repository.partition(":")
    if name.count("/") != 1 or not all(name.split("/")):
        raise ArgumentError("repository", repository, 'must be "owner/name" or "owner/name:quant"')
    options: dict[str, Any] = {"token": token, "endpoint": endpoint}
    try:
        if constants.HF_HUB_OFFLINE:
            listed = [
                file.file_path.relative_to(revision.snapshot_path).as_posix()
                for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos
                for revision in repo.revisions
                for file in revision.files
                if repo.repo_id == name and "main" in revision.refs
            ]
        else:
            listed = HfApi(**options).list_repo_files(name)
        if not listed:
            raise OSError("nothing of it is here")
        files = choose(repository, listed, quant)
        folder = Path(snapshot_download(name, allow_patterns=files, **options))
    except ArgumentError:
        raise
    except Exception as error:  # its own, and those of its HTTP library, which it has changed twice
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DownloadError(f"can't bring {repository}: {reason}") from error
    return folder / files[0]


def choose(repository: str, listed: Iterable[str], quant: str = "") -> list[str]:
    """The file of this quant, or the parts of it in order. Raises `ArgumentError`."""
    models = sorted(
        file
        for file in listed
        if file.endswith(".gguf") and not fnmatch(Path(file).name.lower(), "*mmproj*")
    )
    if not models:
        raise ArgumentError("repository", repository, "it has no GGUF file")
    wanted = [quant] if quant else [*DEFAULT_QUANTS, ""]
    found = next((hits for word in wanted if (hits := _with(word, models))), [])
    if not found:
        names = sorted({quant_of(file) for file in models})
        near = get_close_matches(quant.upper(), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
        raise ArgumentError("repository", repository, hint)
    first = found[0]
    part = _PART.search(first)
    if part is None:
        return [first]
    stem = first[: part.start()]
    return [file for file in found if file.startswith(stem) and _PART.search(file)]


def quant_of(file: str) -> str:
    """The quant in a file's name, as "Q4_K_M"; the name where it has none."""
    stem = _stem(file)
    found = re.search(r"(?:^|[-._])((?:I?Q\d|F16|F32|BF16|MXFP4|TQ\d)[0-9A-Z_]*)$", stem.upper())
    return found[1] if found else stem


def _with(word: str, files: list[str]) -> list[str]:
    if not word:
        return files
    word = word.upper()  # UD-Q4_K_XL, say, of which the quant is Q4_K_XL
    return [f for f in files if quant_of(f) == word or f"-{_stem(f)}".upper().endswith(f"-{word}")]


def _stem(file: str) -> str:
    return _PART.sub("", Path(file).name).removesuffix(".gguf")
