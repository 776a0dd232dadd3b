"""Rows for every slot, in the closed loop of an H200's profile and of two cores of a CPU."""

from typing import Any

import pytest

from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import shipped_profile
from pyllamabatch.scheduler.padding import Padding
from pyllamabatch.sim import EngineSpec, draw, simulate


@pytest.mark.parametrize(
    ("profile", "gain"),
    [("nvidia-h200-gemma-3-1b-q4_k_m", 1.05), ("x86-2-core-amx-qwen2-0.5b-q4_k_m", 0.99)],
)
def test_it_pays_where_graphs_are_dear(
    profile: str, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = CostModel.fit(shipped_profile(profile), unified=False, n_ubatch=512)
    load = draw("closed:clients=16,n=64,prompt=100-400,output=32-224", 1)
    spec = EngineSpec.of(cost, n_cells=16 * 2048, unified=False, prefix_cache=False)

    def speed() -> Any:
        return simulate(load, spec, "device-aware").summary()["tokens_per_s"]

    padded = speed()
    monkeypatch.setattr(Padding, "width", lambda *args: 0)
    assert padded >= gain * speed()
