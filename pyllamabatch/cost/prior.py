"""What the terms of the cost model cost on a device that was never measured.

A step takes what each layer takes to start, a pass over the weights (`Speeds.read`) and its rows
(`Speeds.compute`); attention is not known. The constants are round figures of the shipped profiles
(cost/profiles) and of what was published; tests/cost/test_prior.py holds them against all of these.
"""

from collections.abc import Mapping
from math import hypot
from typing import NamedTuple

from pyllamabatch.cost import apple
from pyllamabatch.cost.kernels import CUDA_VEC_MAX, ROW_BY_ROW, Regime
from pyllamabatch.cost.terms import DENSE, Experts, Terms


class Speeds(NamedTuple):
    """Of a device. read: bytes of weights a second. compute: operations a second in matrix kernels,
    two for each weight and row. layer, expert_layer: seconds that a layer's kernels take to start,
    the second one more for a layer of experts. few: times the time of a row in a matrix kernel, in
    kernels of few rows; 0: rows are computed while the weights are read, few as quickly as many.
    fill: rows that a matrix kernel could compute while it fills the device."""

    read: float
    compute: float
    layer: float = 0.0
    expert_layer: float = 0.0
    few: float = 0.0
    fill: float = 0.0


class Sizes(NamedTuple):
    """Of a model. n_output: weights of the output matrix, which sampled rows pass alone."""

    n_bytes: float
    n_weights: float
    n_output: float = 0.0
    n_layer: int = 0
    experts: Experts = DENSE


# Kernels of few rows take a row four times as long as those for prompts (M2 Ultra: 2.5 to 4.4, DGX
# Spark 2.6 to 7, H200: 7), and the first tile of a matrix takes as long as 15 to 85 rows more.
_FEW, _FILL = 4.0, 40
_ROW = 2.2  # times a row in a matrix kernel, where a CPU goes row by row: IQ4_XS, Q3_K
_MOST = 512  # rows of a ubatch

GPU = Speeds(1e12, 70e12, 60e-6, few=_FEW, fill=_FILL)
"""A GPU with memory of its own: an RTX 3090, which computes Llama 2 7B Q4_0 at 158 tokens/s and its
prompts at 5,175 (a 5060 Ti 91 and 3,737, a 4090 186 and 11,993: llama.cpp discussion 15013). A
layer is that of Gemma 3 1B on H100 and H200."""
SHARED = Speeds(0.23e12, 36e12, 40e-6, few=_FEW, fill=_FILL)
"""One that shares the host's: DGX Spark, 0.85 of 273 GB/s, 22 to 56 us a layer, prompts at 33 to 39
TFLOP/s."""
CPU = Speeds(20e9, 90e9, 40e-6)
"""A thread; memory is read as fast by one as by all. x86 with AVX-512: three models, of which two
rows take 1.1 to 1.2 times as long as one, and four 1.7 to 2.1 (tests/cost/test_prior.py)."""


def speeds_of(backend: str, device: str, *, kind: str, n_threads: int) -> Speeds:
    """By ggml's names of the backend and the device, and the device's `kind` ("igpu", ...)."""
    if backend.startswith("CPU"):
        return CPU._replace(compute=n_threads * CPU.compute)
    if chip := apple.chip_of(device):
        return Speeds(chip.read, chip.compute, apple.LAYER, apple.EXPERT_LAYER, _FEW, _FILL)
    return SHARED if kind == "igpu" or backend == "MTL" else GPU


def in_turn(device: Speeds, cpu: Speeds, share: float) -> Speeds:
    """Of both, where the CPU computes this share of the layers, and the device the others."""
    rest = 1 - share
    return device._replace(
        read=1 / (rest / device.read + share / cpu.read),
        compute=1 / (rest / device.compute + share / cpu.compute),
        layer=rest * device.layer + share * cpu.layer,
        expert_layer=rest * device.expert_layer + share * cpu.expert_layer,
    )


def coefficients_of(terms: Terms, model: Sizes, device: Speeds) -> Mapping[str, float]:
    """Seconds per unit of each term."""
    kernels, experts = terms.kernels, model.experts
    dense = (model.n_bytes - experts.n_bytes) / device.read
    all_experts = experts.n_bytes / device.read
    used = experts.n_used / experts.n if experts.n else 0.0
    n_passed = model.n_weights - model.n_output - (1 - used) * experts.n_weights
    row = 2 * n_passed / device.compute
    found = {
        "base": model.n_layer * (device.layer + device.expert_layer * (experts.n > 0)),
        "output": 2 * model.n_output / device.compute,
    }
    # Metal reads each row's experts anew, until it sorts the rows by expert.
    sorted_from = next((r.first for r in kernels.regimes if "mul_mm_id" in r.kernel), 0)
    if not sorted_from:
        found["experts"] = all_experts
    found |= {f"tile of {tile}": 0.25 * dense for tile in kernels.tiles}

    def line(regime: Regime, first: int, last: int) -> tuple[float, float]:
        """From `first` to `last` rows of it: a pass, and each of the rows."""
        if not device.few:
            # Neither reading nor computing is hidden by the other one where both take as long.
            one = row * (_ROW if regime.kernel == ROW_BY_ROW else 1)
            begin, end = (hypot(dense, n * one) for n in (first, last))
            slope = (end - begin) / (last - first)
            return begin - first * slope, slope
        if first > CUDA_VEC_MAX or len(kernels.regimes) == 1:
            return dense + device.fill * row, row
        # Metal's tiles of few rows are as fast as a matrix kernel: from two rows on they beat what
        # takes `few` times as long for each (ggml-metal-common.cpp: `mul_mv_mma_rows_min`).
        if regime.tile > 1 and regime.rest == "tile":
            return dense, row
        return dense, device.few * row if first > 1 else 0.0  # reading takes longer than one

    ends = [*(regime.first for regime in kernels.regimes[1:]), _MOST]
    for regime, end in zip(kernels.regimes, ends, strict=True):
        grouped = regime.group > regime.first
        passed, one = line(regime, regime.first, regime.group if grouped else end)
        tile = regime.tile * one
        seconds = {"pass": passed, "row": one, "tile": tile}
        if regime.tile > 1:
            seconds["row"] = 0.0
        if regime.first < sorted_from:
            seconds["row"] += used * all_experts
        elif sorted_from:
            seconds["pass"] += all_experts
        if regime.rest == "each":
            seconds |= {"full tile": tile, "tile beyond": tile}
            seconds |= {f"{n} beyond": n * one for n in range(1, regime.tile)}
            seconds["any group"], each = line(regime, regime.group, end)
            seconds["group"] = regime.group * each
        found |= {f"{part} {regime.first}+": value for part, value in seconds.items()}
    return found
