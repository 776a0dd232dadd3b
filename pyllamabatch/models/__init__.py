"""The embedded model, a small llama with one right answer for every prompt that it was made for;
a smaller one that drafts for it; and `fetch`, which brings real ones by name."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pyllamabatch.models.catalogue import CATALOGUE as CATALOGUE
from pyllamabatch.models.catalogue import fetch as fetch


@dataclass(frozen=True)
class DefaultPrompt:
    """A prompt for the embedded model, and its only right answer. `kind`: "add", "sort", …"""

    kind: str
    prompt: str
    answer: str


def default_model_path() -> Path:
    """Path of the embedded model's GGUF file, at most 4 MiB, inside the installed package."""
    return _path("default.gguf")


def default_draft_path() -> Path:
    """Path of a model with the same vocabulary and a third of its weights, at most 1 MiB, that
    drafts for the embedded one."""
    return _path("default_draft.gguf")


def default_prompts() -> list[DefaultPrompt]:
    """32 prompts of nine kinds that the embedded model was not trained on."""
    lines = _path("default_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [DefaultPrompt(**json.loads(line)) for line in lines]


def _path(name: str) -> Path:
    return Path(str(files(__name__).joinpath(name)))
