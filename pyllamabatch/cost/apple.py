"""Apple's chips, for priors of Macs that were never measured."""

import re
from typing import NamedTuple

LAYER, EXPERT_LAYER = 100e-6, 65e-6
"""Seconds that a layer's kernels take to start, and more of a layer of experts: six models of 24 to
48 layers on an M2 Ultra (llama.cpp, benches/mac-m2-ultra)."""

_READ = 0.85
"""Of a memory's bandwidth, what weights are read with: a row of Llama 2 7B Q4_0, 3.8 GB, takes
71 ms on an M1, 41 on an M4 and 12 on an M4 Max (llama.cpp discussion 4167)."""

_CORE = {"M1": 0.20e12, "M2": 0.24e12, "M3": 0.25e12, "M4": 0.30e12, "M5": 0.85e12}
"""Operations a second of a GPU core, by family: the same model's prompts of 512 tokens, at 118,
180, 187 and 221 tokens/s with 8, 10, 10 and 10 cores (there), and at 628 with 10 of an M5, whose
tensor units compute them (kavanaghpatrick/gpu-forge issue 15)."""


class Chip(NamedTuple):
    """read: bytes of weights a second. compute: operations a second in a prompt."""

    read: float
    compute: float


_SPECIFIED = {
    "M1": (68.25, 8), "M1 Pro": (200, 16), "M1 Max": (400, 32), "M1 Ultra": (800, 64),
    "M2": (100, 10), "M2 Pro": (200, 19), "M2 Max": (400, 38), "M2 Ultra": (800, 76),
    "M3": (100, 10), "M3 Pro": (150, 18), "M3 Max": (400, 40), "M3 Ultra": (819, 80),
    "M4": (120, 10), "M4 Pro": (273, 20), "M4 Max": (546, 40),
    "M5": (153, 10), "M5 Pro": (307, 20), "M5 Max": (614, 40), "M5 Ultra": (1228, 80),
}  # fmt: skip
"""GB/s of a chip's memory, and GPU cores: Apple's technical specifications (support.apple.com, docs
for Mac; M1's bandwidth is that of its LPDDR4X-4266, 128 bits; an M5 Ultra is two M5 Max). Chips
with fewer cores are sold as well, a Max then with three quarters of the bandwidth."""

CHIPS = {
    name: Chip(_READ * rate * 1e9, cores * _CORE[name.split()[0]])
    for name, (rate, cores) in _SPECIFIED.items()
}

WITH_TENSOR_UNITS = ("M5", "M6", "A19", "A20")
"""Chips on which llama.cpp uses them (ggml-metal-device.m: `has_tensor`)."""


_NEWEST = "M5"


def chip_of(description: str) -> Chip | None:
    """Of ggml's "Apple M2 Ultra", of a later one as of its kind's newest here; None for what is no
    chip of a Mac."""
    found = re.search(r"\bApple (M\d+)((?: (?:Pro|Max|Ultra))?)\b", description)
    return CHIPS.get(found[1] + found[2], CHIPS[_NEWEST + found[2]]) if found else None


def has_tensor_units(description: str) -> bool:
    return any(name in description for name in WITH_TENSOR_UNITS)
