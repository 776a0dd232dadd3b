"""The user's cache folder."""

import os
import sys
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` in $PYLLAMABATCH_CACHE, else in pyllamabatch's part of the user's cache
    folder ($XDG_CACHE_HOME or ~/.cache; ~/Library/Caches; %LOCALAPPDATA%). It need not exist."""
    named = os.environ.get("PYLLAMABATCH_CACHE")
    if named:
        return Path(named) / name
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home())
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "pyllamabatch" / name
