"""What a profile is matched by, and the profiles' files."""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from pyllamabatch import Engine, Model
from pyllamabatch.cost import where
from pyllamabatch.cost.choose import cost_of
from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.prior import CPU, GPU
from pyllamabatch.cost.profile import (
    Key,
    Profile,
    Sample,
    Shape,
    file_name,
    find_profile,
    load_profile,
    profile_folder,
)
from pyllamabatch.cost.rig import Rig
from pyllamabatch.errors import ArgumentError, ProfileError
from pyllamabatch.llama import runtime
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.limits import Part, memory_parts
from tests.support.models_gguf import gguf_path


def profile(key: Key, seconds: float = 0.01) -> Profile:
    samples = tuple(
        Sample(n, prefill, 10 * n, 1 if prefill else n, True, seconds * (n + 1))
        for n in (1, 2, 4, 8, 16)
        for prefill in ({0, n} if n > 4 else {0})
    )
    return Profile(key, kernels("CPU", "F32"), samples, 512)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYLLAMABATCH_CACHE", str(tmp_path))
    return tmp_path


def test_parts_of_a_context(arch_path: Path) -> None:
    with Model(arch_path) as model, Context(model, n_ctx=256) as context:
        parts = memory_parts(context)
        assert sum(part.model for part in parts) == pytest.approx(model.size_bytes, rel=0.05)
        assert sum(part.context for part in parts) > 0
        assert sum(part.compute for part in parts) > 0


def test_weights(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path) as model:
        weights = where.weigh(model)
        assert weights.kind == "F32" == where.file_type(model)
        assert 0 < weights.output_share < 1
        assert 0 < weights.input_bytes < 0.5 * model.size_bytes


def test_a_prior_knows_the_experts() -> None:
    """A row uses two of eight, two rows 7/16 of them: 1 - (3/4)^2."""
    with Model(gguf_path("qwen3moe")) as model, Context(model, n_ctx=64) as context:
        experts = where.experts_of(model)
        assert (experts.n, experts.n_used) == (8, 2)
        assert 0 < experts.n_weights < model.n_params
        assert 0 < experts.n_bytes < model.size_bytes
        prior = cost_of(context, unified=True)
        all_of_them = prior.coefficients["experts"]
        assert all_of_them > 0
        assert prior.terms.experts(2) == 7 / 16


@pytest.fixture
def held_by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Whose parts of the weights contexts seem to have: of two GPUs, and of the CPU."""
    gpu = runtime.BackendDevice("GPU0", "A card", "gpu", "CUDA", 0, 0)
    devices = runtime.devices() | {"GPU0": gpu, "GPU1": gpu._replace(name="GPU1")}

    def hold(gpu0: int, gpu1: int, cpu: int, inputs: int) -> None:
        held = {"GPU0": gpu0, "GPU1": gpu1, "CPU": cpu}
        parts = [
            Part(name, name, name == "CPU", 1000 * n + inputs * (name == "CPU"), 0, 0)
            for name, n in held.items()
        ]
        monkeypatch.setattr(runtime, "devices", lambda: devices)
        monkeypatch.setattr(where, "memory_parts", lambda _: parts)

    return hold


def test_a_prior_of_layers_on_two_devices_has_the_time_of_both(
    tiny_llama_path: Path, held_by: Callable[..., None]
) -> None:
    with Model(tiny_llama_path) as model, Context(model, n_ctx=64, n_threads=2) as context:
        inputs = where.weigh(model).input_bytes

        def priced(*parts: int) -> CostModel:
            held_by(*parts, inputs)
            assert where.key_of(context).backend == "CUDA"
            return cost_of(context, unified=True)

        whole, half, part = priced(4, 0, 0), priced(2, 2, 0), priced(3, 0, 1)
        assert half.coefficients == pytest.approx(dict(whole.coefficients))
        slower = (3 / GPU.compute + 1 / (2 * CPU.compute)) / (4 / GPU.compute)
        assert part.coefficients["output"] / whole.coefficients["output"] == pytest.approx(slower)
        slower = (3 * GPU.layer + CPU.layer) / (4 * GPU.layer)
        assert part.coefficients["base"] / whole.coefficients["base"] == pytest.approx(slower)


@pytest.mark.parametrize(
    ("parts", "n_threads", "disturbed"),
    [((4, 0, 0), 0, False), ((2, 2, 0), 0, False), ((3, 0, 1), 2, False), ((0, 0, 4), 2, True)],
)
def test_threads_are_awake_all_the_time_where_the_cpu_alone_computes(
    tiny_llama_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    held_by: Callable[..., None],
    parts: tuple[int, int, int],
    n_threads: int,
    disturbed: bool,
) -> None:
    """Where a device has its part they wait for it, and none compute for two GPUs: a step is
    disturbed by neither."""
    monkeypatch.setattr("pyllamabatch.cost.rig._UNDISTURBED", inf)
    with Model(tiny_llama_path) as model:
        held_by(*parts, where.weigh(model).input_bytes)
        with Rig(model, n_seq_max=1, n_ctx=256, n_threads=2) as rig:
            assert where.key_of(rig.context).context.get("n_threads", 0) == n_threads
            assert rig.n_threads == n_threads
            assert [took.disturbed for took in rig.time(Shape(1), 2)] == [disturbed] * 2


def test_a_file_that_two_devices_hold_is_read_once_for_a_key(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch, held_by: Callable[..., None]
) -> None:
    """A large vocabulary takes tenths of a second."""
    read: list[Model] = []
    with Model(tiny_llama_path) as model, Context(model, n_ctx=64) as context:
        weighed = where.weigh(model)

        def weigh(model: Model) -> where.Weights:
            read.append(model)
            return weighed

        monkeypatch.setattr(where, "weigh", weigh)
        held_by(3, 0, 1, weighed.input_bytes)
        assert where.key_of(context).context["on_device"] == "0.75"
        assert read == [model]


def test_key(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path) as model, Context(model, n_ctx=64, n_threads=1) as context:
        key = where.key_of(context)
        assert key.backend == "CPU"
        assert key.context["n_threads"] == 1
        assert key.context["type_k"] == "f16"
        assert key.model == where.fingerprint(model)
        assert "/" not in file_name(key)
        assert where.cpu_features()


def test_distance() -> None:
    key = Key("device", "CPU", "model", {"n_threads": 2, "type_k": "f16"})
    assert key.distance(key) == 0
    assert key.distance(replace(key, context={"n_threads": 1, "type_k": "f16"})) == 2
    assert key.distance(replace(key, context={"n_threads": 2, "type_k": "q8_0"})) == 1
    assert key.distance(replace(key, context={"n_threads": 16, "type_k": "f16"})) is None
    part = replace(key, context={**key.context, "on_device": "0.60"})
    assert key.distance(part) is None
    assert part.distance(replace(key, context={**key.context, "on_device": "0.63"})) == 1
    assert key.distance(replace(key, device="other")) is None
    assert key.distance(replace(key, model="other")) is None


def test_nearest_profile_is_found(cache: Path) -> None:
    key = Key("device", "CPU", "0123456789abcdef", {"n_threads": 2})
    assert find_profile(key) is None
    far = profile(replace(key, context={"n_threads": 1}), 0.02)
    far.save(profile_folder() / "far.json")
    (profile_folder() / "damaged.json").write_text('{"0123456789abcdef"')
    assert find_profile(key) == far
    near = profile(key)
    near.save(profile_folder() / file_name(key))
    assert find_profile(key) == near
    assert find_profile(replace(key, model="fedcba9876543210")) is None
    # 7 threads are nearer to 8 than to 2, and 64 are near to none of these
    many = profile(replace(key, context={"n_threads": 8}))
    many.save(profile_folder() / file_name(many.key))
    assert find_profile(replace(key, context={"n_threads": 7})) == many
    assert find_profile(replace(key, context={"n_threads": 64})) is None


def test_round_trip(cache: Path) -> None:
    made = profile(Key("device", "CPU", "model", {"n_threads": 2}))
    made.save(cache / "a" / "p.json")
    assert Profile.load(cache / "a" / "p.json") == made
    again = CostModel.fit(Profile.load(cache / "a" / "p.json"))
    assert again.predict(5, 0, 50, 5) == CostModel.fit(made).predict(5, 0, 50, 5)
    assert sorted(path.name for path in (cache / "a").iterdir()) == ["p.json"]


@pytest.mark.parametrize(
    "change",
    [
        ('"schema": 1', '"schema": 2'),
        ('"samples"', '"sample"'),
        ("[1, 0, 10", "[1, 5, 10"),
        ("[1, 0, 10", "[0, 10"),
        ('"first": 1', '"last": 1'),
        ('"first": 1', '"first": 9'),
        ('"tile": 1', '"tile": 0'),
        ('"context": {}', '"context": null'),
        ('"context": {}', '"context": {"n_threads": 0}'),
        ('"context": {}', '"context": {"n_threads": -4}'),
        ('"context": {}', '"context": {"on_device": "all"}'),
        ('"n_ubatch": 512', '"n_ubatch": -1'),  # a fit of it would never end
        ("0.02,", "Infinity,"),
        ("0.02,", "2e400,"),
        ("[1, 0, 10, 1", "[1, 0, -10, 1"),
        ("[1, 0, 10, 1", "[1, 0, 10, 0"),
        ("{", "["),
    ],
)
def test_damaged_profiles(change: tuple[str, str]) -> None:
    text = profile(Key("device", "CPU", "model")).to_json()
    assert change[0] in text
    with pytest.raises(ProfileError):
        Profile.from_json(text.replace(*change))


def test_missing_profile(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nothing\.json"):
        Profile.load(tmp_path / "nothing.json")


def test_profiles_by_name(cache: Path) -> None:
    made = profile(Key("device", "CPU", "model"))
    made.save(profile_folder() / "mine.json")
    assert load_profile() == load_profile("mine") == made
    assert load_profile(str(profile_folder() / "mine.json")) == made
    with pytest.raises(ArgumentError, match=r"profile='mind': did you mean mine\?"):
        load_profile("mind")
    with pytest.raises(ArgumentError, match="must be a file or one of"):
        load_profile("./none.json")


def test_engine_finds_its_profile(cache: Path, tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path) as model:
        with Engine(model, n_seq_max=2, n_threads=1) as engine:
            assert engine.cost is not None
            assert not engine.cost.calibrated
        with Context(model, n_ctx=512, n_threads=1) as context:
            key = where.key_of(context)
        profile(key).save(profile_folder() / file_name(key))
        with Engine(model, n_seq_max=2, n_threads=1) as engine:
            assert engine.cost is not None
            assert engine.cost.calibrated
            engine.generate([[5, 6, 7]] * 3)
            seen = [n for _, n in engine.cost.refinement]
            assert sum(seen) > 0
        whole = profile(key)
        decodes = replace(whole, samples=tuple(s for s in whole.samples if not s.prefill))
        assert decodes.lacks(unified=True) == ["steps with prompt rows"]
        decodes.save(profile_folder() / file_name(key))
        with Engine(model, n_seq_max=2, n_threads=1) as engine:  # of prompts it knows nothing
            assert engine.cost is not None
            assert not engine.cost.calibrated
        mine = CostModel.fit(profile(key))
        with Engine(model, n_seq_max=2, n_threads=1, cost=mine) as engine:
            assert engine.cost is mine
        with Engine(model, n_seq_max=2, n_threads=1, cost=None) as engine:
            assert engine.cost is None
            assert engine.generate([[5, 6, 7]])[0].finish_reason in ("stop", "length")
