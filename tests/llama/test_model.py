"""Model: what it says of itself, its options, its life."""

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyllamabatch import Model
from pyllamabatch.errors import ArgumentError, ClosedError, ModelLoadCancelled
from pyllamabatch.llama import runtime
from pyllamabatch.llama.context import Context
from tests.support.models_gguf import (
    ARCHITECTURES,
    N_CTX_TRAIN,
    N_EMBD,
    N_HEAD,
    N_HEAD_KV,
    gguf_path,
)

N_LAYER = len(ARCHITECTURES["llama"].layers)


def test_describes_itself(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path) as model:
        assert model.architecture == "llama"
        assert model.n_embd == model.n_embd_out == N_EMBD
        assert (model.n_head, model.n_head_kv) == (N_HEAD, N_HEAD_KV)
        assert model.n_layer == len(ARCHITECTURES["llama"].layers)
        assert model.n_ctx_train == N_CTX_TRAIN
        assert model.head_dims == (16, 16)
        assert model.size_bytes == 4 * model.n_params > 0
        assert model.metadata["general.name"]
        assert int(model.metadata["llama.block_count"]) == model.n_layer
        assert model.has_decoder
        assert not model.has_encoder
        assert model.decoder_start_token is None
        assert not model.is_recurrent
        assert not model.is_hybrid
        assert model.is_causal
        assert model.n_swa == 0
        assert "llama" in repr(model)


def test_kinds_of_memory() -> None:
    kinds = {}
    for name in ARCHITECTURES:
        with Model(gguf_path(name)) as model:
            kinds[name] = (model.is_recurrent, model.is_hybrid, model.n_swa > 0)
    assert kinds["mamba"] == (True, False, False)
    assert kinds["jamba"] == (False, True, False)
    assert kinds["gemma3"] == (False, False, True)
    assert kinds["llama"] == (False, False, False)


def test_progress_rises_to_one(tiny_llama_path: Path) -> None:
    seen: list[float] = []
    Model(tiny_llama_path, progress=seen.append).close()  # None goes on
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_progress_cancels(tiny_llama_path: Path) -> None:
    with pytest.raises(ModelLoadCancelled):
        Model(tiny_llama_path, progress=lambda fraction: False)


def test_exception_in_progress_is_raised(tiny_llama_path: Path) -> None:
    def fail(fraction: float) -> bool:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Model(tiny_llama_path, progress=fail)


@pytest.mark.parametrize("mode", ["auto", "mmap", "none"])
def test_load_modes(tiny_llama_path: Path, mode: str) -> None:
    with Model(tiny_llama_path, load_mode=mode, check_tensors=True) as model:
        assert model.n_params > 0


def test_splits(tiny_llama_path: Path) -> None:
    with Model("one of one", splits=[tiny_llama_path]) as model:
        assert model.architecture == "llama"


def test_overrides(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path, kv_overrides={"llama.context_length": 77}) as model:
        assert model.n_ctx_train == 77
    with pytest.raises(ArgumentError, match="1 to 127 bytes"):
        Model(tiny_llama_path, kv_overrides={"k" * 128: 1})


def test_vocab_only(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path, vocab_only=True) as model:
        assert model.n_head == model.n_head_kv == 0
        tokens = model.vocab.tokenize("a b")
        assert model.vocab.detokenize(tokens, remove_special=True).strip() == "a b"


def test_devices(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path, devices=[]) as model:
        assert model.n_params > 0
    for name in ("no such device", "CPU"):
        with pytest.raises(ArgumentError) as caught:
            Model(tiny_llama_path, devices=[name])
        assert caught.value.argument == "devices"


@pytest.mark.parametrize(
    ("kind", "params", "share"),
    [
        ("gpu", {}, 1),
        ("igpu", {"n_gpu_layers": 99}, 1),
        ("gpu", {"n_gpu_layers": N_LAYER + 1}, 1),  # the output counts as one
        ("gpu", {"n_gpu_layers": N_LAYER}, N_LAYER / (N_LAYER + 1)),  # the first one is the CPU's
        ("gpu", {"n_gpu_layers": 0}, 0),
        ("gpu", {"devices": []}, 0),
        ("gpu", {"devices": ()}, 0),
        ("accel", {}, 0),
        ("accel", {"devices": ["it"]}, 1),
    ],
)
def test_what_devices_compute(
    kind: str,
    params: dict[str, Any],
    share: float,
    tiny_llama_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices = {"CPU": SimpleNamespace(name="CPU", kind="cpu")}
    devices["it"] = SimpleNamespace(name="it", kind=kind)
    monkeypatch.setattr(runtime, "devices", lambda: devices)
    with Model(tiny_llama_path, **params) as model:
        assert model.n_layer == N_LAYER
        assert model.offloaded == share


@pytest.mark.parametrize(
    ("params", "argument"),
    [
        ({"load_mode": "fast"}, "load_mode"),
        ({"split_mode": 17}, "split_mode"),
        ({"n_gpu_layers": 2**40}, "n_gpu_layers"),
        ({"n_gpu_layers": 1.5}, "n_gpu_layers"),
        ({"check_tensors": 1}, "check_tensors"),
        ({"tensor_split": [-1.0]}, "tensor_split"),
        ({"tensor_split": [1.0] * 999}, "tensor_split"),
        ({"progress_callback": None}, "progress_callback"),
        ({"n_gpu_layer": 1}, "n_gpu_layer"),
        ({"no_alloc": True, "load_mode": "mmap"}, "load_mode"),
        ({"kv_overrides": {"": 1}}, "kv_overrides"),
        ({"kv_overrides": {"a": []}}, "kv_overrides[a]"),
        ({"kv_overrides": {"a": 2**70}}, "kv_overrides[a]"),
    ],
)
def test_bad_options(tiny_llama_path: Path, params: dict[str, object], argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Model(tiny_llama_path, **params)  # type: ignore[arg-type]
    assert caught.value.argument == argument


def test_a_misspelt_option_is_named(tiny_llama_path: Path) -> None:
    with pytest.raises(ArgumentError, match="did you mean n_gpu_layers"):
        Model(tiny_llama_path, n_gpu_layer=1)


def test_close(tiny_llama_path: Path) -> None:
    model = Model(tiny_llama_path)
    vocab = model.vocab
    model.close()
    model.close()
    assert model.closed
    assert model.n_embd > 0  # what it is can still be read
    for use in (
        lambda: vocab.tokenize("x"),
        lambda: vocab.is_eog(0),
        lambda: Context(model),
        lambda: model.__enter__(),
    ):
        with pytest.raises(ClosedError):
            use()


def test_a_context_outlives_its_model(tiny_llama_path: Path) -> None:
    model = Model(tiny_llama_path)
    n_vocab = model.n_vocab
    context = Context(model, n_threads=1, n_ctx=256)
    batch, loaded = context.batch(), weakref.ref(model.ptr)
    model.close()
    with context:
        batch.extend([5, 6, 7], 0, 0)
        context.decode(batch)
        assert context.logits().shape == (n_vocab,)
    assert loaded() is None  # the context was the last to need it


def test_nothing_is_printed(tiny_llama_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Model(tiny_llama_path).close()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
