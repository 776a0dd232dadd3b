"""Priors beside the shipped profiles, and beside what was published of other machines.

Attention is no part of a prior: steps are compared where no cells are held.
"""

from __future__ import annotations

from statistics import median

import pytest

from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.prior import CPU, GPU, SHARED, Sizes, in_turn, speeds_of
from pyllamabatch.cost.profile import shipped_names, shipped_profile
from pyllamabatch.cost.terms import Experts

GIB = 2**30
MXFP4, Q8_0 = 17 / 32, 34 / 32  # bytes of a weight


def experts(n_layer: int, n: int, n_used: int, width: int, inner: int, size: float) -> Experts:
    n_weights = n_layer * n * 3 * width * inner
    return Experts(n_weights * size, n, n_used, n_weights)


MODELS = {  # what the tables and the models' own configurations say
    "gemma-3-4b-it-qat": Sizes(2.35 * GIB, 3.88e9, 262144 * 2560, 34),
    "qwen2.5-coder-7b-q8_0": Sizes(7.54 * GIB, 7.62e9, 152064 * 3584, 28),
    "gpt-oss-20b": Sizes(
        11.27 * GIB, 20.91e9, 201088 * 2880, 24, experts(24, 32, 4, 2880, 2880, MXFP4)
    ),
    "gpt-oss-120b": Sizes(
        59.02 * GIB, 116.83e9, 201088 * 2880, 36, experts(36, 128, 4, 2880, 2880, MXFP4)
    ),
    "qwen3-coder-30b-a3b-instruct-q8_0": Sizes(
        30.25 * GIB, 30.53e9, 151936 * 2048, 48, experts(48, 128, 8, 2048, 768, Q8_0)
    ),
    "glm-4.7-flash": Sizes(
        29.65 * GIB, 29.94e9, 154880 * 2048, 47, experts(46, 64, 4, 2048, 1536, Q8_0)
    ),
    "gemma-3-1b-q4_k_m": Sizes(799525120, 999885952, 262144 * 1152, 26),
    "qwen2-0.5b-q4_k_m": Sizes(391859712, 494032768, 151936 * 896, 24),
}
DEVICES = {  # backend, device, kind, threads
    "m2-ultra": ("MTL", "Apple M2 Ultra", "igpu", 16),
    "dgx-spark": ("CUDA", "NVIDIA GB10", "igpu", 20),
    "nvidia-h100": ("CUDA", "NVIDIA H100", "gpu", 16),
    "nvidia-h200": ("CUDA", "NVIDIA H200", "gpu", 16),
    "x86-1-thread": ("CPU", "AMD EPYC", "cpu", 1),
    "x86-2-core-amx": ("CPU", "INTEL XEON", "cpu", 2),
    "x86-2-core-avx512": ("CPU", "AMD EPYC", "cpu", 2),
}
ROWS = (1, 4, 8, 16, 64, 512)
APART = {
    # Its sequences choose far fewer experts than if they chose evenly: 32 of them take 60% more
    # time than 8, and would read twice as many.
    "dgx-spark-gpt-oss-120b": 2.2,
    # Measured when each of a few rows read the weights anew (vendor/patches/cpu-few-columns.patch).
    "x86-1-thread-qwen2-0.5b-q4_k_m": 2.1,
    "x86-2-core-avx512-qwen2-0.5b-q4_k_m": 2.0,
}


def apart(name: str) -> list[float]:
    """By how much a prior is off at each of `ROWS`, a factor of one and more: the last ones are a
    prompt."""
    device, model = next((d, m) for d in DEVICES for m in MODELS if name == f"{d}-{m}")
    backend, description, kind, n_threads = DEVICES[device]
    profile = shipped_profile(name)
    speeds = speeds_of(backend, description, kind=kind, n_threads=n_threads)
    prior = CostModel.prior(profile.kernels, MODELS[model], speeds, unified=False)
    assert not prior.absolute
    fitted = CostModel.fit(profile, unified=False, n_ubatch=512)
    shapes = [(n, n, 0, 1) if n == ROWS[-1] else (n, 0, 0, n) for n in ROWS]
    ratios = [prior.predict(*shape) / fitted.predict(*shape) for shape in shapes]
    return [max(ratio, 1 / ratio) for ratio in ratios]


@pytest.mark.parametrize("name", shipped_names())
def test_it_is_near_a_shipped_profile(name: str) -> None:
    most = 1.5 if name.startswith("m2-ultra") else APART.get(name, 1.75)
    found = apart(name)
    assert max(found) < most, found


def test_half_of_all_steps_are_within_a_fifth() -> None:
    assert median(factor for name in shipped_names() for factor in apart(name)) < 1.2


LLAMA_2_7B = Sizes(3.56 * GIB, 6.74e9, 32000 * 4096, 32)  # Q4_0
# Tokens/s: prompts of 512, and one row (llama.cpp discussion 4167; builds of 2023 to 2025).
MACS = {
    "M1": (118, 14.2), "M1 Pro": (266, 36.4), "M1 Max": (530, 61.2), "M1 Ultra": (1030, 83.7),
    "M2": (180, 21.9), "M2 Pro": (341, 38.9), "M2 Max": (671, 66.0), "M2 Ultra": (1238, 94.3),
    "M3": (187, 21.3), "M3 Pro": (342, 30.7), "M3 Max": (760, 66.3), "M3 Ultra": (1471, 92.1),
    "M4": (221, 24.1), "M4 Pro": (440, 50.7), "M4 Max": (886, 83.1),
}  # fmt: skip
CARDS = {  # the same (discussion 15013)
    "RTX 5060 Ti": (3737, 90.9), "RTX 3090": (5175, 158), "A100": (4850, 191),
    "RTX 4090": (11993, 186), "H100": (9918, 268), "RTX 5090": (14073, 290),
}  # fmt: skip


@pytest.mark.parametrize("chip", MACS)
def test_it_is_near_what_was_published_of_a_mac(chip: str) -> None:
    speeds = speeds_of("MTL", f"Apple {chip}", kind="igpu", n_threads=8)
    cost = CostModel.prior(kernels("MTL", "Q4_0"), LLAMA_2_7B, speeds)
    prompts, one = MACS[chip]
    assert cost.predict(512, 512, 0, 1) == pytest.approx(512 / prompts, rel=0.25)
    assert cost.predict(1, 0, 0, 1) == pytest.approx(1 / one, rel=0.3)


FEW = {  # CPU ms of 1, 2, 3, 4, 8 and 16 rows, one thread of an AMD EPYC with AVX-512
    Sizes(96.5e6, 134.5e6, 49152 * 576, 30): ("Q4_1", 8.3, 10.2, 12.5, 15.7, 28.8, 58.7),
    Sizes(245e6, 268e6, 262144 * 640, 18): ("Q4_K", 15.5, 17.2, 21.4, 26.2, 50.9, 105),
    MODELS["qwen2-0.5b-q4_k_m"]: ("Q4_K", 24.6, 30.4, 42.4, 51.2, 94.9, 183),
}  # SmolLM2 135M, Gemma 3 270M, Qwen2 0.5B


@pytest.mark.parametrize("sizes", FEW, ids=["smollm2", "gemma3", "qwen2"])
def test_a_cpu_computes_a_few_rows_while_it_reads(sizes: Sizes) -> None:
    """Else drafts would seem not to pay, where two rows take little longer than one."""
    weights, *measured = FEW[sizes]
    known = kernels("CPU", weights, features="AVX2 AVX512_VNNI")
    cost = CostModel.prior(known, sizes, speeds_of("CPU", "", kind="cpu", n_threads=1))
    said = [1e3 * cost.predict(n, 0, 0, n) for n in (1, 2, 3, 4, 8, 16)]
    assert said == pytest.approx(measured, rel=0.25), said


def test_a_cpu_that_goes_row_by_row_has_nothing_to_give_to_a_few() -> None:
    """IQ4_XS, 2 layers of 16.8M weights, ms of the same thread: sixteen rows are a tile, which
    takes less than six rows that are none."""
    measured = {1: 1.62, 2: 3.26, 3: 4.89, 4: 6.60, 16: 9.20}
    known = kernels("CPU", "IQ4_XS", features="AVX AVX2 AVX512 AVX512_VNNI")
    sizes = Sizes(18.3e6, 33.8e6, 259 * 1024, 2)
    cost = CostModel.prior(known, sizes, speeds_of("CPU", "", kind="cpu", n_threads=1))
    said = [1e3 * cost.predict(n, 0, 0, n) for n in measured]
    assert said == pytest.approx(list(measured.values()), rel=0.4), said
    assert cost.predict(4, 0, 0, 4) > 3 * cost.predict(1, 0, 0, 1)


@pytest.mark.parametrize(
    ("weights", "features"),
    [("Q4_K", "AVX2 AVX512_VNNI"), ("Q8_0", "AVX2"), ("F16", "AVX2"), ("Q4_K", "NEON DOTPROD")],
)
@pytest.mark.parametrize("n_threads", [1, 8, 96])
def test_no_prompt_takes_a_cpu_less_than_it_takes_to_compute(
    weights: str, features: str, n_threads: int
) -> None:
    sizes, known = MODELS["gemma-3-4b-it-qat"], kernels("CPU", weights, features=features)
    speeds = speeds_of("CPU", "", kind="cpu", n_threads=n_threads)
    took = CostModel.prior(known, sizes, speeds).predict(512, 512, 0, 1)
    computes, reads = 512 * 2 * (sizes.n_weights - sizes.n_output), sizes.n_bytes
    assert computes / speeds.compute < took < computes / speeds.compute + 2 * reads / speeds.read


@pytest.mark.parametrize("card", CARDS)
def test_it_is_near_enough_to_any_card(card: str) -> None:
    """One guess for all of them: the first step that an engine sees sets the level."""
    cost = CostModel.prior(kernels("CUDA", "Q4_0"), LLAMA_2_7B, GPU)
    for shape, n, rate in (((512, 512, 0, 1), 512, 0), ((1, 0, 0, 1), 1, 1)):
        ratio = cost.predict(*shape) / (n / CARDS[card][rate])
        assert 1 / 3.1 < ratio < 3.1


def test_the_cpu_reads_its_layers_as_slowly_as_it_does() -> None:
    assert 3 / in_turn(GPU, CPU, 1 / 3).read == pytest.approx(2 / GPU.read + 1 / CPU.read)
    assert in_turn(GPU, CPU, 0.0) == pytest.approx(GPU)


def test_a_known_chip_is_no_typical_gpu() -> None:
    cores = [speeds_of("CPU", "", kind="cpu", n_threads=n).compute for n in (1, 8)]
    assert cores[1] == 8 * cores[0]
    assert speeds_of("Vulkan", "AMD Radeon", kind="gpu", n_threads=8) == GPU
    assert speeds_of("MTL", "Apple A18 Pro", kind="gpu", n_threads=8) == SHARED
    m5, m4 = (speeds_of("MTL", f"Apple {x}", kind="igpu", n_threads=8) for x in ("M5", "M4"))
    assert 1 < m5.read / m4.read < 1.5 < m5.compute / m4.compute
