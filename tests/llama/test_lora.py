"""LoRA adapters: applied, scaled, dropped; what keeps them alive."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from pyllamabatch import Context, LoraAdapter, Model
from pyllamabatch.errors import AdapterError, ArgumentError, ClosedError, UnsupportedOperation
from tests.support.child import run_itself
from tests.support.decoding import decode
from tests.support.models_gguf import gguf_path
from tests.support.models_special import write_lora

PROMPT = [10, 20, 30, 40, 50]


@pytest.fixture(scope="module")
def lora_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora.gguf"
    write_lora(path)
    return path


@pytest.fixture
def model() -> Iterator[Model]:
    with Model(gguf_path("llama")) as model:
        yield model


def run(context: Context) -> np.ndarray:
    context.memory.clear()
    return decode(context, PROMPT)


def test_apply_scale_and_drop(model: Model, lora_path: Path) -> None:
    with Context(model, n_threads=1, n_ctx=256) as context, LoraAdapter(model, lora_path) as lora:
        assert lora.metadata["general.name"] == "tiny lora"
        plain = run(context)
        context.set_loras([(lora, 1.0)])
        full = run(context)
        context.set_loras([(lora, 0.5)])
        half = run(context)
        assert np.abs(full - plain).max() > 0.5
        assert np.abs(full - half).max() > 0.1
        context.set_loras([(lora, 0.0)])
        np.testing.assert_allclose(run(context), plain, atol=1e-5)
        context.set_loras([(lora, 1.0)])
        np.testing.assert_allclose(run(context), full, atol=1e-5)
        context.set_loras([])
        np.testing.assert_allclose(run(context), plain, atol=1e-5)


def test_contexts_keep_what_they_use(model: Model, lora_path: Path) -> None:
    with Context(model, n_threads=1, n_ctx=256) as context:
        lora = LoraAdapter(model, lora_path)
        context.set_loras([(lora, 1.0)])
        expected = run(context)
        lora.close()
        lora.close()
        model.close()
        np.testing.assert_allclose(run(context), expected, atol=1e-5)
        with pytest.raises(ClosedError):
            context.set_loras([(lora, 1.0)])
        context.set_loras([])
        assert np.abs(run(context) - expected).max() > 0.5


def test_threads_may_load_and_free_them_while_others_compute() -> None:
    """In a process of its own: a list that two threads changed at once ended it."""
    run_itself(__file__)


def load_and_free(path: Path) -> None:
    def change() -> None:
        for _ in range(250):
            adapters = [LoraAdapter(one, path) for _ in range(40)]
            del adapters

    def compute() -> None:
        with Context(one, n_threads=1, n_ctx=256) as context, LoraAdapter(one, path) as lora:
            for i in range(1200):
                context.set_loras([(lora, 0.5)][: i % 2])
                run(context)

    write_lora(path)
    with Model(gguf_path("llama")) as one, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work) for work in (change, compute) * 4]:
            done.result()


def test_of_another_model(model: Model, lora_path: Path) -> None:
    with (
        Model(gguf_path("llama")) as twin,
        Context(twin, n_threads=1, n_ctx=256) as context,
        LoraAdapter(model, lora_path) as lora,
        pytest.raises(ArgumentError, match="another"),
    ):
        context.set_loras([(lora, 1.0)])


def test_bad_scale(model: Model, lora_path: Path) -> None:
    with Context(model, n_threads=1, n_ctx=256) as context, LoraAdapter(model, lora_path) as lora:
        for scale in (float("nan"), float("inf")):
            with pytest.raises(ArgumentError, match="finite"):
                context.set_loras([(lora, scale)])


def test_files_that_are_none(model: Model, tmp_path: Path) -> None:
    other, wide, cut = tmp_path / "other", tmp_path / "wide", tmp_path / "cut"
    write_lora(other, architecture="qwen2")
    write_lora(wide, width=96)
    write_lora(cut)
    cut.write_bytes(cut.read_bytes()[:-500])
    for path, reason in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (gguf_path("llama"), "adapter"),
        (other, "arch mismatch"),
        (wide, "shape"),
        (cut, "can't load"),
    ):
        with pytest.raises(AdapterError, match=reason):
            LoraAdapter(model, path)


def test_needs_weights(lora_path: Path) -> None:
    with Model(gguf_path("llama"), vocab_only=True) as model, pytest.raises(UnsupportedOperation):
        LoraAdapter(model, lora_path)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        load_and_free(Path(folder) / "lora.gguf")
