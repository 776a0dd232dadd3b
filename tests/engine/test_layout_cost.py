"""The layout by price: a pool where it is faster on the device, streams elsewhere."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.prior import GPU, Sizes
from pyllamabatch.cost.profile import Profile, shipped_profile
from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.layout_cost import pool_pays, pool_speed
from pyllamabatch.sim import EngineSpec, simulate, workload

M2 = "m2-ultra-gemma-3-4b-it-qat"
H200 = "nvidia-h200-gemma-3-1b-q4_k_m"
SPARK = "dgx-spark-qwen2.5-coder-7b-q8_0"
CPU = "x86-2-core-avx512-qwen2-0.5b-q4_k_m"


@cache
def fitted(name: str, unified: bool) -> CostModel:
    return CostModel.fit(shipped_profile(name), unified=unified)


def simulated_speed(name: str, n: int) -> float:
    trace = f"closed:clients={n},n={4 * n},prompt=100-400,output=32-224"

    def speed(unified: bool) -> float:
        spec = EngineSpec.of(fitted(name, unified), n_seq_max=n, unified=unified)
        return simulate(workload.draw(trace, seed=1), spec).summary()["tokens_per_s"]

    return speed(True) / speed(False)


@pytest.mark.parametrize(("name", "n"), [(H200, 8), (CPU, 8)])
def test_the_faster_layout_is_chosen_as_the_simulator_sees_it(name: str, n: int) -> None:
    speed = pool_speed(lambda unified: fitted(name, unified), n)
    assert speed is not None
    assert not pool_pays(speed)
    assert simulated_speed(name, n) < 1.02
    with Engine(machine=name, n_seq_max=n) as engine:
        assert not engine.limits.unified
        assert "times as fast as a pool" in engine.layout


def with_pool(name: str, folder: Path, slower: float) -> Path:
    """A profile whose pool was measured, too: a step in it takes so many times what one in streams
    does."""
    profile = shipped_profile(name)
    again = (replace(s, unified=True, seconds=slower * s.seconds) for s in profile.samples)
    path = folder / "both.json"
    replace(profile, samples=(*profile.samples, *again)).save(path)
    return path


@pytest.mark.parametrize(("slower", "pool"), [(0.8, True), (0.97, False)])
def test_a_pool_is_taken_that_is_much_faster(slower: float, pool: bool, tmp_path: Path) -> None:
    """Not for a few percent: in streams an answer does not depend on its neighbours."""
    with Engine(machine=with_pool(M2, tmp_path, slower), n_seq_max=4) as engine:
        assert engine.limits.unified == pool
        assert "times as fast as" in engine.layout


def test_a_layout_that_was_not_measured_is_no_reason() -> None:
    assert pool_speed(lambda unified: fitted(M2, unified), 32) is None
    with Engine(machine=M2, n_seq_max=32) as engine:
        assert not engine.limits.unified
        assert "times as fast" not in engine.layout


def test_a_layout_that_was_asked_for_has_no_price() -> None:
    with Engine(machine=M2, n_seq_max=12, kv_unified=False) as engine:
        assert engine.layout == "a stream of cells each: as was asked for"


def test_a_guess_is_no_reason_for_a_pool() -> None:
    prior = CostModel.prior(shipped_profile(M2).kernels, Sizes(1e9, 1e9), GPU)

    def cost_of(unified: bool) -> StepCost:
        return prior

    assert pool_speed(cost_of, 12) is None
    assert not pool_pays(None)


def test_a_pool_that_is_slower_for_half_as_many_is_as_slow(tmp_path: Path) -> None:
    both = Profile.load(with_pool(M2, tmp_path, 0.8))
    streams, pool = (CostModel.fit(both, unified=unified) for unified in (False, True))
    assert pool_pays(pool_speed(lambda unified: pool if unified else streams, 12))
    few = pool.regime_of(6)
    slow = [3.0 if regime == few else 1.0 for regime in range(pool.n_regimes)]

    def cost_of(unified: bool) -> StepCost:
        return pool.at_speed(slow) if unified else streams

    speed = pool_speed(cost_of, 12)
    assert speed is not None
    assert speed < 1


def test_masked_cells_of_a_pool_that_was_not_measured_cost_where_kernels_compute_them() -> None:
    pool, streams = fitted(SPARK, True), fitted(SPARK, False)
    assert pool.predict(1, 0, 4096, 1) == pytest.approx(streams.predict(1, 0, 4096, 1), 1e-3)
    assert pool.predict(16, 0, 16 * 512, 16) > 1.05 * streams.predict(16, 0, 16 * 512, 16)
    m2_pool, m2_streams = fitted(M2, True), fitted(M2, False)  # kernels that leave them out
    assert m2_pool.predict(12, 0, 6000, 12) < 1.01 * m2_streams.predict(12, 0, 6000, 12)
