"""The cost model: attention, by kernel, cache layout and window."""

from dataclasses import replace

import numpy as np
import pytest

from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.model import CostModel, held_out
from pyllamabatch.cost.profile import Profile, Sample, shipped_profile
from tests.support.made_up_profiles import KNOWN, h200, profile


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


def windowed(masked: bool) -> Profile:
    """Three layers of four look at 512 cells of a sequence at most, and in the samples hold no
    more."""
    shapes = [(n, 0, own) for n in range(1, 17) for own in (128, 256, 512, 1024, 4096)]
    shapes += [(2, c, own) for c in (32, 128, 256) for own in (128, 1024)]
    samples = []
    for decode, c, own in shapes:
        n, n_seqs = decode + c, decode + (c > 0)
        seen = own - 0.75 * max(0, own - 512)
        seconds = 2e-3 + 1e-4 * n + 2e-8 * n * (n_seqs * seen + n / 2)
        samples.append(Sample(n, c, n_seqs * own, n_seqs, True, seconds))
    return replace(profile(samples, replace(KNOWN, computes_masked=masked)), n_swa=512)


def test_layers_with_a_window_look_at_no_more_cells_than_it_has() -> None:
    """An NVIDIA H100, gemma3 1B: 8 streams of 128 cells take 3.18 ms, of 512 take 3.52, of 1,024
    take 3.62."""
    known = windowed(masked=False)
    cost = CostModel.fit(known)
    assert cost.terms.window_share == 0.75
    assert np.median(held_out(known)) < 0.002
    for own, seen in ((300, 300), (512, 512), (2000, 512 + 372)):
        found = cost.predict(8, 0, 8 * own, 8)
        assert found == pytest.approx(2.8e-3 + 2e-8 * 8 * (8 * seen + 4), rel=0.01)
    # in several ubatches, by the terms
    whole = cost.predict(1024, 1024, 0, 1)
    assert whole == pytest.approx(cost.predict(512, 512, 0, 1) + cost.predict(512, 512, 512, 1))
    parts = cost.terms.split(2048, 2048, 0, 1, 512)
    assert [part.cells for part in parts] == [0, 512, 512 + 128, 512 + 256]
    assert [part.own_prompt - 256 for part in parts] == [0, 512, 640, 768]
    # without windows nothing is tried
    assert CostModel.fit(replace(known, n_swa=0)).terms.window_share == 0.0


def test_kernels_that_compute_what_a_window_masks() -> None:
    """Where the layers with a window hold every cell, as libllama's contexts do by default."""
    known = windowed(masked=True)
    cost, small = CostModel.fit(known), CostModel.fit(known, swa_full=False)
    assert (cost.computes_masked, cost.terms.window_share, small.terms.window_share) == (
        True,
        0.0,
        0.75,
    )
    assert cost.predict(8, 0, 8 * 512, 8) == small.predict(8, 0, 8 * 512, 8)
    assert cost.predict(8, 0, 8 * 2000, 8) == pytest.approx(
        2.8e-3 + 2e-8 * 8 * (8 * 2000 + 4), rel=0.01
    )
    assert np.median(held_out(known)) < 0.002
