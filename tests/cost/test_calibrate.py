"""Calibration: what it measures, on every kind of memory, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyllamabatch import Model
from pyllamabatch.cli import main
from pyllamabatch.cli.calibrate import in_words, summary
from pyllamabatch.cost import where
from pyllamabatch.cost.calibrate import (
    BASE_DEPTH,
    Clock,
    _sample,
    calibrate,
    measure,
    open_rig,
    plan_shapes,
    schedule,
)
from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import Profile, Shape
from pyllamabatch.cost.rig import Rig, Took
from pyllamabatch.errors import ArgumentError, ProfileError
from pyllamabatch.llama.context import Context
from tests.support.models_gguf import gguf_path


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of shapes of each kind, so that a tiny model is done in a second."""

    def few(*_: object) -> list[Shape]:
        decode = [Shape(n, depth=8) for n in (1, 2, 3, 4)]
        deep = [Shape(2, depth=40), Shape(8, 8, 1, 40)]
        return [*decode, Shape(12, 10, 1, 8), Shape(16, 16, 1), Shape(20, 20, 1), *deep]

    monkeypatch.setattr("pyllamabatch.cost.calibrate.plan_shapes", few)
    monkeypatch.setattr("pyllamabatch.cost.calibrate.N_CTX", 2048)
    monkeypatch.setattr("pyllamabatch.cost.calibrate.busy_cores", lambda: 0.0)


def test_every_memory(arch_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    with Model(arch_path) as model:
        profile = calibrate(model, budget=20.0, n_ubatch=16, n_threads=1)
    shapes = {(s.rows, s.prefill, s.unified) for s in profile.samples}
    expected = {(n, 0, u) for n in (1, 2, 3, 4) for u in (True, False)}
    assert expected | {(20, 20, True), (12, 10, True)} <= shapes
    assert all(s.seconds > 0 for s in profile.samples)
    assert profile.about["complete"] is True
    assert Profile.from_json(profile.to_json()) == profile
    cost = CostModel.fit(profile)
    assert cost.calibrated
    assert cost.predict(4, 0, 32, 4) > 0


def test_a_budget_that_ends_before_the_prompts_is_an_error(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a profile would say nothing of them, and an engine would believe it."""
    decodes = [Shape(n, depth=8) for n in (1, 2, 3, 4)]
    monkeypatch.setattr("pyllamabatch.cost.calibrate.plan_shapes", lambda *_: decodes)
    monkeypatch.setattr("pyllamabatch.cost.calibrate.N_CTX", 2048)
    with (
        Model(tiny_llama_path) as model,
        pytest.raises(ProfileError, match="no steps with prompt rows"),
    ):
        calibrate(model, budget=1.0, layouts=["unified"], n_threads=1)


def test_rig_takes_steps_back(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path) as model, Rig(model, n_seq_max=4, n_ctx=512, n_threads=1) as rig:
        memory = rig.context.memory
        rig.hold(3, 20)
        assert [memory.pos_max(seq) for seq in range(4)] == [19, 19, 19, -1]
        assert len(rig.time(Shape(12, 10, 1, 20), 3)) == 3
        assert [memory.pos_max(seq) for seq in range(4)] == [19, 19, 19, -1]
        rig.hold(1, 50)
        assert [memory.pos_max(seq) for seq in range(4)] == [49, -1, -1, -1]
        rig.hold(2, 0)
        assert [memory.pos_max(seq) for seq in range(4)] == [-1] * 4


def test_rig_holds_the_same_of_every_sequence() -> None:
    """Where layers have a window: of the first one, which is computed, too."""
    with Model(gguf_path("gemma3")) as model, Rig(model, n_seq_max=2, n_ctx=512) as rig:
        memory, n = rig.context.memory, 3 * model.n_swa
        for _ in range(2):
            rig.hold(2, n)
            assert [memory.pos_max(seq) for seq in (0, 1)] == [n - 1] * 2
            assert memory.pos_min(0) == memory.pos_min(1) > n - 2 * model.n_swa
            rig.hold(2, 8)
            assert memory.pos_min(0) == memory.pos_min(1) == 0


def test_interrupt_keeps_what_is_measured(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyllamabatch.cost.calibrate.BASE_DEPTH", 4)
    monkeypatch.setattr("pyllamabatch.cost.calibrate.N_CTX", 2048)
    monkeypatch.setattr("pyllamabatch.cost.calibrate.busy_cores", lambda: 0.0)
    n_calls = 0

    def interrupt(share: float, text: str) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 20:
            raise KeyboardInterrupt

    with Model(tiny_llama_path) as model:
        profile = calibrate(model, budget=60, progress=interrupt, n_threads=1)
        assert profile.about["complete"] is False
        assert 12 <= len(profile.samples) < 20
        n_calls = 18
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, budget=60, progress=interrupt, n_threads=1)


def test_rig_is_as_large_as_memory_allows(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyllamabatch.planner.residency.host_available", lambda: 8 * 2**20)
    with Model(tiny_llama_path) as model, open_rig(model, True, {"n_threads": 1}) as rig:
        assert 256 <= rig.context.n_ctx < 36864


def test_disturbed_steps_are_told(tiny_llama_path: Path) -> None:
    took = [Took(0.5, True), Took(0.2, True)]
    sample = _sample(Shape(4, depth=8), took, True)
    assert (sample.seconds, sample.n) == (0.2, 0)
    calm = _sample(Shape(4, depth=8), [*took, Took(0.3, False)], True)
    assert (calm.seconds, calm.n) == (0.3, 1)
    with Model(tiny_llama_path) as model, Context(model, n_ctx=64) as context:
        key = where.key_of(context)
    profile = Profile(key, kernels("CPU", "F32"), (sample, calm), 64, about={"complete": True,
                                                                         "model": ""})  # fmt: skip
    found = summary(profile)
    assert found["disturbed"] == 1
    assert "1 of them were disturbed" in in_words({"profile": "file", **found})


@pytest.mark.parametrize("unified", [True, False])
def test_rows_beyond_full_tiles_are_measured_where_they_show(unified: bool) -> None:
    """Each has a cost of its own on a CPU: only a step of few rows can tell it from the error of a
    large one."""
    found = kernels("CPU", "Q4_K", features="AVX2")
    shapes = plan_shapes(found, 512, unified)
    few = {s.rows for s in shapes if not s.prefill and s.rows <= 16}
    (each,) = (regime for regime in found.regimes if regime.rest == "each")
    assert {n % each.tile for n in few if n > each.first} == set(range(each.tile))


def test_steps_of_few_rows_are_repeated() -> None:
    shapes = plan_shapes(kernels("CPU", "Q4_K", features="AVX2"), 512, True)
    found = [shape for n_round, shape, _ in schedule(shapes) if n_round == 1]
    assert list(dict.fromkeys(found)) == shapes
    for shape in shapes:
        few = shape.rows <= 8 and not shape.prefill and shape.depth == BASE_DEPTH
        at = [i for i, s in enumerate(found) if s == shape]
        assert len(at) == (5 if few else 1)
        assert not few or max(after - at[0] for after in at) > 0.6 * len(found)


class SlowAtFirst:
    """A rig that needs so many milliseconds for a step of n rows, and half as many more until 2
    seconds are over."""

    on_cpu = False

    def __init__(self) -> None:
        self.now = 0.0
        limits = {"n_seq_max": 65, "n_batch": 2048, "n_ctx": 36864, "n_ctx_seq": 36864}
        self.context = SimpleNamespace(**limits)
        self.stepper = SimpleNamespace(n_pos_max=36864)

    def ready(self, shape: Shape) -> bool:
        return True

    def time(self, shape: Shape, n_steps: int) -> list[Took]:
        took = []
        for _ in range(n_steps):
            seconds = 1e-3 * shape.rows * (1.5 if self.now < 2 else 1.0)
            self.now += seconds
            took.append(Took(seconds, False))
        return took


def test_a_slow_moment_at_first_is_outvoted(monkeypatch: pytest.MonkeyPatch) -> None:
    rig: Any = SlowAtFirst()
    shapes = plan_shapes(kernels("CPU", "Q4_K", features="AVX2"), 512, True)
    monkeypatch.setattr("time.monotonic", lambda: rig.now)
    budget = 20.0
    samples, whole = measure(rig, shapes, True, Clock(0.0, budget, 1.0, None))
    assert whole
    assert rig.now == pytest.approx(budget, abs=1.0)
    assert any(s.rows > 40 for s in samples)  # went on to others
    for sample in samples:
        if sample.prefill == 0 and sample.rows <= 8 and sample.kv == BASE_DEPTH * sample.rows:
            assert sample.seconds == pytest.approx(1e-3 * sample.rows)


def test_shapes_cover_the_edges() -> None:
    found = kernels("CUDA", "Q4_K")
    shapes = plan_shapes(found, 512, True)
    decode = {s.rows for s in shapes if s.prefill == 0}
    assert {1, 8, 9, 16, 17, 32, 33, 64} <= decode
    assert {s.depth for s in shapes} >= {0, 128, 512, 1024, 4096}
    assert any(s.prefill and s.prefill < s.rows for s in shapes)
    assert all(sum(s.chunks()) == s.prefill and s.n_seqs <= 65 for s in shapes)
    streams = plan_shapes(found, 512, False)
    assert all(s.n_seqs <= 33 for s in streams)
    assert {128, 192, 256, 384, 512} <= {s.rows for s in streams if s.prefill == s.rows}


@pytest.mark.parametrize(
    "bad", [{"budget": 0}, {"layouts": ()}, {"layouts": ("both",)}, {"budget": float("nan")}]
)
def test_bad_arguments(tiny_llama_path: Path, bad: dict[str, Any]) -> None:
    with Model(tiny_llama_path) as model, pytest.raises(ArgumentError):
        calibrate(model, **bad)


def test_command(
    tiny_llama_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small(monkeypatch)
    monkeypatch.setenv("PYLLAMABATCH_CACHE", str(tmp_path))
    common = ["calibrate", "-m", str(tiny_llama_path), "--budget", "20", "-t", "1", "-q"]
    assert main([*common, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    path = Path(said["profile"])
    assert path.parent == tmp_path / "profiles"
    assert len(Profile.load(path).samples) == said["samples"]
    assert set(said["layouts"]) == {"unified", "streams"}
    assert main([*common, "--layout", "streams", "--out", str(tmp_path / "x.json")]) == 0
    assert "streams: the model is" in capsys.readouterr().out
    assert all(not s.unified for s in Profile.load(tmp_path / "x.json").samples)
