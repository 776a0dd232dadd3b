"""Priors of Apple's chips: their level from the memory's bandwidth, beside what was published."""

import pytest

from pyllamabatch.cost.apple import BANDWIDTH, chip_of, read_rate
from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import shipped_profile
from pyllamabatch.cost.terms import Experts
from pyllamabatch.planner.machines import _CHIPS


@pytest.mark.parametrize(
    ("description", "chip"),
    [
        ("Apple M2 Ultra", "M2 Ultra"),
        ("Apple M5", "M5"),
        ("Apple M10 Pro", "M10 Pro"),
        ("Apple A19", None),
        ("NVIDIA H200", None),
        ("AMD Radeon Pro M295X", None),
    ],
)
def test_chips(description: str, chip: str | None) -> None:
    assert chip_of(description) == chip
    assert (read_rate(description) is None) == (chip not in BANDWIDTH)


def test_every_chip_of_the_planner_has_a_bandwidth() -> None:
    assert {name.lower().replace(" ", "-") for name in BANDWIDTH} == set(_CHIPS)


@pytest.mark.parametrize(
    ("profile", "gigabytes"),
    # Sizes of the files that the tables name, without the input embedding.
    [("m2-ultra-qwen2.5-coder-7b-q8_0", 8.1), ("m2-ultra-gemma-3-4b-it-qat", 3.16)],
)
def test_a_priors_level_is_that_of_the_published_tables(profile: str, gigabytes: float) -> None:
    """Within a factor of two for a row alone: the level is a guess, not a measurement."""
    measured = shipped_profile(profile).samples[1]
    assert measured.rows == 1
    rate = read_rate("Apple M2 Ultra")
    prior = CostModel.prior(kernels("MTL", "Q8_0"), gigabytes * 1e9, gpu=True, rate=rate)
    assert 0.5 < prior.predict(1, 0, measured.kv, 1) / measured.seconds < 2
    assert not prior.absolute


MXFP4, Q8_0 = 17 / 32, 34 / 32  # bytes of a weight


@pytest.mark.parametrize(
    ("profile", "kind", "gigabytes", "experts"),
    # Layers with experts, experts, three matrices of each: the models' own configurations.
    [
        ("gpt-oss-120b", "MXFP4", 63.4, Experts(36 * 128 * 3 * 2880 * 2880 * MXFP4, 128, 4)),
        ("gpt-oss-20b", "MXFP4", 12.1, Experts(24 * 32 * 3 * 2880 * 2880 * MXFP4, 32, 4)),
        (
            "qwen3-coder-30b-a3b-instruct-q8_0",
            "Q8_0",
            32.5,
            Experts(48 * 128 * 3 * 2048 * 768 * Q8_0, 128, 8),
        ),
        ("glm-4.7-flash", "Q8_0", 31.8, Experts(46 * 64 * 3 * 2048 * 1536 * Q8_0, 64, 4)),
    ],
)
def test_a_prior_reads_the_experts_that_its_rows_use(
    profile: str, kind: str, gigabytes: float, experts: Experts
) -> None:
    """Within a factor of three, from one row to 512."""
    rate = read_rate("Apple M2 Ultra")
    known = kernels("MTL", kind, moe=True)
    n_bytes = gigabytes * 1e9
    prior = CostModel.prior(known, n_bytes, 2048, gpu=True, rate=rate, experts=experts)
    measured = [s for s in shipped_profile(f"m2-ultra-{profile}").samples if s.kv <= 528 * s.n_seqs]
    ratios = [prior.predict(*s.shape) / s.seconds for s in measured if s.rows <= 512]
    assert len(ratios) == 8
    assert all(1 / 3 < ratio < 3 for ratio in ratios), ratios
