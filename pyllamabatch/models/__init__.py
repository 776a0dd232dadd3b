"""The default model: a small llama with a known right answer for every prompt it was made for."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def default_model_path() -> Path:
    """Path of the default model's GGUF file, at most 4 MiB, inside the installed package."""
    return Path(str(files(__name__).joinpath("default.gguf")))
