"""The folder for what is slow to make: models and built tools."""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def cache_folder(*parts: str) -> Path:
    """The user's cache folder for the benches, with `parts` below it, made if missing.

    `PYLLAMABATCH_BENCH_CACHE` names another place; else it is what the system uses
    (`$XDG_CACHE_HOME`, `~/Library/Caches`, `%LOCALAPPDATA%`).
    """
    named = os.environ.get("PYLLAMABATCH_BENCH_CACHE")
    if named:
        base = Path(named)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches" / "pyllamabatch" / "bench"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home())) / "pyllamabatch" / "bench"
    else:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = Path(home) / "pyllamabatch" / "bench"
    folder = base.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
