"""Bad input of every kind, all in one process: an exception each, and the process works on.

What libllama would end the process for is here on purpose. The argument checks of single
functions are with their tests; these are the ways in which a user goes wrong.
"""

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from pyllamabatch import Batch, Model
from pyllamabatch.errors import ArgumentError, ModelLoadError
from pyllamabatch.llama.context import Context
from tests.support.models_gguf import gguf_path

N_CTX = 256


@pytest.fixture(autouse=True)
def works_on(model: Model) -> Iterator[None]:
    """After each test the process is there and the model still answers."""
    yield
    with Context(model, n_threads=1, n_ctx=N_CTX) as context:
        batch = Batch(3)
        batch.extend([5, 6, 7], 0, 0)
        context.decode(batch)
        assert np.isfinite(context.logits()).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a GGUF"), (b"GGU", "not a GGUF"), (b"GGUF", "rejects"),
        (b"GGUF" + bytes(100), "rejects"), (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "rejects"),
        (b"PK\x03\x04 a zip archive", "not a GGUF"), (b"GGML" * 100, "not a GGUF"),
    ],
)  # fmt: skip
def test_not_a_model(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        Model(path)
    assert caught.value.path == str(path)


def test_no_file(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ModelLoadError, match=reason):
            Model(path)
    for bad in ("", "a\0b"):
        with pytest.raises(ArgumentError):
            Model(bad)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_truncated_anywhere(tmp_path: Path, name: str) -> None:
    whole = gguf_path(name).read_bytes()
    start = GGUFReader(gguf_path(name)).data_offset
    path = tmp_path / "cut.gguf"
    for size in [*range(0, start, 211), start, start + 1, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelLoadError):
            Model(path)


def test_damaged_metadata(tmp_path: Path) -> None:
    """Bits flipped in the header: the file loads or not, and nothing else happens."""
    whole = gguf_path("llama").read_bytes()
    start = GGUFReader(gguf_path("llama")).data_offset
    path = tmp_path / "bad.gguf"
    random_ = random.Random(0)
    outcomes = set()
    for _ in range(60):
        data = bytearray(whole)
        data[random_.randrange(start)] ^= 1 << random_.randrange(8)
        path.write_bytes(data)
        try:
            Model(path, load_mode="none").close()
        except ModelLoadError as error:
            outcomes.add(error.reason)
        else:
            outcomes.add("loads")
    assert len(outcomes) >= 2


def test_a_failed_assertion_is_an_error(tmp_path: Path) -> None:
    """Two equal tokens: llama.cpp asserts that there are none."""
    data = gguf_path("llama").read_bytes()
    assert data.count(b"<0x41>") == 1
    path = tmp_path / "twice.gguf"
    path.write_bytes(data.replace(b"<0x41>", b"<0x42>"))
    with pytest.raises(ModelLoadError, match="GGML_ASSERT"):
        Model(path)


def test_any_order_of_closing_and_collecting() -> None:
    for order in range(6):
        model = Model(gguf_path("llama"))
        context = Context(model, n_threads=1, n_ctx=N_CTX)
        batch = Batch(3)
        batch.extend([5, 6, 7], 0, 0)
        context.decode(batch)
        view = context.logits()
        expected = view.copy()
        steps: list[Callable[[], None]] = [model.close, context.close, gc.collect]  # type: ignore[list-item]
        for i in np.random.default_rng(order).permutation(3):
            steps[i]()
        assert (view == expected).all()
        del model, context
        gc.collect()
        assert (view == expected).all()
