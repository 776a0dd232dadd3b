"""Memory: what it holds after each operation, and what it refuses.

What a sequence gives afterwards is in tests/properties/test_invariance_memory.py.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pyllamabatch import Batch, Context, Model
from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from tests.support.decoding import loaded
from tests.support.models_gguf import SLIDING_WINDOW, Architecture
from tests.support.models_special import write_deepseek4

N = 60  # longer than gemma3's window
TOKENS = [10 + 7 * i % 400 for i in range(N)]
NEXT = [33, 44, 55]
TOLERANCE = 0.06  # of logits with a deviation of 4: other batch shapes, other kernels, F16 cache


@pytest.fixture(params=[True, False], ids=["unified", "streams"])
def context(request: pytest.FixtureRequest, architecture: Architecture) -> Iterator[Context]:
    model = loaded(architecture.name)
    with Context(model, n_threads=1, n_ctx=1024, n_seq_max=4, kv_unified=request.param) as context:
        yield context


def decode(context: Context, tokens: list[int], pos: int, seq: int) -> np.ndarray:
    batch = Batch(len(tokens))
    batch.extend(tokens, pos, seq, [True] * len(tokens))
    context.decode(batch)
    return np.array(context.logits_all())


def fresh(context: Context, tokens: list[int], n_last: int) -> np.ndarray:
    """The last rows' logits of a context that has seen nothing else."""
    with Context(context.model, n_threads=1, n_ctx=1024) as alone:
        return decode(alone, tokens, 0, 0)[-n_last:]


def spans(context: Context) -> list[tuple[int, int]]:
    memory = context.memory
    return [(memory.pos_min(seq), memory.pos_max(seq)) for seq in range(context.n_seq_max)]


EMPTY = (-1, -1)


def test_a_part_of_a_sequence(context: Context) -> None:
    """Copied, removed, shifted where the memory can; else refused, and nothing changes."""
    memory, can = context.memory, context.capabilities
    decode(context, TOKENS, 0, 0)
    before = spans(context)
    refused: list[Callable[[], None]] = []
    if not can.prefix_copy:
        refused += [partial(memory.seq_cp, 0, 1, *r) for r in ((0, N - 5), (1, -1), (5, 10))]
    if not can.partial_removal:
        refused += [partial(memory.seq_rm, 0, *r) for r in ((N - 10, -1), (0, 5), (5, 10))]
    if not can.can_shift:
        refused += [partial(memory.seq_add, 0, 0, -1, 5), partial(memory.seq_div, 0, 0, -1, 2)]
    for use in refused:
        with pytest.raises(UnsupportedOperation, match=r"only all of|goes back|can't shift"):
            use()
    assert spans(context) == before
    if can.prefix_copy:
        memory.seq_cp(0, 1, 0, N - 5)
        assert memory.pos_max(1) == N - 6
    if can.partial_removal:
        memory.seq_rm(0, N - 5)
        assert memory.pos_max(0) == N - 6
    if can.can_shift:
        memory.seq_add(0, 0, -1, 7)
        assert memory.pos_max(0) == N + 1
    assert np.isfinite(decode(context, NEXT, memory.pos_max(0) + 1, 0)).all()


def test_a_window_that_is_forgotten() -> None:
    """gemma3, one sequence at a time in a small cache: old cells of the window are reused."""
    with Context(loaded("gemma3"), n_threads=1, n_ctx=1024, n_ubatch=32, swa_full=False) as context:
        assert context.capabilities.swa_window == SLIDING_WINDOW
        for start in range(0, 900, 30):
            decode(context, [5 + start % 100] * 30, start, 0)
        low = context.memory.pos_min(0)
        assert 0 < low < 900 - SLIDING_WINDOW
        with pytest.raises(UnsupportedOperation, match="sliding window"):
            context.memory.seq_rm(0, low + SLIDING_WINDOW - 2)
        with pytest.raises(UnsupportedOperation, match="sliding window"):
            context.memory.seq_rm(0, 5)
        assert context.memory.pos_max(0) == 899
        context.memory.seq_rm(0, low + SLIDING_WINDOW - 1)
        assert context.memory.pos_max(0) == low + SLIDING_WINDOW - 2
        decode(context, NEXT, low + SLIDING_WINDOW - 1, 0)
        context.memory.seq_rm(0)
        assert spans(context) == [EMPTY]


def test_states_wait_for_what_is_pending() -> None:
    with Context(
        loaded("llama"), n_threads=1, n_ctx=1024, n_seq_max=2, kv_unified=False
    ) as context:
        decode(context, TOKENS, 0, 0)
        context.memory.seq_cp(0, 1)
        assert context.memory.is_stale(1)
        assert not context.memory.is_stale(0)
        with pytest.raises(UnsupportedOperation, match="next decode"):
            context.state_seq_get(1)
        decode(context, [5], N, 0)
        assert not context.memory.is_stale(1)
        data = context.state_seq_get(1)
        context.state_seq_set(data, 0)
        np.testing.assert_allclose(
            decode(context, NEXT, N, 0), fresh(context, TOKENS + NEXT, 3), atol=TOLERANCE
        )
        context.memory.seq_add(0, 0, -1, 2)
        with pytest.raises(UnsupportedOperation, match="next decode"):
            context.state_seq_get(0)


def test_no_state_is_loaded_where_a_copy_waits() -> None:
    """libllama copies streams with the next decode: from or to cells that were loaded before it."""
    with Context(loaded("llama"), n_ctx=512 * 3, n_seq_max=3, kv_unified=False) as context:
        decode(context, [5, 6, 7], 0, 0)
        decode(context, [8, 9], 0, 1)
        data = context.state_seq_get(1)
        context.memory.seq_cp(0, 2)
        context.memory.seq_rm(0)
        for seq in (0, 2):
            with pytest.raises(UnsupportedOperation, match="waits for the next decode"):
                context.state_seq_set(data, seq)
        expected = decode(context, [4], 3, 2)
        context.state_seq_set(data, 0)
        assert context.memory.pos_max(0) == 1
        context.memory.seq_rm(1)
        context.memory.seq_cp(0, 1)
        context.memory.clear()
        for seq in (0, 1):
            with pytest.raises(UnsupportedOperation, match="waits for the next decode"):
                context.state_seq_set(data, seq)
        decode(context, [5, 6, 7], 0, 2)
        assert (decode(context, [4], 3, 2) == expected).all()


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "streams"])
def test_a_copy_has_compressed_keys_too(tmp_path: Path, kv_unified: bool) -> None:
    write_deepseek4(tmp_path / "model.gguf")
    tokens = [10 + 7 * i % 400 for i in range(300)]
    made = partial(Context, n_threads=1, n_ctx=2048, n_seq_max=2, kv_unified=kv_unified)
    with Model(tmp_path / "model.gguf") as model, made(model) as context:
        decode(context, tokens, 0, 0)
        context.memory.seq_cp(0, 1)
        with pytest.raises(UnsupportedOperation, match="next decode"):
            context.state_seq_get(1)
        source, copy = (decode(context, NEXT, len(tokens), seq) for seq in (0, 1))
        np.testing.assert_array_equal(copy, source)


@pytest.mark.parametrize("kv_unified", [True, False], ids=["unified", "streams"])
def test_compressed_keys_outlive_their_source(tmp_path: Path, kv_unified: bool) -> None:
    """A copy is made with the next decode: what it is made of must be there then."""
    write_deepseek4(tmp_path / "model.gguf")
    tokens, others = ([10 + step * i % 400 for i in range(300)] for step in (7, 11))
    made = partial(Context, n_threads=1, n_ctx=3 * 512, n_seq_max=3, kv_unified=kv_unified)
    with Model(tmp_path / "model.gguf") as model, made(model) as context:
        memory = context.memory
        expected = []
        for text in (tokens, others):
            memory.clear()
            decode(context, text, 0, 0)
            expected.append(decode(context, NEXT, len(text), 0))
        memory.clear()
        decode(context, tokens, 0, 0)
        decode(context, others, 0, 1)
        memory.seq_cp(0, 2)
        memory.seq_rm(0)
        memory.seq_cp(1, 0)
        memory.seq_rm(1)
        decode(context, [5], 0, 1)
        for seq, logits in zip((2, 0), expected, strict=True):
            np.testing.assert_array_equal(decode(context, NEXT, len(tokens), seq), logits)


def test_bf16_keys_are_not_shifted() -> None:
    with Context(loaded("llama"), n_threads=1, n_ctx=256, type_k="bf16") as context:
        assert not context.memory.can_shift
        decode(context, TOKENS, 0, 0)
        with pytest.raises(UnsupportedOperation):
            context.memory.seq_add(0, 0, -1, 1)


@pytest.mark.parametrize(
    ("use", "argument"),
    [
        (lambda m: m.pos_min(-1), "seq_id"),
        (lambda m: m.pos_max(4), "seq_id"),
        (lambda m: m.seq_rm(-2), "seq_id"),
        (lambda m: m.seq_rm(4), "seq_id"),
        (lambda m: m.seq_rm(255), "seq_id"),
        (lambda m: m.seq_rm("0"), "seq_id"),
        (lambda m: m.seq_rm(0, -2), "p0"),
        (lambda m: m.seq_rm(0, 0, 2**31), "p1"),
        (lambda m: m.seq_rm(0, 0.5), "p0"),
        (lambda m: m.seq_cp(-1, 0), "src"),
        (lambda m: m.seq_cp(0, 4), "dst"),
        (lambda m: m.seq_cp(0, 2**40), "dst"),
        (lambda m: m.seq_keep(-1), "seq_id"),
        (lambda m: m.seq_keep(4), "seq_id"),
        (lambda m: m.seq_add(-1, 0, -1, 1), "seq_id"),
        (lambda m: m.seq_add(0, 0, -1, 2**31), "delta"),
        (lambda m: m.seq_add(0, 0, -1, 2**31 - 5), "delta"),
        (lambda m: m.seq_div(0, 0, -1, 0), "divisor"),
        (lambda m: m.seq_div(0, 0, -1, -3), "divisor"),
        (lambda m: m.seq_div(9, 0, -1, 2), "seq_id"),
    ],
)
def test_bad_arguments(use, argument: str) -> None:  # type: ignore[no-untyped-def]
    with Context(loaded("llama"), n_threads=1, n_ctx=256, n_seq_max=4) as context:
        decode(context, TOKENS[:8], 0, 0)
        before = spans(context)
        with pytest.raises(ArgumentError) as caught:
            use(context.memory)
        assert caught.value.argument == argument
        assert spans(context) == before
