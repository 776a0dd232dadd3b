"""Apple's chips by their names."""

import pytest

from pyllamabatch.cost.apple import CHIPS, chip_of
from pyllamabatch.planner.machines import _CHIPS


@pytest.mark.parametrize(
    ("description", "chip"),
    [
        ("Apple M2 Ultra", "M2 Ultra"),
        ("Apple M5", "M5"),
        ("Apple M10 Pro", "M5 Pro"),
        ("Apple M6 (dev p0/v1)", "M5"),
        ("Apple A19", None),
        ("NVIDIA H200", None),
        ("AMD Radeon Pro M295X", None),
    ],
)
def test_chips(description: str, chip: str | None) -> None:
    assert chip_of(description) is (CHIPS[chip] if chip else None)


def test_every_chip_of_the_planner_has_a_prior() -> None:
    assert {name.lower().replace(" ", "-") for name in CHIPS} == set(_CHIPS)
