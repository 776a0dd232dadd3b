"""The profiles that come with the package, and how published tables become profiles."""

from pathlib import Path

import numpy as np
import pytest

from pyllamabatch.cost.model import CostModel, held_out
from pyllamabatch.cost.profile import Profile, shipped_names, shipped_profile
from tools import published

NAMES = shipped_names()
EXPECTED = {  # by their names in docs/how-to/mac.md
    "Gemma 3 4B, Q4_0": "m2-ultra-gemma-3-4b-it-qat",
    "Qwen2.5 Coder 7B, Q8_0": "m2-ultra-qwen2.5-coder-7b-q8_0",
    "gpt-oss 20B, MXFP4": "m2-ultra-gpt-oss-20b",
    "gpt-oss 120B, MXFP4": "m2-ultra-gpt-oss-120b",
    "Qwen3 Coder 30B A3B, Q8_0": "m2-ultra-qwen3-coder-30b-a3b-instruct-q8_0",
}


def test_there_are_some() -> None:
    assert {f"{machine}-{model}" for machine in ("m2-ultra", "dgx-spark")
            for model in published.MODELS} <= set(NAMES)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_fits_what_it_has_seen_and_what_it_has_not(name: str) -> None:
    profile = shipped_profile(name)
    assert profile.about["source"]
    assert not profile.lacks(unified=True) + profile.lacks(unified=False)
    for unified in {sample.unified for sample in profile.samples}:
        median, p95 = CostModel.fit(profile, unified=unified).error
        assert (median <= 0.05, p95 <= 0.15) == (True, True)
        unseen = held_out(profile, unified=unified)
        assert np.median(unseen) <= 0.05
        # where every kind of shape was measured the worst ones are near, too
        assert np.percentile(unseen, 95) <= 0.15 or not name.startswith("nvidia-h200")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("m2-ultra")])
@pytest.mark.parametrize("unified", [False, True])
def test_no_step_where_no_sample_shows_one(name: str, unified: bool) -> None:
    """Attention has other kernels from 20 rows on, and the samples lie at 16 and 32."""
    cost = CostModel.fit(shipped_profile(name), unified=unified)
    assert cost.terms.kernels.attention_from == 20
    for kv in (0, 20 * 300):
        assert cost.predict(20, 0, kv, 20) < 1.05 * cost.predict(19, 0, kv, 19)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unified", [False, True])
def test_no_cliff_where_a_kernel_begins(name: str, unified: bool) -> None:
    """A kernel may begin at rows that no table has: 129, between 32 and 512."""
    cost = CostModel.fit(shipped_profile(name), unified=unified, n_ubatch=512)
    before, after = (cost.predict(n, n, 0, 1) for n in (128, 129))
    assert after < 1.35 * before
    assert cost.predict(32, 32, 0, 1) < cost.predict(512, 512, 0, 1)


def test_m2_ultra_gemma() -> None:
    """The table's own figures for 32 decode steps: eight rows twice are faster than sixteen."""
    cost = CostModel.fit(shipped_profile("m2-ultra-gemma-3-4b-it-qat"), unified=False)
    for rows, seconds in {1: 0.235, 2: 0.312, 4: 0.404, 8: 0.579, 16: 1.207, 32: 1.299}.items():
        assert 32 * cost.predict(rows, 0, rows * 528, rows) == pytest.approx(seconds, rel=0.1)
    eight, sixteen = cost.predict(8, 0, 16 * 528, 8), cost.predict(16, 0, 16 * 528, 16)
    assert 2 * eight < sixteen
    assert cost.predict(32, 16, 16 * 528, 17) > 1.5 * sixteen  # two ubatches
    # with shared cells prompt rows ride along
    shared = CostModel.fit(shipped_profile("m2-ultra-gemma-3-4b-it-qat"), unified=True)
    assert shared.predict(32, 16, 16 * 528, 17) < 1.1 * shared.predict(16, 0, 16 * 528, 16)


TABLE = """
## ggml-org/gemma-3-4b-it-qat-GGUF

main: n_kv_max = 270336, n_batch = 2048, n_ubatch = 1024, flash_attn = 1

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   512 |     32 |    1 |    544 |    0.200 |  2560.00 |    0.320 |   100.00 |    0.520 |  1046.15 |
|   512 |     32 |    8 |   4352 |    2.000 |  2048.00 |    0.640 |   400.00 |    2.640 |  1648.48 |
|  4096 |     32 |    2 |   8256 |    4.000 |  2048.00 |    0.640 |   100.00 |    4.640 |  1779.31 |

| model        |       size | backend    |            test |                  t/s |
| ------------ | ---------: | ---------- | --------------: | -------------------: |
| gemma3 4B    |   2.35 GiB | MTL,BLAS   |          pp2048 |       2000.00 ± 3.56 |
| gemma3 4B    |   2.35 GiB | MTL,BLAS   |            tg32 |         99.00 ± 3.90 |
| gemma3 4B    |   2.35 GiB | MTL,BLAS   |  tg32 @ d4096   |         50.00 ± 0.17 |
| gemma3 4B    |   2.35 GiB | MTL,BLAS   |  pp512 @ d4096  |       1000.00 ± 0.17 |

build: b828e18c7 (7948)
"""


def test_published_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "some-mac.md"
    source.write_text(TABLE.replace("d4096   |", "d4096 |").replace("d4096  |", "d4096 |"))
    args = [str(source), "--device", "A Mac", "--backend", "MTL", "--name", "mac"]
    assert published.main([*args, "--out", str(tmp_path)]) == 0
    profile = Profile.load(tmp_path / "mac-gemma-3-4b-it-qat.json")
    assert profile.n_ubatch == 1024
    assert "some-mac.md" in profile.about["source"]
    steps = {(s.rows, s.prefill, s.kv, s.n_seqs): s.seconds for s in profile.samples}
    assert steps == pytest.approx({
        (1, 0, 528.0, 1): 0.01, (8, 0, 8 * 528.0, 8): 0.02, (2, 0, 2 * 4112.0, 2): 0.02,
        (512, 512, 0.0, 1): 0.2, (2048, 2048, 0.0, 4): 1.0,  # two steps of four prompts
        (2048, 2048, 1024.0, 1): 1.0, (2048, 2048, 0.0, 1): 1.024,
        (1, 0, 16.0, 1): 1 / 99, (1, 0, 4112.0, 1): 0.02, (512, 512, 4096.0, 1): 0.512,
    }, rel=1e-5)  # fmt: skip


def test_what_to_expect_on_a_mac_is_what_the_profiles_say() -> None:
    """The table of docs/how-to/mac.md, in tokens a second: 512 tokens each, streams."""
    guide = (Path(__file__).parents[2] / "docs/how-to/mac.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in guide.splitlines() if line.startswith("| ")]
    users, *models = rows
    assert users == ["users", "1", "2", "4", "8"]
    for name, *speeds in models:
        cost = CostModel.fit(shipped_profile(EXPECTED[name]), unified=False)
        found = [n / cost.predict(n, 0, 512 * n, n) for n in map(int, users[1:])]
        assert [f"{speed:.0f}" for speed in found] == speeds, name
    assert len(models) == len(EXPECTED)
