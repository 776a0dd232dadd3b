"""Priors of Apple's chips: their level from the memory's bandwidth, beside what was published."""

from __future__ import annotations

import pytest

from pyllamabatch.cost.apple import BANDWIDTH, chip_of, read_rate
from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import shipped_profile
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
