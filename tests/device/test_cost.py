"""The cost model: what it recovers of a known device, its limits, and its refinement."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pyllamabatch.device.cost import CostModel, held_out, split
from pyllamabatch.device.profile import Key, Profile, Sample, shipped_profile
from pyllamabatch.device.regimes import Kernels, Regime, kernels
from pyllamabatch.device.terms import Terms, Ubatch, nnls
from pyllamabatch.errors import ArgumentError, ProfileError

CUDA = kernels("CUDA", "Q4_K")

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


def test_h200_held_out() -> None:
    samples = h200()
    errors = []
    for i, left_out in enumerate(samples):
        errors.append(error(CostModel.fit(profile(samples[:i] + samples[i + 1 :])), left_out))
    assert np.median(errors) <= 0.05
    assert np.percentile(errors, 95) <= 0.15


def test_h200_edge() -> None:
    """The step from 8 to 9 rows is there, and nine streams are better served eight at a time."""
    cost = CostModel.fit(profile(h200()))
    eight, nine = cost.predict(8, 0, 9 * 128, 8), cost.predict(9, 0, 9 * 128, 9)
    assert nine / eight > 1.25
    assert 8 / eight > 1.1 * 9 / nine


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


KNOWN = Kernels((Regime(1, 8),))


def test_recovers_a_device() -> None:
    cost = CostModel.fit(profile(made_up(1), KNOWN))
    errors = [error(cost, s) for s in made_up(2, noise=0.0)]
    assert np.median(errors) < 0.02
    assert max(errors) < 0.1
    assert cost.calibrated
    assert cost.error[0] < 0.03
    estimate = cost.estimate(16, 8, 1000, 9)
    assert estimate.seconds == cost.predict(16, 8, 1000, 9)
    assert 0.005 < estimate.sigma < 0.1


def test_outliers_are_weighed_down() -> None:
    samples = made_up(3)
    samples[::10] = [replace(s, seconds=8 * s.seconds) for s in samples[::10]]
    cost = CostModel.fit(profile(samples, KNOWN))
    assert np.median([error(cost, s) for s in made_up(4, noise=0.0)]) < 0.06


def test_far_shapes_are_less_certain() -> None:
    near = [s for s in made_up(5) if s.kv < 8000]
    cost = CostModel.fit(profile(near, KNOWN))
    assert cost.estimate(16, 0, 200_000, 16).sigma > cost.estimate(16, 0, 4000, 16).sigma


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
            parts = split(*shape, 512, unified)
            formula = sum(
                float(np.dot(cost.terms.of(part), list(cost.coefficients.values())))
                for part in parts
            )
            assert math.isclose(cost.predict(*shape), formula, rel_tol=1e-9)


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
    again = CostModel.from_json(cost.to_json())
    assert again.predict(33, 0, 0, 33) == cost.predict(33, 0, 0, 33)
    prior = CostModel.prior(found, 1e9, gpu=False)
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
    assert CostModel.from_json(cost.to_json()).new_graph == cost.new_graph
    assert CostModel.fit(profile(samples)).new_graph == (0.0, 0.0)
    slower = cost.at_speed(1.5, 2.0)
    assert slower.predict(4, 0, 100, 4) == pytest.approx(1.5 * cost.predict(4, 0, 100, 4))
    assert slower.predict(40, 36, 100, 5) == pytest.approx(2 * cost.predict(40, 36, 100, 5))
    assert slower.new_graph == cost.new_graph


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


def test_one_sequence_alone_is_the_same_in_both_layouts() -> None:
    """What only the other layout has of it fills a hole: on an NVIDIA H200 a regime begins at 128
    rows, and with 128 and 512 alone the steps between were thought to take as long as 512."""

    def seconds(n: int) -> float:
        return 6e-3 + 2e-5 * n

    def prompts(unified: bool, *rows: int) -> list[Sample]:
        return [Sample(n, n, 0, 1, unified, seconds(n)) for n in rows]

    decode = [Sample(n, 0, 128 * n, n, False, 2e-3 + 1e-4 * n) for n in (1, 2, 4, 8)]
    streams = [*decode, *prompts(False, 32, 64, 128, 512)]
    alone = profile([*streams, *prompts(True, 192, 256, 384, 512)])
    several = [replace(s, n_seqs=2) for s in prompts(True, 192, 256, 384)]
    assert alone.only(unified=False).samples == (*streams, *prompts(True, 192, 256, 384))
    assert profile([*streams, *several]).only(unified=False).samples == tuple(streams)
    cost = CostModel.fit(alone, unified=False)
    assert cost.predict(224, 224, 0, 1) == pytest.approx(seconds(224), rel=0.05)
    # What was only measured while others used the device is a hole, too, and fills none.
    disturbed = replace(prompts(False, 192)[0], n=0, seconds=1.0)
    (calm,) = prompts(True, 192)
    assert calm in profile([*streams, disturbed, calm]).only(unified=False).samples
    assert profile([*streams, replace(calm, n=0)]).only(unified=False).samples == tuple(streams)


def test_weights_cost_the_same_in_both_layouts_and_attention_does_not() -> None:
    """Five to seven rows were measured with shared cells alone."""
    cpu = kernels("CPU", "Q4_K", features="AVX512")
    beyond = (0.0, 0.021, 0.024, 0.031)

    def seconds(n: int, own: float, unified: bool) -> float:
        weights = 0.02 + 0.028 * (n // 4) + beyond[n % 4]
        return weights + n * own * (2e-6 + 1.5e-6 * n if unified else 3.5e-6)

    def samples(unified: bool, *rows: int) -> list[Sample]:
        return [
            Sample(n, 0, n * own, n, unified, seconds(n, own, unified))
            for n in rows
            for own in (128, 1024)
        ]

    both = profile([*samples(True, *range(1, 13)), *samples(False, 1, 4, 8, 12)], cpu)
    for unified in (True, False):
        cost = CostModel.fit(both, unified=unified)
        for n in (5, 6, 7):
            expected = seconds(n, 512, unified)
            assert cost.predict(n, 0, 512 * n, n) == pytest.approx(expected, rel=0.03)
    assert max(held_out(both, unified=False)) < 0.1
    # The device was a fifth slower when it was measured with shared cells.
    slow = [replace(s, seconds=1.2 * s.seconds) for s in samples(True, *range(1, 13))]
    cost = CostModel.fit(profile([*slow, *samples(False, 1, 4, 8, 12)], cpu), unified=False)
    for n in (5, 6, 7):
        expected = seconds(n, 512, False)
        assert cost.predict(n, 0, 512 * n, n) == pytest.approx(expected, rel=0.03)


def test_held_out_of_a_layout_is_about_its_own_samples() -> None:
    """The other one's help to fit, and are not counted."""
    alone = Sample(100, 100, 0, 1, False, 1.0)
    both = profile([*h200(), *(replace(s, unified=False) for s in h200()), alone])
    assert alone in both.only(unified=True).samples
    assert len(held_out(both, unified=True)) == len(h200())
    assert len(held_out(both, unified=False)) == len(h200()) + 1
    assert held_out(profile([*h200(), alone]), unified=False) == []


def test_split() -> None:
    assert split(0, 0, 0, 0, 512, True) == []
    assert split(5, 0, 50, 5, 512, True) == [Ubatch(5, 5, 5, 50, 50, 0)]
    first, second = split(600, 590, 0, 11, 512, True)
    assert (first.rows, first.sampled, second.rows, second.sampled) == (512, 10, 88, 1)
    # cells of each sequence's own: those that decode, then the prompt
    first, second = split(104, 100, 0, 5, 512, False)
    assert (first.rows, first.sampled, second.rows, second.sampled) == (4, 4, 100, 1)


def test_json_round_trip() -> None:
    for cost in (
        CostModel.fit(profile(h200() + made_up(8), share=0.3)),
        CostModel.prior(kernels("CPU", "Q4_K"), 1e9, gpu=False, unified=False),
    ):
        again = CostModel.from_json(cost.to_json())
        for shape in ((1, 0, 100, 1), (24, 16, 9000, 9), (700, 690, 3000, 11)):
            assert again.estimate(*shape) == cost.estimate(*shape)
        assert again.calibrated == cost.calibrated
        assert again.error == cost.error
    text = cost.to_json()
    for bad in ("", "[]", text.replace("base", "bass"), text.replace('"schema": 1', '"schema": 0')):
        with pytest.raises(ProfileError):
            CostModel.from_json(bad)


def test_sequences_that_do_not_add_up() -> None:
    """A policy's slip is no division by zero."""
    cost = CostModel.fit(profile(h200() + made_up(9)))
    assert cost.predict(12, 4, 100, 8) > 0
    assert cost.predict(4, 4, 0, 0) > 0
    assert cost.predict(600, 592, 100, 8) > 0


def test_too_few_samples() -> None:
    with pytest.raises(ArgumentError, match="samples"):
        CostModel.fit(profile(h200()[:3]))


def test_observe_moves_a_regime() -> None:
    cost = CostModel.fit(profile(h200()))
    other, before = cost.predict(12, 0, 1536, 12), cost.predict(4, 0, 512, 4)
    prompt = cost.predict(64, 64, 0, 1)
    cost.observe(12, 0, 1536, 12, other)
    for _ in range(200):
        cost.observe(4, 0, 512, 4, 1.5 * before)
    assert cost.predict(4, 0, 512, 4) == pytest.approx(1.5 * before, rel=0.05)
    assert cost.predict(12, 0, 1536, 12) == other
    assert cost.predict(64, 64, 0, 1) == prompt
    for _ in range(2000):
        cost.observe(4, 0, 512, 4, 1000 * before)
    assert cost.predict(4, 0, 512, 4) <= 4.0001 * before  # bounded


def test_a_regime_that_nobody_has_seen_follows_the_others() -> None:
    """A device that is a tenth faster today: what 8 rows and 9 are to each other stays, whichever
    were made."""
    cost = CostModel.fit(profile(h200()))
    eight, nine = cost.predict(8, 0, 1024, 8), cost.predict(9, 0, 1152, 9)
    for _ in range(30):
        cost.observe(9, 0, 1152, 9, 0.9 * nine)
    assert cost.predict(9, 0, 1152, 9) == pytest.approx(0.9 * nine, rel=0.01)
    assert cost.predict(8, 0, 1024, 8) == pytest.approx(0.9 * eight, rel=0.01)
    for _ in range(30):  # it was measured while the device was slow
        cost.observe(8, 0, 1024, 8, 0.7 * eight)
    assert cost.predict(9, 0, 1152, 9) == pytest.approx(0.9 * nine, rel=0.01)
    assert cost.predict(8, 0, 1024, 8) == pytest.approx(0.7 * eight, rel=0.02)


def test_who_follows_several_follows_their_mean() -> None:
    cost = CostModel.fit(profile(h200()))
    shapes = [(n, 0, 128.0 * n, n) for n in (1, 4, 9)]
    before = [cost.predict(*shape) for shape in shapes]
    for _ in range(40):
        for shape, seconds in zip(shapes[:2], before, strict=False):
            cost.observe(*shape, 1.2 * seconds)
    after = [cost.predict(*shape) / seconds for shape, seconds in zip(shapes, before, strict=True)]
    assert after == pytest.approx([1.2, 1.2, 1.2], rel=0.03)


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
    assert factors == [pytest.approx(1 - 0.25 / 3), pytest.approx(0.8), pytest.approx(0.8)]
    one_by_one = CostModel.fit(profile(h200()))
    for _ in range(8):
        one_by_one.observe(4, 0, 512, 4, 0.75 * before)
    assert one_by_one.predict(4, 0, 512, 4) / before == pytest.approx(0.8, abs=0.01)


def test_prior_learns_its_level() -> None:
    cost = CostModel.prior(CUDA, 1e9, gpu=True)
    assert not cost.calibrated
    assert cost.predict(9) >= cost.predict(8)
    for n in (1, 4, 8, 16, 32):
        for _ in range(50):
            cost.observe(n, 0, 128 * n, n, H200[n] / 1e3)
    for n in (1, 4, 8, 16, 32):
        assert cost.predict(n, 0, 128 * n, n) == pytest.approx(H200[n] / 1e3, rel=0.5)


def test_kernels_for_many_rows_begin_with_a_cost() -> None:
    """Two x86 cores with AMX, prompt rows beside 7 that decode (ms): 48 take longer than 57, as
    attention for 64 rows and more is another kernel, which costs 66 ms to begin."""
    cpu = kernels("CPU", "Q4_K", features="AVX512")
    assert cpu.attention_from == 64

    def seconds(n: int, prompt: int) -> float:
        return (
            0.02 + (0.006 if n < 64 else 0.0038) * n + (0.066 if n >= 64 else 0.0) + 1e-4 * prompt
        )

    shapes = [(n, 0) for n in (1, 2, 3, *range(4, 33), 48, 60, 64)]
    shapes += [(7 + c, c) for c in (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 505)]
    samples = [Sample(n, c, 0, n - c + (c > 0), True, seconds(n, c)) for n, c in shapes]
    cost = CostModel.fit(profile(samples, cpu))
    assert cost.coefficients["many"] > 0.015
    assert cost.predict(7 + 48, 48, 0, 8) > cost.predict(7 + 57, 57, 0, 8)
    for c in (57, 121, 313, 441):
        assert cost.predict(7 + c, c, 0, 8) == pytest.approx(seconds(7 + c, c), rel=0.06)


def test_rows_that_decode_pay_for_the_cells_of_all_where_attention_computes_tiles() -> None:
    """As two x86 cores do: 60 streams of 128 cells decode in 466 ms and 64 in 1041, of 512 cells in
    3703; 64 rows of one prompt behind 512 cells take 331."""
    cpu = kernels("CPU", "Q4_K", features="AVX512")

    def seconds(decode: int, prompt: int, own: float) -> float:
        n, n_seqs = decode + prompt, decode + (prompt > 0)
        weights = 0.03 + 0.005 * n
        if n < 64:
            return weights + 6e-6 * (decode * own + prompt * (own + prompt / 2))
        return weights + 1.2e-6 * decode * n_seqs * own + 2e-6 * prompt * (own + prompt / 2)

    shapes = [(n, 0, own) for n in (*range(1, 33), 48, 60) for own in (128, 1024)]
    shapes += [(64, 0, own) for own in (128, 512, 1024)]
    shapes += [(8, c, own) for c in (8, 32, 120, 248, 504) for own in (128, 1024)]
    shapes += [(0, c, own) for c in (16, 32, 64, 128, 256, 512) for own in (0, 512)]
    samples = [
        Sample(d + c, c, (d + (c > 0)) * own, d + (c > 0), True, seconds(d, c, own))
        for d, c, own in shapes
    ]
    cost = CostModel.fit(profile(samples, cpu))
    for d, c, own in ((64, 0, 256), (60, 0, 512), (8, 440, 512), (0, 384, 256)):
        n_seqs = d + (c > 0)
        found = cost.predict(d + c, c, n_seqs * own, n_seqs)
        assert found == pytest.approx(seconds(d, c, own), rel=0.06)
    assert cost.predict(64, 0, 64 * 512, 64) > 2.5 * cost.predict(60, 0, 60 * 512, 60)


def test_attention_that_no_sample_has_is_that_of_fewer_rows() -> None:
    """Calibration has 32 streams at most: of 64 with cells of their own nothing is known."""
    cpu = kernels("CPU", "Q4_K", features="AVX512")
    samples = [
        Sample(n, 0, n * own, n, False, 0.02 + 0.005 * n + 4e-6 * n * own)
        for n in range(1, 33)
        for own in (128, 1024)
    ]
    cost = CostModel.fit(profile(samples, cpu), unified=False)
    longer = cost.predict(64, 0, 64 * 1024, 64) - cost.predict(64, 0, 64 * 128, 64)
    assert longer == pytest.approx(64 * 896 * 4e-6, rel=0.05)


def test_decoding_beside_a_prompt_does_not_hide_its_own_attention() -> None:
    """The one x86 thread's profile has 64 rows and more only with prompts among them."""
    cost = CostModel.fit(shipped_profile("x86-1-thread-qwen2-0.5b-q4_k_m"))
    for own in (128, 512, 4096):
        assert cost.predict(64, 0, 64 * own, 64) > cost.predict(60, 0, 60 * own, 60) * 0.9


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
