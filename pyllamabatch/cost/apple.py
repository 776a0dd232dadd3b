"""Apple's chips: what their memory gives, for priors of machines that were never measured."""

from __future__ import annotations

import re

BANDWIDTH = {
    "M1": 68.25, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800,
    "M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800,
    "M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819,
    "M4": 120, "M4 Pro": 273, "M4 Max": 546,
    "M5": 153, "M5 Pro": 307, "M5 Max": 614,
}  # fmt: skip
"""GB/s of a chip's memory: Apple's technical specifications (support.apple.com/docs/mac; M1's is
that of its LPDDR4X-4266, 128 bits). Of a Max with fewer GPU cores it is three quarters."""

READ = 0.79
"""Of that, what a step with one row reads weights with: Qwen2.5-Coder-7B Q8_0 (8.1 GB) takes 12.8
ms on an M2 Ultra (llama.cpp, benches/mac-m2-ultra)."""

WITH_TENSOR_UNITS = ("M5", "M6", "A19", "A20")
"""Chips on which llama.cpp uses them (ggml-metal-device.m: `has_tensor`)."""


def chip_of(description: str) -> str | None:
    """ "M2 Ultra" of ggml's "Apple M2 Ultra"; None for what is no chip of a Mac."""
    found = re.search(r"\bApple (M\d+(?: (?:Pro|Max|Ultra))?)\b", description)
    return found[1] if found else None


def read_rate(description: str) -> float | None:
    """Bytes of weights that the device reads in a second; None where it is no known chip."""
    rate = BANDWIDTH.get(chip_of(description) or "")
    return None if rate is None else READ * rate * 1e9


def has_tensor_units(description: str) -> bool:
    return any(name in description for name in WITH_TENSOR_UNITS)
