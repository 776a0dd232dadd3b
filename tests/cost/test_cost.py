"""The cost model: what it recovers of a known device, its limits, and its refinement."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pyllamabatch.cost.fit import nnls
from pyllamabatch.cost.kernels import Kernels, Regime, kernels
from pyllamabatch.cost.model import CostModel, held_out
from pyllamabatch.cost.prior import CPU, GPU, Sizes
from pyllamabatch.cost.profile import Key, Profile, Sample
from pyllamabatch.cost.terms import Terms, Ubatch
from pyllamabatch.errors import ArgumentError
from tests.support.made_up_profiles import CUDA, H200, KNOWN, error, h200, made_up, profile


def test_h200_edge() -> None:
    """The step from 8 to 9 rows is there, and nine streams are better served eight at a time."""
    cost = CostModel.fit(profile(h200()))
    eight, nine = cost.predict(8, 0, 9 * 128, 8), cost.predict(9, 0, 9 * 128, 9)
    assert nine / eight > 1.25
    assert 8 / eight > 1.1 * 9 / nine


@pytest.mark.parametrize(("outlier", "median"), [(1.0, 0.02), (8.0, 0.06)])
def test_recovers_a_device(outlier: float, median: float) -> None:
    """A tenth of the samples may be far off: they are weighed down."""
    samples = made_up(1)
    samples[::10] = [replace(s, seconds=outlier * s.seconds) for s in samples[::10]]
    cost = CostModel.fit(profile(samples, KNOWN))
    errors = [error(cost, s) for s in made_up(2, noise=0.0)]
    assert np.median(errors) < median
    assert outlier > 1 or (max(errors) < 0.1 and cost.error[0] < 0.03)


def test_more_work_takes_longer() -> None:
    cost = CostModel.fit(profile(made_up(6), KNOWN))
    assert cost.predict(0) == 0.0
    assert cost.predict(8, 0, 800, 8) <= cost.predict(8, 0, 80000, 8)
    assert cost.predict(8, 0, 800, 8) <= cost.predict(24, 0, 800, 24)
    assert cost.predict(512, 512, 0, 1) < cost.predict(1300, 1300, 0, 1)
    assert cost.predict(1024, 1024, 0, 1) >= 2 * cost.predict(512, 512, 0, 1)


def test_predict_agrees_with_the_terms() -> None:
    """The tables of `predict` give what the formula says, in one ubatch and in several."""
    for unified in (True, False):
        cost = CostModel.fit(profile(h200() + made_up(7), share=0.3), unified=unified)
        for shape in ((5, 0, 640, 5), (64, 60, 2000, 5), (700, 690, 3000, 11), (96, 96, 0, 2)):
            formula = sum(
                cost.coefficients.get(name, 0.0) * value
                for name, value in cost.terms.of_step(shape, 512).items()
            )
            assert math.isclose(cost.predict(*shape), formula, rel_tol=1e-9)


@pytest.mark.parametrize("window", [0, 500])
def test_prompt_rows_deeper_than_the_average(window: int) -> None:
    """As the formula has it of a ubatch whose prompt rows look at other cells than its sequences
    hold on average."""
    cost = CostModel.fit(profile(h200() + made_up(7), share=0.3))
    cost.terms = replace(cost.terms, window=window, window_share=0.5 * bool(window))

    def seconds(looked_at: float) -> float:
        ubatch = Ubatch(308, 8, 9, 7000.0, 777.0, looked_at + 150)
        return sum(cost.coefficients[name] * x for name, x in cost.terms.of(ubatch).items())

    looks = cost.terms.looked_at
    for depth in (0, 777, 6000):
        deeper = cost.deeper(300, 777.0, depth)
        assert deeper == pytest.approx(seconds(looks(depth)) - seconds(looks(777.0)), abs=1e-12)
        assert math.copysign(1, deeper) == math.copysign(1, depth - 777)


def test_tiles_of_another_kernel() -> None:
    """Steps at tiles of 16 beside another kernel's rows are found, and said before measuring."""
    found = Kernels((Regime(1), Regime(2)), tiles=(16, 32))
    samples = tuple(
        Sample(n, 0, 0, n, True, 5e-3 + 1e-4 * n + 2e-3 * -(-n // 16) * (n > 1))
        for n in (1, 2, 3, 4, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 49, 64)
    )
    cost = CostModel.fit(Profile(Key("", "", ""), found, samples, 512))
    assert cost.predict(33, 0, 0, 33) - cost.predict(32, 0, 0, 32) == pytest.approx(2.1e-3, rel=0.1)
    assert cost.predict(30, 0, 0, 30) - cost.predict(20, 0, 0, 20) == pytest.approx(1e-3, rel=0.1)
    prior = CostModel.prior(found, Sizes(1e9, 2e9), CPU)
    assert prior.predict(17, 0, 0, 17) - prior.predict(16, 0, 0, 16) > prior.predict(
        16, 0, 0, 16
    ) - prior.predict(15, 0, 0, 15)


def test_two_rows_and_three_on_a_cpu() -> None:
    """As two cores with AVX2 take them, in ms: what two rows cost says nothing about three."""
    took = {1: 26, 2: 46, 3: 89, 4: 90, 5: 117, 6: 118, 7: 153, 8: 159, 9: 188, 10: 187, 11: 214,
            12: 213, 13: 241, 16: 214, 17: 239, 20: 264, 24: 332, 32: 410, 48: 671}  # fmt: skip
    samples = tuple(Sample(n, 0, 128 * n, n, True, 1e-3 * ms) for n, ms in took.items())
    found = kernels("CPU", "Q5_0", features="AVX2")
    cost = CostModel.fit(profile(list(samples), found, share=0.37))
    for n in (1, 2, 3, 4):
        assert cost.predict(n, 0, 128 * n, n) == pytest.approx(1e-3 * took[n], rel=0.06)


def test_the_last_row_of_a_prompt_is_sampled() -> None:
    """Rows that pass the output matrix: those that decode, and one of each prompt."""
    samples = tuple(
        Sample(n, prefill, 0, n - prefill + bool(prefill), True,
               1e-3 + 1e-5 * n + 1e-3 * (n - prefill + bool(prefill)))
        for n in (1, 2, 4, 8, 16, 32, 64)
        for prefill in {0, n, n // 2}
    )  # fmt: skip
    cost = CostModel.fit(Profile(Key("", "", ""), Kernels((Regime(1),)), samples, 512))
    assert cost.predict(64, 64, 0, 1) == pytest.approx(1e-3 + 64e-5 + 1e-3, rel=0.02)
    assert cost.predict(64, 64, 0, 4) == pytest.approx(1e-3 + 64e-5 + 4e-3, rel=0.02)
    assert cost.predict(64, 56, 0, 9) == pytest.approx(1e-3 + 64e-5 + 9e-3, rel=0.02)


def test_new_graphs() -> None:
    samples = h200()
    known = [replace(s, new=5e-3 + 1e-5 * i, settle=1e-3) for i, s in enumerate(samples[:3])]
    cost = CostModel.fit(profile([*known, *samples[3:]]))
    assert cost.new_graph.step == pytest.approx(5.01e-3)
    assert cost.new_graph.settle == 1e-3
    assert CostModel.fit(profile(samples)).new_graph == (0.0, 0.0)
    slower = cost.at_speed(1.5, 2.0)
    assert slower.predict(4, 0, 100, 4) == pytest.approx(1.5 * cost.predict(4, 0, 100, 4))
    assert slower.predict(40, 36, 100, 5) == pytest.approx(2 * cost.predict(40, 36, 100, 5))
    assert slower.new_graph == cost.new_graph
    each = cost.at_speed([1.1, 1.2, 1.3, 1.4], 2.0, 3.0)  # 1, 2 to 8, 9 to 128 rows, and more
    for n, factor in ((1, 1.1), (2, 1.2), (8, 1.2), (9, 1.3), (64, 1.3)):
        assert each.predict(n, 0, 100, n) == pytest.approx(factor * cost.predict(n, 0, 100, n))
    assert each.predict(40, 36, 100, 5) == pytest.approx(2 * cost.predict(40, 36, 100, 5))
    assert each.new_graph == pytest.approx((3 * cost.new_graph.step, 3 * cost.new_graph.settle))
    assert each.n_regimes == 4
    assert [each.regime_of(n) for n in (8, 9, 999)] == [1, 2, 3]
    with pytest.raises(ValueError, match="shorter"):
        cost.at_speed([1.1, 1.2], 2.0)


def test_steps_of_several_ubatches_make_their_graphs_each_time() -> None:
    """Their samples have them in it, and the model of a step has not."""
    graph, samples = 2e-3, []
    for n in (1, 2, 4, 8, 16, 32, 64):
        samples.append(Sample(n, 0, 0, n, False, 2e-3 + 1e-5 * n, new=graph, settle=0.0))
        samples.append(Sample(n, n, 0, 1, False, 2e-3 + 1e-5 * n, new=graph, settle=0.0))
        mixed = 4e-3 + 1e-5 * (4 + n) + 2 * graph
        samples.append(Sample(4 + n, n, 0, 5, False, mixed, new=0.0, settle=0.0))
    plain = Profile(Key("", "", ""), Kernels((Regime(1),)), tuple(samples), 512)
    cost = CostModel.fit(plain, unified=False)
    assert cost.new_graph.step == pytest.approx(graph)
    assert cost.predict(36, 32, 0, 5) == pytest.approx(4e-3 + 36e-5, rel=0.01)
    assert max(held_out(plain, unified=False)) < 0.03


def test_split() -> None:
    shared, apart = (Terms(KNOWN, 0.0, unified) for unified in (True, False))
    assert shared.split(0, 0, 0, 0, 512) == []
    assert shared.split(5, 0, 50, 5, 512) == [Ubatch(5, 5, 5, 50, 10, 10)]
    first, second = shared.split(600, 590, 0, 11, 512)
    assert (first.rows, first.sampled, second.rows, second.sampled) == (512, 10, 88, 1)
    # cells of each sequence's own: those that decode, then the prompt
    first, second = apart.split(104, 100, 0, 5, 512)
    assert (first.rows, first.sampled, second.rows, second.sampled) == (4, 4, 100, 1)
    # more that decode than fit into one
    found = apart.split(30, 10, 210, 21, 16)
    assert found[:2] == [Ubatch(16, 16, 16, 168, 10), Ubatch(4, 4, 4, 42, 10)]
    assert [part.rows for part in found] == [16, 4, 10]
    cost = CostModel.fit(profile(h200() + made_up(7)), unified=False, n_ubatch=16)
    assert cost.predict(30, 10, 210, 21) > cost.predict(10, 10, 0, 1)


def test_sequences_that_do_not_add_up() -> None:
    """A policy's slip is no division by zero."""
    cost = CostModel.fit(profile(h200() + made_up(9)))
    for shape in ((12, 4, 100, 8), (4, 4, 0, 0), (600, 592, 100, 8)):
        assert cost.predict(*shape) > 0


def test_too_few_samples() -> None:
    with pytest.raises(ArgumentError, match="samples"):
        CostModel.fit(profile(h200()[:3]))


def test_observe_moves_a_regime() -> None:
    cost = CostModel.fit(profile(h200()))
    four, others = (4, 0, 512, 4), ((12, 0, 1536, 12), (64, 64, 0, 1))
    before, theirs = cost.predict(*four), [cost.predict(*shape) for shape in others]
    cost.observe(*others[0], theirs[0])
    for _ in range(200):
        cost.observe(*four, 1.5 * before)
    assert cost.predict(*four) == pytest.approx(1.5 * before, rel=0.05)
    assert [cost.predict(*shape) for shape in others] == theirs
    for _ in range(2000):
        cost.observe(*four, 1000 * before)
    assert cost.predict(*four) <= 4.0001 * before  # bounded


def test_an_unseen_regime_follows_the_mean_of_the_others() -> None:
    """A device that is a tenth faster today: what 8 rows and 9 are to each other stays, whichever
    were made."""
    cost = CostModel.fit(profile(h200()))
    shapes = [(n, 0, 128.0 * n, n) for n in (1, 4, 9)]
    before = [cost.predict(*shape) for shape in shapes]

    def follow(i: int, factor: float) -> list[float]:
        for _ in range(40):
            cost.observe(*shapes[i], factor * before[i])
        now = zip(shapes, before, strict=True)
        return [cost.predict(*shape) / seconds for shape, seconds in now]

    assert follow(2, 0.9) == pytest.approx([0.9, 0.9, 0.9], rel=0.01)
    # what was seen itself stays where it is; what was not follows both
    assert follow(1, 0.7)[1:] == pytest.approx([0.7, 0.9], rel=0.02)
    cost = CostModel.fit(profile(h200()))
    follow(0, 1.2)
    assert follow(1, 1.2) == pytest.approx([1.2, 1.2, 1.2], rel=0.03)


def test_one_step_moves_little() -> None:
    cost = CostModel.fit(profile(h200()))
    before = cost.predict(4, 0, 512, 4)
    cost.observe(4, 0, 512, 4, 1e6)
    assert cost.predict(4, 0, 512, 4) <= 1.25 * before
    for nonsense in (0.0, -1.0, math.nan):
        cost.observe(4, 0, 512, 4, nonsense)
    cost.observe(0, 0, 0, 0, 1.0)
    assert cost.predict(4, 0, 512, 4) <= 1.25 * before


def test_a_call_of_many_steps_says_more_than_one() -> None:
    """As much as eight, which correct four fifths of what the fit has wrong."""
    before = CostModel.fit(profile(h200())).predict(4, 0, 512, 4)
    factors = []
    for n_steps in (1, 8, 500):
        cost = CostModel.fit(profile(h200()))
        cost.observe(4, 0, 512, 4, 0.75 * before, n_steps)
        factors.append(cost.predict(4, 0, 512, 4) / before)
    many = 0.75**0.8
    assert factors == pytest.approx([0.75 ** (1 / 3), many, many])
    one_by_one = CostModel.fit(profile(h200()))
    for _ in range(8):
        one_by_one.observe(4, 0, 512, 4, 0.75 * before)
    assert one_by_one.predict(4, 0, 512, 4) / before == pytest.approx(many, abs=0.02)


@pytest.mark.parametrize("off", [20.0, 1e-3])
def test_a_step_that_is_far_off_for_once_says_little_of_others_to_a_prior(off: float) -> None:
    """The first one of its kernel, in which a device prepares itself, where the level is known; or
    what was left of a call for the prompts before it."""
    cost = CostModel.prior(CUDA, Sizes(1e9, 1e9), GPU)
    shapes = [(n, 0, 512, n) for n in (1, 4, 16)]
    cost.observe(*shapes[1], 0.5 * cost.predict(*shapes[1]), 8)
    known = [cost.predict(*shape) for shape in shapes]
    cost.observe(*shapes[0], off * known[0])
    found = [cost.predict(*shape) for shape in shapes]
    assert all(0.6 < now / before < 1.6 for now, before in zip(found, known, strict=True))
    assert found[1] == known[1]
    for _ in range(10):
        cost.observe(*shapes[0], known[0])
    assert cost.predict(*shapes[0]) == pytest.approx(known[0], rel=0.15)


def test_prior_learns_its_level() -> None:
    cost = CostModel.prior(CUDA, Sizes(1e9, 1e9), GPU)
    assert not cost.calibrated
    assert cost.predict(9) >= cost.predict(8)
    for n in (1, 4, 8, 16, 32):
        for _ in range(50):
            cost.observe(n, 0, 128 * n, n, H200[n] / 1e3)
    for n in (1, 4, 8, 16, 32):
        assert cost.predict(n, 0, 128 * n, n) == pytest.approx(H200[n] / 1e3, rel=0.5)


def test_the_first_group_of_rows_may_cost_more_than_those_behind_it() -> None:
    """Two x86 cores, rows of one prompt: 16 take 102 ms, 32 take 180, 48 take 215."""
    cpu = kernels("CPU", "Q4_K", features="AVX512")

    def seconds(n: int) -> float:
        return 0.018 + (0.031 if n >= 16 else 0.002) + 0.0037 * n

    samples = [Sample(n, 0, 0, n, True, seconds(n)) for n in (*range(1, 34), 48, 60, 64)]
    cost = CostModel.fit(profile(samples, cpu))
    for n in (8, 12, 16, 32, 48):
        assert cost.predict(n, 0, 0, n) == pytest.approx(seconds(n), rel=0.04)


def test_experts() -> None:
    terms = Terms(KNOWN, 0.0, True, 8, 2)
    touched = [terms.experts(n) for n in (1, 2, 8, 64)]
    assert touched[0] == pytest.approx(0.25)
    assert touched == sorted(touched)
    assert touched[-1] == pytest.approx(1.0)


def test_nnls() -> None:
    random = np.random.default_rng(0)
    design = random.random((40, 6))
    exact = np.array([1.0, 0.0, 2.0, 0.0, 0.5, 3.0])
    assert np.allclose(nnls(design, design @ exact), exact, atol=1e-8)
    for seed in range(20):  # the optimum's own conditions (Karush, Kuhn, Tucker)
        random = np.random.default_rng(seed)
        design, target = random.normal(size=(30, 8)), random.normal(size=30)
        x = nnls(design, target)
        slope = design.T @ (design @ x - target)
        assert (x >= 0).all()
        assert (slope > -1e-7).all()
        assert np.abs(slope[x > 0]).max(initial=0) < 1e-7
