"""Batch: its arrays are the memory that libllama reads."""

import gc

import numpy as np
import pytest

from pyllamabatch import Batch
from pyllamabatch.errors import ArgumentError, BatchFull
from pyllamabatch.raw import ffi


def test_arrays_are_the_struct() -> None:
    batch = Batch(4, n_seq_max=3)
    arrays = (batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits)
    assert [a.dtype for a in arrays] == [np.int32] * 4 + [np.int8]
    assert len(batch) == 0
    batch.token[:] = [1, 2, 3, 4]
    batch.pos[:] = [5, 6, 7, 8]
    batch.n_seq_id[:] = [1, 2, 3, 1]
    batch.seq_id[:] = np.arange(12).reshape(4, 3)
    batch.logits[:] = [0, 1, 0, 1]
    batch.n_tokens = 4
    struct = batch.struct
    assert struct.n_tokens == 4
    assert struct.embd == ffi.NULL
    assert [struct.token[i] for i in range(4)] == [1, 2, 3, 4]
    assert [struct.pos[i] for i in range(4)] == [5, 6, 7, 8]
    assert [[struct.seq_id[i][j] for j in range(3)] for i in range(4)] == batch.seq_id.tolist()
    assert [struct.n_seq_id[i] for i in range(4)] == [1, 2, 3, 1]
    assert [struct.logits[i] for i in range(4)] == [0, 1, 0, 1]
    struct.token[2] = 99
    assert batch.token[2] == 99


def test_views_stay_valid() -> None:
    batch = Batch(2)
    before = [batch.token.ctypes.data, batch.struct.token]
    for _ in range(3):
        batch.clear()
        batch.add(1, 0, 0)
        batch.extend([2], 1, 0)
    gc.collect()
    assert batch.token.ctypes.data == before[0]
    assert batch.struct.token == before[1]


def test_add() -> None:
    batch = Batch(3, n_seq_max=2)
    assert batch.add(11, 4, 1) == 0
    assert batch.add(12, 5, [0, 1], logits=True) == 1
    assert batch.add(np.int32(13), np.int64(6), np.int32(0)) == 2
    assert batch.token.tolist() == [11, 12, 13]
    assert batch.pos.tolist() == [4, 5, 6]
    assert batch.n_seq_id.tolist() == [1, 2, 1]
    assert batch.seq_id[1].tolist() == [0, 1]
    assert batch.logits.tolist() == [0, 1, 0]


def test_extend() -> None:
    batch = Batch(12)
    assert batch.extend([1, 2, 3], 10, 0) == range(3)
    assert batch.extend(np.array([4, 5]), [7, 9], 0, logits=False) == range(3, 5)
    assert batch.extend((6, 7), 0, 0, logits=[True, False]) == range(5, 7)
    assert batch.extend([], 0, 0) == range(7, 7)
    assert batch.pos[:7].tolist() == [10, 11, 12, 7, 9, 0, 1]
    assert batch.logits[:7].tolist() == [0, 0, 1, 0, 0, 1, 0]


def test_rows_are_reset() -> None:
    batch = Batch(1, n_seq_max=2)
    batch.add(1, 1, [0, 1], logits=True)
    batch.clear()
    batch.extend([2], 0, 1, logits=False)
    assert batch.n_seq_id.tolist() == [1]
    assert batch.seq_id[0, 0] == 1
    assert batch.logits.tolist() == [0]


def test_full() -> None:
    batch = Batch(3)
    batch.extend([1, 2], 0, 0)
    with pytest.raises(BatchFull, match="2 of 3"):
        batch.extend([3, 4], 2, 0)
    assert batch.n_tokens == 2
    batch.add(3, 2, 0)
    with pytest.raises(BatchFull):
        batch.add(4, 3, 0)
    batch.clear()
    batch.extend([1, 2, 3], 0, 0)


@pytest.mark.parametrize(
    "use",
    [
        lambda b: b.add(-1, 0, 0), lambda b: b.add(2**31, 0, 0), lambda b: b.add(1, -1, 0),
        lambda b: b.add(1, 2**31 - 1, 0), lambda b: b.add(1, 0, -1), lambda b: b.add(1, 0, 256),
        lambda b: b.add(1, 0, []), lambda b: b.add(1, 0, [0, 1, 2]), lambda b: b.add(1.5, 0, 0),
        lambda b: b.extend([1, -2], 0, 0), lambda b: b.extend([1, 2], -1, 0),
        lambda b: b.extend([1, 2], [0], 0), lambda b: b.extend([1, 2], [0, -1], 0),
        lambda b: b.extend([1, 2], 2**31 - 2, 0), lambda b: b.extend([1, 2], 0, 300),
        lambda b: b.extend([1, 2], 0, 0, [True]), lambda b: b.extend([[1, 2]], 0, 0),
        lambda b: b.extend(["a"], 0, 0), lambda b: b.extend([2**70], 0, 0),
        lambda b: setattr(b, "n_tokens", 9), lambda b: setattr(b, "n_tokens", -1),
    ],
)  # fmt: skip
def test_bad_rows_change_nothing(use) -> None:  # type: ignore[no-untyped-def]
    batch = Batch(8, n_seq_max=2)
    batch.add(7, 7, 1)
    before = [a.copy() for a in (batch.token, batch.pos, batch.n_seq_id, batch.seq_id)]
    with pytest.raises(ArgumentError):
        use(batch)
    assert batch.n_tokens == 1
    for old, new in zip(
        before, (batch.token, batch.pos, batch.n_seq_id, batch.seq_id), strict=True
    ):
        assert (old == new).all()


@pytest.mark.parametrize(("capacity", "n_seq_max"), [(0, 1), (-1, 1), (2**40, 1), (1, 0), (1, 257)])
def test_bad_sizes(capacity: int, n_seq_max: int) -> None:
    with pytest.raises(ArgumentError):
        Batch(capacity, n_seq_max)
