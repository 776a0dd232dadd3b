"""Sizes of an engine's context where none were asked for."""

from typing import Any

import pytest

from pyllamabatch.engine import layout
from pyllamabatch.engine.context_defaults import CUDA_UBATCH, UBATCH, ubatch, ubatch_of
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.native_context import NativeContext
from pyllamabatch.errors import ArgumentError, NotEnoughMemory
from pyllamabatch.llama import runtime
from pyllamabatch.llama.model import Model
from tests.support.engines import greedy
from tests.support.models_gguf import gguf_path

GIB = 2**30


@pytest.mark.parametrize(
    ("options", "rows", "why"),
    [
        ({"given": 64, "cuda": True}, 64, "asked for"),
        ({"given": None, "cuda": False}, UBATCH, "wait longer"),
        ({"given": None, "cuda": True, "n_embd": 4096, "free": 60 * GIB}, CUDA_UBATCH, "CUDA"),
        ({"given": None, "cuda": True, "n_embd": 8192, "free": 20 * GIB}, 1024, "free memory"),
        ({"given": None, "cuda": True, "n_embd": 8192, "free": 1 * GIB}, UBATCH, "free memory"),
    ],
)
def test_rows_at_once_are_the_devices(options: dict[str, Any], rows: int, why: str) -> None:
    chosen = ubatch(**options)
    assert chosen.value == rows
    assert why in chosen.why


def test_a_device_that_does_not_compute_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = runtime.BackendDevice("CUDA0", "", "gpu", "CUDA", 60 * GIB, 80 * GIB)
    monkeypatch.setattr(runtime, "devices", lambda: {"CUDA0": gpu})
    for params, rows in ({}, CUDA_UBATCH), ({"devices": []}, UBATCH), ({"n_gpu_layers": 0}, UBATCH):
        with Model(gguf_path("llama"), **params) as model:
            assert ubatch_of(model, None).value == rows
            with NativeContext(model, n_ctx=512, n_seq_max=2, kv_unified=False) as context:
                assert context.asynchronous == (rows == CUDA_UBATCH)
                assert context.gap_max == (16 if rows == CUDA_UBATCH else 1)


def test_no_number_of_rows() -> None:
    with pytest.raises(ArgumentError, match="n_ubatch=-1"):
        ubatch(-1, cuda=False)


@pytest.mark.parametrize(
    ("machine", "rows"),
    [("nvidia-h200-gemma-3-1b-q4_k_m", CUDA_UBATCH), ("m2-ultra-gemma-3-4b-it-qat", UBATCH)],
)
def test_an_engine_says_why(machine: str, rows: int) -> None:
    with Engine(machine=machine, n_seq_max=4) as engine:
        assert engine.n_ubatch == rows
        assert engine.reasons.keys() == {"layout", "n_ubatch", "n_batch"}
        assert "in pieces" in engine.reasons["n_batch"]
        assert engine.reasons["layout"] == engine.layout
        assert engine.stats().reasons == engine.reasons


def test_a_window_stays_small_where_all_cells_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fits_without(model: Model, n_ctx: int, *, shrink: bool, **params: Any) -> int:
        asked.append(params.get("swa_full"))
        if params.get("swa_full") is False:
            return n_ctx
        raise NotEnoughMemory(2, 1, "n_ctx=0 would fit")

    monkeypatch.setattr(layout, "fitting_n_ctx", fits_without)
    with Model(gguf_path("gemma3")) as model:
        with Engine(model, n_seq_max=2, n_ctx=1024) as engine:
            assert asked == [None, False]
            assert "do not fit" in engine.reasons["swa_full"]
            assert len(engine.generate([[5, 6, 7]], greedy(3))[0].tokens) == 3
        with pytest.raises(NotEnoughMemory):
            Engine(model, n_seq_max=2, n_ctx=1024, swa_full=True)


def test_every_size_that_was_chosen_has_a_reason() -> None:
    with Model(gguf_path("gemma3")) as model:
        cases: list[tuple[dict[str, Any], str]]
        cases = [({}, "on: "), ({"swa_full": False}, "as was asked for")]
        for options, why in cases:
            with Engine(model, n_seq_max=2, n_ctx=1024, **options) as engine:
                assert engine.n_batch == 1024
                assert engine.reasons["n_batch"] == "as many as there are cells"
                assert engine.reasons["swa_full"].startswith(why)
                assert engine.reasons["n_ubatch"]
    with Model(gguf_path("llama")) as model, Engine(model, n_ctx=1024) as engine:
        assert "swa_full" not in engine.reasons
