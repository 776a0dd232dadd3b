"""Context: parameters, decoding, outputs, states, one thread at a time."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch import Context, Model
from pyllamabatch.errors import (
    ArgumentError,
    ClosedError,
    ContextBusy,
    ContextCreateError,
    DecodeAborted,
    FatalDecodeError,
    InvalidBatch,
    KvCacheFull,
    NotEnoughMemory,
    StateError,
    UnsupportedOperation,
)
from pyllamabatch.llama import runtime
from pyllamabatch.raw import ffi, lib
from tests.support.decoding import decode
from tests.support.models_gguf import N_EMBD, N_VOCAB, gguf_path

PROMPT = [10, 20, 30, 40, 50, 60, 70]


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with Context(model, n_threads=1, n_ctx=512, n_seq_max=4) as context:
        yield context


def test_values_are_read_back(model: Model) -> None:
    with Context(model, n_threads=1, n_ctx=300, n_batch=64, n_ubatch=1000, n_seq_max=2) as context:
        assert context.n_ctx == 512  # rounded up
        assert (context.n_batch, context.n_ubatch) == (64, 64)
        assert context.n_seq_max == 2
        assert context.capabilities.unified
        assert context.n_ctx_seq == 512
    with Context(model, n_threads=1, n_ctx=1024, n_seq_max=2, kv_unified=False) as context:
        assert context.n_ctx_seq == 512
        assert not context.capabilities.unified
    with Context(model) as context:
        assert context.n_ctx == model.n_ctx_train


def test_parameters_have_their_own_names(model: Model) -> None:
    with Context(
        model,
        n_ctx=256,
        type_k="f32",
        type_v=lib.GGML_TYPE_F32,
        flash_attn_type="disabled",
        rope_freq_base=500000.0,
        rope_scaling_type="linear",
        embeddings=True,
        pooling_type="none",
        n_threads=1,
        no_perf=False,
    ) as context:
        assert context.params["type_k"] == context.params["type_v"] == lib.GGML_TYPE_F32
        assert context.params["rope_freq_base"] == 500000.0
        assert context.pooling_type == lib.LLAMA_POOLING_TYPE_NONE
        assert context.n_threads == context.n_threads_batch == 1
        context.set_threads(2, 1)
        assert (context.n_threads, context.n_threads_batch) == (2, 1)


BAD: dict[str, list[Any]] = {
    "n_ctx": [-1, 2**31, 2**32 - 1, 2**64, "512", 512.0],
    "n_batch": [0, -5, {"n_seq_max": 9, "n_batch": 8}, {"n_seq_max": 9, "n_ctx": 8}],
    "n_ubatch": [-1],
    "n_seq_max": [0, 257],
    "n_outputs_max": [{"n_seq_max": 9, "n_outputs_max": 8}],
    "n_rs_seq": [511],
    "n_threads": [0, 10**6],
    "type_k": ["q4_k", "i32"],
    "type_v": ["q8_0", 10**6],  # 16 wide heads
    "pooling_type": ["average"],
    "embeddings": [1],
    "rope_freq_base": [float("nan")],
    "abort_callback": ["stop"],
    "n_cxt": [512],
}
"""By the argument that the error names: its value, or several arguments."""


@pytest.mark.parametrize(
    ("argument", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_bad_parameters(model: Model, argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        Context(model, **(value if isinstance(value, dict) else {argument: value}))
    assert caught.value.argument == argument
    assert caught.value.limit


def test_a_path_is_no_model(tiny_llama_path: Path) -> None:
    path: Any = tiny_llama_path
    with pytest.raises(ArgumentError, match=r"must be a Model: Model\(path\)"):
        Context(path)


def test_what_libllama_refuses_carries_its_reason(model: Model) -> None:
    with pytest.raises(ContextCreateError, match="MTP"):
        Context(model, ctx_type="mtp")


@pytest.mark.parametrize("n_ctx", [2**30, 2**31 - 256])
def test_too_large_for_memory(model: Model, n_ctx: int) -> None:
    with pytest.raises(ContextCreateError, match="GiB are available") as caught:
        Context(model, n_threads=1, n_ctx=n_ctx)
    assert isinstance(caught.value, NotEnoughMemory)
    assert caught.value.needed > caught.value.available > 0


def test_no_weights(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path, vocab_only=True) as model, pytest.raises(UnsupportedOperation):
        Context(model)
    with (
        Model(tiny_llama_path, no_alloc=True) as model,
        Context(model, n_threads=1, n_ctx=256) as context,
        pytest.raises(UnsupportedOperation, match="no_alloc"),
    ):
        decode(context, PROMPT)


def test_logits(context: Context) -> None:
    batch = context.batch()
    batch.extend(PROMPT, 0, 0, [False, True] + [False] * 4 + [True])
    context.decode(batch)
    everything = context.logits_all()
    assert everything.shape == (2, N_VOCAB)
    assert everything.dtype == np.float32
    assert (context.logits(1) == everything[0]).all()
    assert (context.logits(6) == context.logits(-1)).all()
    assert (context.logits(-2) == everything[0]).all()
    assert not (everything[0] == everything[1]).all()
    for row in (0, 5, 7, -3, 2**40):
        with pytest.raises(ArgumentError):
            context.logits(row)


def test_rows_after_a_smaller_batch(context: Context) -> None:
    decode(context, PROMPT)
    decode(context, [5], pos=len(PROMPT))
    assert context.logits(0).shape == (N_VOCAB,)
    with pytest.raises(ArgumentError):
        context.logits(6)  # of the batch before


def test_cache_full_leaves_memory_as_it_was(context: Context) -> None:
    decode(context, [7] * 500)
    with pytest.raises(KvCacheFull) as caught:
        decode(context, [7] * 13, pos=500)
    assert caught.value.code == 1
    assert context.memory.pos_max(0) == 499
    decode(context, [7] * 12, pos=500)
    assert context.memory.pos_max(0) == 511


def test_positions_must_go_on(context: Context) -> None:
    decode(context, PROMPT)
    with pytest.raises(InvalidBatch, match="positions") as caught:
        decode(context, [5], pos=20)
    assert caught.value.code == -1
    assert context.memory.pos_max(0) == len(PROMPT) - 1


@pytest.mark.parametrize(
    ("spoil", "argument"),
    [
        (lambda b: b.token.__setitem__(1, -1), "batch.token[1]"),
        (lambda b: b.token.__setitem__(2, N_VOCAB), "batch.token[2]"),
        (lambda b: b.pos.__setitem__(1, -5), "batch.pos[1]"),
        (lambda b: b.pos.__setitem__(0, 2**31 - 1), "batch.pos[0]"),
        (lambda b: b.n_seq_id.__setitem__(1, 0), "batch.n_seq_id[1]"),
        (lambda b: b.n_seq_id.__setitem__(1, 99), "batch.n_seq_id[1]"),
        (lambda b: b.seq_id.__setitem__((1, 0), 4), "batch.seq_id[1, 0]"),
        (lambda b: b.seq_id.__setitem__((1, 0), -1), "batch.seq_id[1, 0]"),
        (lambda b: setattr(b, "n_tokens", 0), "batch"),
    ],
)
def test_bad_rows(context: Context, spoil, argument: str) -> None:  # type: ignore[no-untyped-def]
    batch = context.batch()
    batch.extend([5, 6, 7], 0, 0)
    spoil(batch)
    with pytest.raises(ArgumentError) as caught:
        context.decode(batch)
    assert caught.value.argument == argument
    assert context.memory.pos_max(0) == -1


def test_rows_in_several_sequences(context: Context, model: Model) -> None:
    batch = context.batch()
    for pos, token in enumerate(PROMPT):
        batch.add(token, pos, [0, 2], logits=pos == len(PROMPT) - 1)
    context.decode(batch)
    assert context.memory.pos_max(0) == context.memory.pos_max(2) == len(PROMPT) - 1
    with (
        Context(model, n_threads=1, n_ctx=512, n_seq_max=4, kv_unified=False) as streams,
        pytest.raises(UnsupportedOperation, match="kv_unified"),
    ):
        streams.decode(batch)


def test_abort_callback(model: Model) -> None:
    stop = ffi.callback("bool(void *)", lambda _: True)
    with Context(model, n_threads=1, n_ctx=512, abort_callback=stop) as context:
        with pytest.raises(DecodeAborted) as caught:
            decode(context, PROMPT)
        assert caught.value.code == 2
        assert context.memory.pos_max(0) == -1


def test_quantized_values_need_flash_attention() -> None:
    with Model.default() as wide:
        with Context(wide, n_threads=1, n_ctx=256, type_k="q8_0", type_v="q8_0") as context:
            decode(context, PROMPT)
            context.memory.seq_add(0, 0, -1, 3)  # rotates quantized keys
            decode(context, [5], pos=len(PROMPT) + 3)
        with pytest.raises(ContextCreateError, match="flash_attn"):
            Context(wide, n_ctx=256, type_v="q8_0", flash_attn_type="disabled")


def test_perf_counts(context: Context) -> None:
    decode(context, PROMPT)
    context.synchronize()
    perf = context.perf()
    assert perf["n_p_eval"] == len(PROMPT)
    assert set(perf) >= {"n_reused", "t_p_eval_ms", "n_eval"}


def test_embeddings_of_tokens(model: Model) -> None:
    with Context(model, n_threads=1, n_ctx=512, embeddings=True, pooling_type="none") as context:
        batch = context.batch()
        batch.extend(PROMPT, 0, 0)
        context.decode(batch)
        rows = context.embeddings_all()
        assert rows.shape == (len(PROMPT), N_EMBD)
        assert (context.embeddings(3) == rows[3]).all()
        assert np.isfinite(rows).all()
        with pytest.raises(UnsupportedOperation, match="use embeddings"):
            context.embeddings_seq(0)


def test_pooled_embeddings(model: Model) -> None:
    """Their values: tests/engine/test_embedder.py."""
    params: dict[str, Any] = {"embeddings": True, "pooling_type": "mean", "n_seq_max": 2}
    with Context(model, n_threads=1, n_ctx=512, **params) as context:
        batch = context.batch()
        batch.extend(PROMPT, 0, 1)
        batch.extend(PROMPT[1:4], 0, 0)
        context.decode(batch)
        assert not np.allclose(context.embeddings_seq(0), context.embeddings_seq(1), atol=1e-3)
        with pytest.raises(UnsupportedOperation, match="use embeddings_seq"):
            context.embeddings(0)
        batch.clear()
        batch.extend(PROMPT[:3], len(PROMPT), 1)
        context.decode(batch)
        with pytest.raises(UnsupportedOperation, match="not in the last batch"):
            context.embeddings_seq(0)


@pytest.mark.parametrize(
    ("params", "limit"),
    [
        ({"n_batch": 6}, "n_batch=6"),
        ({"n_ubatch": 4, "embeddings": True, "pooling_type": "mean"}, "n_ubatch=4"),
        ({"n_ubatch": 4, "attention_type": "non_causal"}, "n_ubatch=4"),
        ({"n_outputs_max": 2}, "n_outputs_max=2"),
    ],
)
def test_more_rows_than_one_batch_may_have(
    model: Model, params: dict[str, Any], limit: str
) -> None:
    with Context(model, n_threads=1, n_ctx=512, **params) as context:
        batch = context.batch(len(PROMPT))
        batch.extend(PROMPT, 0, 0, [True] * len(PROMPT))
        with pytest.raises(ArgumentError, match=limit):
            context.decode(batch)
        assert context.memory.pos_max(0) == -1


def test_what_this_context_can_not_do(context: Context) -> None:
    batch = context.batch()
    batch.extend(PROMPT, 0, 0)
    for use, why in (
        (context.logits, "no logits"),
        (context.logits_all, "was not run"),
        (context.embeddings, "embeddings=True"),
        (lambda: context.encode(batch), "no encoder"),
    ):
        with pytest.raises(UnsupportedOperation, match=why):
            use()


def test_damaged_states(context: Context) -> None:
    decode(context, PROMPT)
    data = context.state_seq_get(0)
    flipped = [
        data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        for i in (*range(44), *range(44, len(data), 97))
    ]
    cut = [data[:n] for n in (0, 5, 43, 44, 45, len(data) // 2, len(data) - 1)]
    for bad in (*flipped, *cut, data + b"x", b"garbage" * 99):
        with pytest.raises(StateError):
            context.state_seq_set(bad, 0)
        assert context.memory.pos_max(0) == len(PROMPT) - 1
    assert context.state_seq_get(0) == data


def test_state_of_another_model(context: Context) -> None:
    with Model(gguf_path("qwen2")) as other, Context(other, n_threads=1, n_ctx=512) as source:
        decode(source, PROMPT)
        data = source.state_seq_get(0)
    with pytest.raises(StateError, match="another model"):
        context.state_seq_set(data, 0)


def test_state_that_does_not_fit(context: Context, model: Model) -> None:
    decode(context, [5] * 400)
    data = context.state_seq_get(0)
    with (
        Context(model, n_threads=1, n_ctx=256) as small,
        pytest.raises(StateError, match="does not fit"),
    ):
        small.state_seq_set(data, 0)
    with Context(model, n_threads=1, n_ctx=512, type_k="f32") as other:
        decode(other, PROMPT)
        with pytest.raises(StateError, match="type_k=1, this context has 0"):
            other.state_seq_set(data, 0)
        assert other.memory.pos_max(0) == len(PROMPT) - 1
    layout: dict[str, Any] = {"flash_attn_type": "disabled", "n_ctx": 512}
    with Context(model, n_threads=1, **layout) as other:
        decode(other, PROMPT)
        with pytest.raises(StateError, match="does not fit"):
            other.state_seq_set(data, 0)
        assert other.memory.pos_max(0) == -1
        decode(other, PROMPT)  # and it works on


def test_state_files_that_are_none(context: Context, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="No such file"):
        context.state_seq_load(tmp_path / "none", 0)
    with pytest.raises(StateError, match="Is a directory"):
        context.state_seq_load(tmp_path, 0)
    with pytest.raises(StateError, match="can't write"):
        context.state_seq_save(tmp_path / "none" / "x", 0)


def test_close(model: Model) -> None:
    context = Context(model, n_threads=1, n_ctx=256)
    memory, batch = context.memory, context.batch()
    batch.extend(PROMPT, 0, 0)
    context.close()
    context.close()
    assert context.closed
    for use in (
        lambda: context.decode(batch),
        lambda: context.logits(),
        lambda: context.synchronize(),
        lambda: context.state_seq_get(0),
        lambda: context.set_threads(1),
        lambda: context.perf(),
        lambda: context.n_threads,
        lambda: memory.pos_max(0),
        lambda: memory.clear(),
        lambda: memory.seq_rm(0),
        lambda: context.__enter__(),
    ):
        with pytest.raises(ClosedError):
            use()


def test_one_thread_at_a_time(context: Context) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with context.exclusive(), context.exclusive():  # again in the same thread: fine
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(10)
        batch = context.batch()
        batch.extend(PROMPT, 0, 0)
        for use in (
            lambda: context.decode(batch),
            lambda: context.memory.clear(),
            lambda: context.logits(),
            lambda: context.close(),
        ):
            with pytest.raises(ContextBusy):
                use()
        assert not context.closed
    finally:
        leave.set()
        thread.join()
    context.decode(batch)


def test_a_device_that_fails_behind_the_call_gives_no_outputs(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metal says so in its log alone; the logits that lie there are an earlier batch's."""
    decode(context, PROMPT)
    logged = runtime.logged
    failure = "error: command buffer 0 failed with status 5"
    monkeypatch.setattr(runtime, "logged", lambda *call: (logged(*call)[0], failure))
    for read in (context.synchronize, context.logits, context.logits_all):
        with pytest.raises(FatalDecodeError, match="command buffer 0"):
            read()
