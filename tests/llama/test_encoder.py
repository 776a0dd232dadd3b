"""Models without a memory (bert) and with a table of positions (bert, gpt2)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyllamabatch import Batch, Context, Model
from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.raw import lib
from tests.support.models_gguf import N_EMBD
from tests.support.models_special import N_POSITIONS, write_bert, write_gpt2

PROMPT = [10, 20, 30, 40, 50]


def batch_of(*sequences: list[int], pos: int = 0) -> Batch:
    batch = Batch(64, n_seq_max=1)
    for seq, tokens in enumerate(sequences):
        batch.extend(tokens, pos, seq)
    return batch


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("bert") / "bert.gguf"
    write_bert(path)
    with Model(path) as model:
        yield model


@pytest.fixture
def context(bert: Model) -> Iterator[Context]:
    with Context(bert, n_seq_max=4, embeddings=True) as context:
        yield context


def test_nothing_stays_in_memory(context: Context) -> None:
    can = context.capabilities
    assert not any((can.has_memory, can.causal, can.partial_removal, can.can_shift))
    assert context.pooling_type == lib.LLAMA_POOLING_TYPE_MEAN
    context.encode(batch_of(PROMPT))
    assert context.memory.pos_max(0) == -1
    context.memory.seq_rm(0)
    context.memory.clear()
    with pytest.raises(UnsupportedOperation, match="keeps nothing"):
        context.state_seq_get(0)


def test_pooled_embeddings(context: Context) -> None:
    context.encode(batch_of(PROMPT, PROMPT[::-1], PROMPT))
    first, second, third = (context.embeddings_seq(seq).copy() for seq in range(3))
    assert first.shape == (N_EMBD,)
    np.testing.assert_allclose(first, third, atol=1e-4)
    assert np.abs(first - second).max() > 1e-3
    context.decode(batch_of(PROMPT))  # does the same for such a model
    np.testing.assert_allclose(context.embeddings_seq(0), first, atol=1e-4)


def test_embeddings_of_tokens(bert: Model) -> None:
    with Context(bert, embeddings=True, pooling_type="none") as context:
        context.encode(batch_of(PROMPT))
        assert context.embeddings_all().shape == (len(PROMPT), N_EMBD)


def test_past_the_table_of_positions(context: Context) -> None:
    context.encode(batch_of([5], pos=N_POSITIONS - 1))
    with pytest.raises(ArgumentError, match=rf"0\.\.{N_POSITIONS - 1}") as caught:
        context.encode(batch_of([5], pos=N_POSITIONS))
    assert caught.value.argument == "batch.pos[0]"


def test_computed_at_once(bert: Model) -> None:
    with (
        Context(bert, n_ubatch=4, n_seq_max=2, embeddings=True) as context,
        pytest.raises(ArgumentError, match="n_ubatch=4"),
    ):
        context.encode(batch_of(PROMPT))


def test_a_decoder_with_a_table_of_positions(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "gpt2.gguf")
    with Model(tmp_path / "gpt2.gguf") as model, Context(model, n_threads=1, n_ctx=256) as context:
        assert not context.memory.can_shift  # the position is in the token's embedding
        context.decode(batch_of([5] * N_POSITIONS))
        with pytest.raises(ArgumentError):
            context.decode(batch_of([5], pos=N_POSITIONS))
        assert context.memory.pos_max(0) == N_POSITIONS - 1
