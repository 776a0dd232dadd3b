"""Profiles of devices of which everything is known."""

import numpy as np

from pyllamabatch.cost.kernels import Kernels, Regime, kernels
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import Key, Profile, Sample

CUDA = kernels("CUDA", "Q4_K")
KNOWN = Kernels((Regime(1, 8),))

# Step times of an NVIDIA H200 (ms) by rows, Gemma-3-1B's shape in Q4_K_M, 128 cells each.
H200 = {
    1: 2.06, 2: 2.13, 3: 2.19, 4: 2.34, 5: 2.58, 6: 2.75, 7: 2.89, 8: 3.05, 9: 4.03, 10: 4.23,
    12: 4.27, 14: 4.38, 16: 4.42, 17: 4.73, 20: 4.86, 24: 5.02, 28: 5.36, 32: 5.52, 33: 5.81,
    40: 6.11, 48: 6.64, 56: 7.47, 64: 7.89,
}  # fmt: skip


def profile(samples: list[Sample], known: Kernels = CUDA, share: float = 0.0) -> Profile:
    return Profile(Key("device", "CUDA", "model"), known, tuple(samples), 512, share)


def h200() -> list[Sample]:
    return [Sample(n, 0, 128 * n, n, True, ms / 1e3) for n, ms in H200.items()]


def error(cost: CostModel, sample: Sample) -> float:
    predicted = cost.predict(sample.rows, sample.prefill, sample.kv, sample.n_seqs)
    return abs(predicted / sample.seconds - 1)


def device(rows: int, prefill: int, kv: float, n_seqs: int) -> float:
    """A made-up device: a pass, tiles of 8, sampled rows, attention to own cells."""
    own = kv / n_seqs
    chunks = n_seqs - rows + prefill
    reads = rows * own + (prefill**2 / 2 / chunks if prefill else 0.0)
    tiles = -(-rows // 8)
    return 2e-3 + 3e-4 * tiles + 5e-5 * (rows - prefill) + 2e-7 * reads


def made_up(seed: int, noise: float = 0.02) -> list[Sample]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(120):
        decode, depth = int(random.integers(0, 33)), int(random.integers(0, 2000))
        chunk = int(random.integers(1, 400)) if decode == 0 or random.random() < 0.5 else 0
        n_seqs = decode + (chunk > 0)
        shape = (decode + chunk, chunk, depth * n_seqs, n_seqs)
        seconds = device(*shape) * float(random.normal(1, noise))
        found.append(Sample(*shape, True, seconds, 0.01, 5))
    return found
