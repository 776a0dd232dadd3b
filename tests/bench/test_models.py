"""The benches' models: shapes, weights, vocabularies, quantisation; and llama.cpp's tools."""

import dataclasses
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from bench import models, serve, tools
from bench.__main__ import main
from bench.arms import batched_bench_row
from bench.cache import cache_folder
from bench.case import Case
from bench.harness import facts_of
from bench.shapes import GEMMA3_1B, QWEN2_0_5B, SHAPES, Shape
from bench.tools import ToolError, source_tree, tool
from pyllamabatch import Model, _native
from pyllamabatch.llama.context import Context
from pyllamabatch.raw import ffi, lib
from pyllamabatch.report.records import Record
from tests.support.models_gguf import N_VOCAB, gguf_path, vocabulary


@pytest.mark.parametrize(
    ("shape", "n_params"),
    [(QWEN2_0_5B, 494_032_768), (GEMMA3_1B, 999_885_952)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_shapes_have_the_published_number_of_parameters(shape: Shape, n_params: int) -> None:
    assert shape.n_params == n_params


def small(shape: Shape) -> Shape:
    """A relative with few layers, narrow ones, and the vocabulary of a tiny model."""
    head_dim = shape.head_dim // 2
    return dataclasses.replace(
        shape, n_layer=shape.sliding_pattern or 2, head_dim=head_dim,
        n_embd=shape.n_head * head_dim, n_ff=256, n_vocab=N_VOCAB,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_small_shape_is_written_quantised_and_run(name: str, tmp_path: Path) -> None:
    shape = small(SHAPES[name])
    half, quantised = tmp_path / "half.gguf", tmp_path / "quantised.gguf"
    models.write_f16(shape, half, gguf_path("llama"), seed=3)
    found = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in gguf.GGUFReader(half).tensors}
    assert found == {spec.name: spec.shape for spec in shape.tensors()}

    models.quantise(half, quantised, "Q4_K_M", n_threads=1)
    types = {t.tensor_type.name for t in gguf.GGUFReader(quantised).tensors}
    assert "Q4_K" in types
    assert quantised.stat().st_size < half.stat().st_size
    with Model(quantised) as model, Context(model, n_ctx=256, n_threads=1) as context:
        assert model.architecture == shape.architecture
        assert model.n_params == shape.n_params
        assert model.n_swa == shape.sliding_window
        batch = context.batch()
        batch.extend([5, 6, 7], 0, 0)
        context.decode(batch)
        assert np.isfinite(context.logits()).all()
        if shape.branch_scale < 1:
            assert context.logits().argmax() == 8  # the last token's next
        assert model.vocab.n_tokens == N_VOCAB
        assert model.vocab.tokenize("the secret word").size < 10
        assert model.vocab.token_to_piece(N_VOCAB - 2) == vocabulary()[0][-2].encode()


def test_values_depend_on_name_and_seed_alone() -> None:
    first, second, *_ = small(QWEN2_0_5B).tensors()
    matrix = dataclasses.replace(first, shape=(9000, 8))
    one = models.random_tensor(matrix, 1)
    np.testing.assert_array_equal(one, models.random_tensor(matrix, 1))
    assert not np.array_equal(one, models.random_tensor(matrix, 2))
    assert one.dtype == np.float16
    assert np.std(one.astype(np.float32)) == pytest.approx(1 / np.sqrt(8), rel=0.02)
    assert second.norm
    assert np.mean(models.random_tensor(second, 1)) == pytest.approx(1.0, abs=0.02)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(small(QWEN2_0_5B), n_vocab=N_VOCAB + 1)
    with pytest.raises(ValueError, match=f"has {N_VOCAB} tokens, the shape says {N_VOCAB + 1}"):
        models.write_f16(other, tmp_path / "m.gguf", gguf_path("llama"))


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match="not one of"):
        main(["decode", "--model", "nowhere.gguf"])


def test_the_cache_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLLAMABATCH_BENCH_CACHE", str(tmp_path / "here"))
    assert cache_folder("models") == tmp_path / "here" / "models"
    assert (tmp_path / "here" / "models").is_dir()


def test_the_keys_are_those_of_upstreams_tools() -> None:
    """Read from the sources of llama-bench and llama-batched-bench that we build."""
    folder = source_tree() / "tools"
    text = (folder / "llama-bench" / "llama-bench.cpp").read_text(encoding="utf-8")
    text += (folder / "batched-bench" / "batched-bench.cpp").read_text(encoding="utf-8")
    ours = {
        "bench", "arm", "includes", "run_id", "repeat", "sampling", "n_cores", "memory_bytes",
        "os", "load_average", "build_options", "versions", "model_seed", "seed", "kv_unified",
        "detail", "schema", "error",
    }  # fmt: skip
    names = {field.name for field in dataclasses.fields(Record)}
    assert ours < names
    assert {name for name in names - ours if f'"{name}"' not in text.replace('\\"', '"')} == set()


def test_the_servers_options_are_upstreams(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "tool", lambda name, log: Path(name))
    text = (source_tree() / "common" / "arg.cpp").read_text(encoding="utf-8")
    for variant in (case, dataclasses.replace(case, kv_unified=True, n_gpu_layers=7)):
        command = serve.llama_server(variant, backend_sampling=True)
        options = [word for word in command if word.startswith("-") and not word[1:].isdigit()]
        assert [word for word in options if f'"{word}"' not in text] == []
    assert ("-kvu" in command, "-ngl" in command) == (True, True)
    assert command[command.index("-np") + 1] == "3"
    assert int(command[command.index("-c") + 1]) == case.n_ctx


def test_tools_that_were_built_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "llama-batched-bench" + (".exe" if sys.platform == "win32" else "")
    (tmp_path / name).touch()
    monkeypatch.setenv("PLB_LLAMA_CPP_TOOLS", str(tmp_path))
    assert tool("llama-batched-bench") == tmp_path / name
    with pytest.raises(ToolError, match="llama-server is missing"):
        tool("llama-server")
    assert "tools" not in facts_of()["versions"]
    (tmp_path / "libggml-cpu.so").touch()
    assert facts_of()["versions"]["tools"] == "with a ggml of their own"


def test_tools_use_the_packages_ggml_if_it_is_of_the_same_llama_cpp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = Path(_native.__file__).parent / "lib"
    linked = bool(list(package.glob("libggml-cpu.*")))  # not on Windows, nor a portable build
    number = int(ffi.string(lib.plb_llama_cpp_build()).decode().removeprefix("b"))
    monkeypatch.setattr(tools, "build_number", lambda: number)
    assert tools.ggml_folder() == (package if linked else None)
    monkeypatch.setattr(tools, "build_number", lambda: number + 1)
    assert tools.ggml_folder() is None


def test_a_tool_that_prints_nothing_is_asked_again(tmp_path: Path) -> None:
    """llama-batched-bench may end before its logger has written."""
    script = tmp_path / "tool.py"
    script.write_text(
        "import pathlib, sys\n"
        "seen = pathlib.Path(sys.argv[1])\n"
        "n = len(seen.read_text()) if seen.exists() else 0\n"
        "seen.write_text('x' * (n + 1))\n"
        "print('noise')\n"
        "n and print('{\"t_tg\": 1.5}')\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "seen")]
    assert batched_bench_row(command) == {"t_tg": 1.5}
    assert (tmp_path / "seen").read_text() == "xx"
    with pytest.raises(ToolError, match="gave no result"):
        batched_bench_row([sys.executable, "-c", "raise SystemExit('broken')"])
