"""A profile machine whose steps are short."""

from dataclasses import replace
from pathlib import Path

from pyllamabatch.cost.profile import shipped_profile

M2 = "m2-ultra-gemma-3-4b-it-qat"
FASTER = 40


def fast_profile(folder: Path) -> Path:
    """The file of a profile as M2, of a machine that is `FASTER` times as fast. Each folder's is a
    machine of its own: no other test keeps its GPU busy."""
    profile = shipped_profile(M2)
    samples = tuple(replace(s, seconds=s.seconds / FASTER) for s in profile.samples)
    path = folder / "fast.json"
    replace(profile, samples=samples, about={**profile.about, "folder": str(folder)}).save(path)
    return path
