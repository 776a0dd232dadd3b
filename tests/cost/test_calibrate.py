"""Calibration: what it measures, on every kind of memory, what disturbs it, and how it ends."""

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from math import inf
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from pyllamabatch import Model
from pyllamabatch.cli import main
from pyllamabatch.cli.calibrate import in_words, summary
from pyllamabatch.cost.calibrate import (
    BASE_DEPTH,
    Clock,
    OtherLoad,
    ShapeTimings,
    calibrate,
    faults_of,
    measure,
    open_rig,
    plan_shapes,
    schedule,
)
from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import Profile, Sample, Shape, shipped_profile
from pyllamabatch.cost.rig import Rig, Took
from pyllamabatch.engine.native_context import NativeContext
from pyllamabatch.errors import ArgumentError
from pyllamabatch.report import meters
from pyllamabatch.report.disturbed import UNWATCHED
from pyllamabatch.report.meters import OtherCores
from tests.support.calibration import calm_and_small
from tests.support.models_gguf import gguf_path

AVX2 = kernels("CPU", "Q4_0", features="AVX2")


def test_every_memory(arch_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm_and_small(monkeypatch)
    with Model(arch_path) as model:
        profile = calibrate(model, budget=600.0, n_ubatch=16, n_threads=1)
    shapes = {(s.rows, s.prefill, s.unified) for s in profile.samples}
    expected = {(n, 0, u) for n in (1, 2, 3, 4) for u in (True, False)}
    assert expected | {(20, 20, True), (12, 10, True)} <= shapes
    assert all(s.seconds > 0 for s in profile.samples)
    assert profile.about["complete"] is True
    assert Profile.from_json(profile.to_json()) == profile
    assert CostModel.fit(profile).predict(4, 0, 32, 4) > 0


def test_rig_takes_steps_back(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path) as model, Rig(model, n_seq_max=4, n_ctx=512, n_threads=1) as rig:

        def held() -> list[int]:
            return [rig.context.memory.pos_max(seq) + 1 for seq in range(4)]

        rig.hold(3, 20)
        assert held() == [20, 20, 20, 0]
        assert len(rig.time(Shape(12, 10, 1, 20), 3)) == 3
        assert held() == [20, 20, 20, 0]
        rig.hold(1, 50)
        assert held() == [50, 0, 0, 0]
        rig.hold(2, 0)
        assert held() == [0] * 4


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


def test_rig_is_as_large_as_memory_allows(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyllamabatch.planner.residency.host_available", lambda: 8 * 2**20)
    with Model(tiny_llama_path) as model, open_rig(model, True, {"n_threads": 1}) as rig:
        assert 256 <= rig.context.n_ctx < 36864


@pytest.mark.parametrize(
    ("at", "layouts"), [(7, None), (9, {True}), (16, {True}), (18, {True, False})]
)
def test_interrupt_keeps_the_layouts_that_are_known(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, layouts: set[bool] | None
) -> None:
    calm_and_small(monkeypatch, n_rounds=1)
    shown: list[str] = []

    def interrupt(share: float, text: str) -> None:
        shown.append(text)
        if len(shown) == at:
            raise KeyboardInterrupt

    with Model(tiny_llama_path) as model:
        if layouts is None:
            with pytest.raises(KeyboardInterrupt):
                calibrate(model, budget=600, progress=interrupt, n_threads=1)
        else:
            profile = calibrate(model, budget=600, progress=interrupt, n_threads=1)
            assert profile.about["complete"] is False
            assert {s.unified for s in profile.samples} == layouts


def test_what_is_measured() -> None:
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
    # Rows beyond full tiles, where each has a cost: only a step of few rows can tell it.
    (each,) = (regime for regime in AVX2.regimes if regime.rest == "each")
    for unified in (True, False):
        planned = plan_shapes(AVX2, 512, unified)
        few = {s.rows for s in planned if not s.prefill and each.first < s.rows <= 16}
        assert {n % each.tile for n in few} == set(range(each.tile))


@pytest.mark.parametrize("n_ubatch", [1, 8, 32, 40, 512, 2048])
@pytest.mark.parametrize("unified", [True, False])
def test_every_step_has_rows_whatever_n_ubatch(n_ubatch: int, unified: bool) -> None:
    shapes = plan_shapes(AVX2, n_ubatch, unified)
    assert all(s.rows > 0 and (s.prefill > 0) == (s.n_chunks > 0) for s in shapes)
    assert len(set(shapes)) == len(shapes)


def test_steps_of_few_rows_are_repeated() -> None:
    shapes = plan_shapes(AVX2, 512, True)
    found = [shape for n_round, shape, _ in schedule(shapes) if n_round == 1]
    assert list(dict.fromkeys(found)) == shapes
    for shape in shapes:
        few = shape.rows <= 8 and not shape.prefill and shape.depth == BASE_DEPTH
        at = [i for i, s in enumerate(found) if s == shape]
        assert len(at) == (5 if few else 1)
        assert not few or max(after - at[0] for after in at) > 0.6 * len(found)


class Fake:
    """A rig and a machine of two cores, where another process has `others(now, shape)` cores. A
    step of n rows takes n milliseconds, times `factor(now)`."""

    n_threads = 1

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        others: Callable[[float, Shape], float] = lambda now, shape: 0.0,
        factor: Callable[[float], float] = lambda now: 1.0,
    ) -> None:
        self.now = self.busy = self.own = 0.0
        self.others, self.factor, self.shape = others, factor, Shape(1)
        limits = {"n_seq_max": 65, "n_batch": 2048, "n_ctx": 36864, "n_ctx_seq": 36864}
        self.context = SimpleNamespace(**limits)
        self.stepper = SimpleNamespace(n_pos_max=36864)
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        monkeypatch.setattr("time.sleep", self.wait)
        monkeypatch.setattr("pyllamabatch.cost.calibrate.usable_cores", lambda: 2)
        monkeypatch.setattr(OtherCores, "_now", lambda _: (self.busy - self.own, self.now))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.busy += seconds * self.others(self.now, self.shape)

    def seconds_to_hold(self, depth: int) -> float:
        return 0.0

    def time(self, shape: Shape, n_steps: int) -> list[Took]:
        took, self.shape = [], shape
        for _ in range(n_steps):
            seconds = 1e-3 * shape.rows * self.factor(self.now)
            self.wait(seconds)
            self.own, self.busy = self.own + seconds, self.busy + seconds
            took.append(Took(seconds, False))
        return took

    def measure(self, budget: float) -> list[Sample]:
        shapes, rig = plan_shapes(AVX2, 512, True), self
        samples, whole = measure(rig, shapes, True, Clock(0.0, budget, 1.0, None))  # type: ignore[arg-type]
        assert whole
        return samples


def test_a_slow_moment_at_first_is_outvoted(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(monkeypatch, factor=lambda now: 1.5 if now < 2 else 1.0)
    samples = fake.measure(20.0)
    assert fake.now == pytest.approx(20.0, abs=1.0)
    assert any(s.rows > 40 for s in samples)  # went on to others
    for sample in samples:
        if sample.prefill == 0 and sample.rows <= 8 and sample.kv == BASE_DEPTH * sample.rows:
            assert sample.seconds == pytest.approx(1e-3 * sample.rows)


def test_disturbed_shapes_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process for 40 seconds; calibration waits for 30 of them, and goes on."""
    fake = Fake(monkeypatch, others=lambda now, _: float(now < 40))
    samples = fake.measure(120.0)
    assert faults_of(samples) == []
    assert all(s.n > 0 for s in samples)


DECODE, PROMPT = "steps that decode", "steps with prompt rows"
CALM, NOISE = (lambda *_: 0.0), Random(1)


@pytest.mark.parametrize(
    ("others", "factor", "faults"),
    [
        (lambda *_: 0.3, lambda _: 1.0, []),  # a core is free for most of the time
        (lambda *_: 1.0, lambda _: 1.0, [DECODE, PROMPT]),
        (lambda _, shape: shape.prefill > 0, lambda _: 1.0, [PROMPT]),
        (CALM, lambda _: NOISE.choice((1.0, 4.0)), [DECODE, PROMPT]),  # repeats differ
    ],
)
def test_disturbed_kinds_of_steps_make_no_profile(
    monkeypatch: pytest.MonkeyPatch, others: Any, factor: Any, faults: list[str]
) -> None:
    found = faults_of(Fake(monkeypatch, others, factor).measure(300.0))
    assert len(found) == len(faults)
    assert all(f"{kind} disturbed" in text for kind, text in zip(faults, found, strict=True))


def test_kinds_of_steps_that_are_missing() -> None:
    samples = [s for s in shipped_profile("nvidia-h200-gemma-3-1b-q4_k_m").samples if s.unified]
    decodes = [s for s in samples if not s.prefill]
    prompts = [s for s in samples if s.prefill]
    assert faults_of(samples) == []
    assert faults_of(decodes) == ["no steps with prompt rows"]
    assert faults_of([*decodes, *prompts[:2]]) == ["only 2 steps with prompt rows"]
    disturbed = [replace(s, n=0) for s in prompts]
    assert faults_of([*decodes, *disturbed, *prompts]) == []
    (fault,) = faults_of([*decodes, *disturbed, *prompts[1:]])
    assert fault.endswith("steps with prompt rows disturbed")


def test_what_runs_beside_on_purpose_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cores another process has one."""

    class Others:
        def __init__(self, pids: Collection[int] = ()) -> None:
            self.used = lambda doubt: 0.0 if 7 in pids else 1.0

    monkeypatch.setattr("pyllamabatch.cost.calibrate.OtherCores", Others)
    monkeypatch.setattr("pyllamabatch.cost.calibrate.usable_cores", lambda: 2)
    assert [OtherLoad(1, beside).disturbs() for beside in ((), [7])] == [True, False]
    ours = OtherLoad(1, [7])
    assert not ours.disturbs()
    assert not ours.disturbs()


def test_what_runs_beside_leaves_no_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is none of these has a core, of four."""

    class Others:
        def __init__(self, pids: Collection[int] = ()) -> None:
            self.used = lambda doubt: 1.0

    monkeypatch.setattr("pyllamabatch.cost.calibrate.OtherCores", Others)
    monkeypatch.setattr("pyllamabatch.cost.calibrate.usable_cores", lambda: 4)
    beside = [[], [7], [7, 8], [7, 8, 9]]
    assert [OtherLoad(1, pids).disturbs() for pids in beside] == [False, False, True, True]


def test_disturbed_steps_are_told() -> None:
    took = [Took(0.5, True), Took(0.2, True)]
    sample = ShapeTimings(took).sample(Shape(4, depth=8), True)
    assert (sample.seconds, sample.n) == (0.2, 0)
    calm = ShapeTimings([*took, Took(0.3, False)]).sample(Shape(4, depth=8), True)
    assert (calm.seconds, calm.n) == (0.3, 1)
    about = {"complete": True, "watched": True, "model": ""}
    profile = replace(
        shipped_profile("nvidia-h200-gemma-3-1b-q4_k_m"), samples=(sample, calm), about=about
    )
    found = summary(profile)
    assert found["disturbed"] == 1
    told = in_words({"profile": "file", **found})
    assert "1 of them were disturbed" in told
    assert UNWATCHED not in told


@pytest.mark.parametrize(
    "bad",
    [
        {"budget": 0},
        {"layouts": ()},
        {"layouts": ("both",)},
        {"budget": float("nan")},
        {"n_ctx": 4096},
        {"kv_unified": True},
    ],
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
    calm_and_small(monkeypatch)
    monkeypatch.setenv("PYLLAMABATCH_CACHE", str(tmp_path))
    monkeypatch.setattr("pyllamabatch.engine.context_defaults.UBATCH", 64)
    common = ["calibrate", "-m", str(tiny_llama_path), "--budget", "600", "-t", "1", "-q"]
    for bad, says in ((str(tmp_path), "a file, not a folder"), ("/proc/x.json", "/proc")):
        with monkeypatch.context() as nothing:
            nothing.setattr("pyllamabatch.cli.calibrate.load_model", None)  # said before that
            assert main([*common, "--out", bad]) == 2
        assert says in capsys.readouterr().err
    assert main([*common, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    path = Path(said["profile"])
    assert path.parent == tmp_path / "profiles"
    assert len(Profile.load(path).samples) == said["samples"]
    assert Profile.load(path).n_ubatch == 64  # an engine's own
    with Model(tiny_llama_path) as model, NativeContext(model, n_ctx=256) as context:
        assert Profile.load(path).cell_bytes == context.swap_choice("auto").bytes_per_token > 0
    assert set(said["layouts"]) == {"unified", "streams"}
    # The other layout's steps stay, where the build is the same.
    before = Profile.load(path)
    assert main([*common, "--layout", "unified", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["layouts"]) == {"unified", "streams"}
    after = Profile.load(path)
    streams = [[s for s in p.samples if not s.unified] for p in (before, after)]
    assert streams[0] == streams[1] != []
    assert [s for s in before.samples if s.unified] != [s for s in after.samples if s.unified]
    other = replace(before, about={**before.about, "llama_cpp": "b1"})
    one = replace(before, samples=tuple(s for s in before.samples if s.unified))
    assert one.beside(other) == one
    out = tmp_path / "x.json"
    monkeypatch.setattr(meters, "psutil", None)
    assert main([*common, "--layout", "streams", "--out", str(out)]) == 0
    said_so = capsys.readouterr().out
    assert "streams: the model is" in said_so
    assert UNWATCHED in said_so
    assert [Profile.load(p).about["watched"] for p in (path, out)] == [True, False]
    assert all(not s.unified for s in Profile.load(out).samples)
    # The threads never have their cores: nothing is saved.
    out.unlink()
    monkeypatch.setattr("pyllamabatch.cost.rig._UNDISTURBED", inf)
    assert main([*common, "--layout", "unified", "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "steps with prompt rows disturbed (unified)" in told
    assert UNWATCHED in told
    assert not out.exists()
