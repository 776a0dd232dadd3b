"""Batch: the rows of one `llama_batch`, seen as NumPy arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import ArgumentError, BatchFull, integer
from pyllamabatch.llama.params import check_range, flat_integers
from pyllamabatch.raw import ffi

Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]

_MAX_ROWS = 2**24
_MAX_POS = 2**31 - 2


class Batch:
    """Room for `capacity` rows, each in up to `n_seq_max` sequences; allocated once.

        batch = Batch(512)
        batch.extend(tokens, 0, seq_id=0)        # logits of the last row
        context.decode(batch)
        batch.clear()

    The arrays are the memory that `llama_decode` reads, for the life of the batch: write to them
    directly and set `n_tokens`, or append rows with `add` and `extend`. `Context.decode` checks
    them. Ids and positions out of their range raise `ArgumentError`.

        token     int32 (capacity,)             token id
        pos       int32 (capacity,)             position in its sequences
        n_seq_id  int32 (capacity,)             how many sequences the row belongs to
        seq_id    int32 (capacity, n_seq_max)   their ids
        logits    int8  (capacity,)             1: the row's logits (or embedding) are wanted
    """

    def __init__(self, capacity: int, n_seq_max: int = 1) -> None:
        self.capacity = integer("capacity", capacity, 1, _MAX_ROWS)
        self.n_seq_max = integer("n_seq_max", n_seq_max, 1, 256)
        self.token: Int32Array = np.zeros(capacity, np.int32)
        self.pos: Int32Array = np.zeros(capacity, np.int32)
        self.n_seq_id: Int32Array = np.ones(capacity, np.int32)
        self.seq_id: Int32Array = np.zeros((capacity, n_seq_max), np.int32)
        self.logits: Int8Array = np.zeros(capacity, np.int8)

        first = self.seq_id.ctypes.data
        stride = self.seq_id.strides[0]
        rows = [ffi.cast("llama_seq_id *", first + i * stride) for i in range(capacity)]
        self._rows = ffi.new("llama_seq_id *[]", rows)
        self._struct = ffi.new("struct llama_batch *")
        self._struct.token = ffi.cast("llama_token *", self.token.ctypes.data)
        self._struct.pos = ffi.cast("llama_pos *", self.pos.ctypes.data)
        self._struct.n_seq_id = ffi.cast("int32_t *", self.n_seq_id.ctypes.data)
        self._struct.seq_id = self._rows
        self._struct.logits = ffi.cast("int8_t *", self.logits.ctypes.data)

    @property
    def n_tokens(self) -> int:
        """Rows in use."""
        n: int = self._struct.n_tokens
        return n

    @n_tokens.setter
    def n_tokens(self, n: int) -> None:
        self._struct.n_tokens = integer("n_tokens", n, 0, self.capacity)

    @property
    def struct(self) -> Any:
        """The `llama_batch` by value, for raw calls; it points into this object, so keep both."""
        return self._struct[0]

    @property
    def ptr(self) -> Any:
        """`struct llama_batch *`, for raw calls."""
        return self._struct

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        return f"<Batch {self.n_tokens}/{self.capacity} rows>"

    def clear(self) -> None:
        """Forget the rows; the arrays keep their values."""
        self._struct.n_tokens = 0

    def add(self, token: int, pos: int, seq_ids: int | Sequence[int], logits: bool = False) -> int:
        """Append one row and return its number. Raises `BatchFull` or `ArgumentError`."""
        row = self._room(1)
        ids = (seq_ids,) if not isinstance(seq_ids, (Sequence, np.ndarray)) else seq_ids
        if not 1 <= len(ids) <= self.n_seq_max:
            raise ArgumentError("seq_ids", seq_ids, f"must be 1 to {self.n_seq_max} sequences")
        # written only when all is known to be good
        checked = [integer("seq_ids", seq, 0, 255) for seq in ids]
        token = integer("token", token, 0, 2**31 - 1)
        self.pos[row] = integer("pos", pos, 0, _MAX_POS)
        self.token[row] = token
        self.n_seq_id[row] = len(checked)
        self.seq_id[row, : len(checked)] = checked
        self.logits[row] = bool(logits)
        self._struct.n_tokens = row + 1
        return row

    def extend(
        self,
        tokens: Sequence[int] | Int32Array,
        pos: int | Sequence[int] | Int32Array,
        seq_id: int,
        logits: bool | Sequence[bool] | npt.NDArray[Any] = True,
    ) -> range:
        """Append rows of one sequence and return their numbers.

        pos: the first row's position (the others follow), or one per row. logits: True for the
        last row, False for none, or one per row. Raises `BatchFull` (nothing added) or
        `ArgumentError`."""
        ids = flat_integers("tokens", tokens)
        n = len(ids)
        start = self._room(n)
        rows = slice(start, start + n)
        if isinstance(pos, (Sequence, np.ndarray)):
            positions = flat_integers("pos", pos)
        else:
            positions = integer("pos", pos, 0, _MAX_POS) + np.arange(n)
        if len(positions) != n:
            raise ArgumentError("pos", pos, f"must be one position or {n}, one per token")
        check_range("pos", positions, 0, _MAX_POS)
        check_range("tokens", ids, 0, 2**31 - 1)
        wanted = np.zeros(n, np.int8)
        if isinstance(logits, (Sequence, np.ndarray)):
            if len(logits) != n:
                raise ArgumentError("logits", logits, f"must be a bool or {n}, one per token")
            wanted[:] = np.asarray(logits, bool)
        elif n:
            wanted[-1] = bool(logits)
        self.seq_id[rows, 0] = integer("seq_id", seq_id, 0, 255)
        self.token[rows] = ids
        self.pos[rows] = positions
        self.n_seq_id[rows] = 1
        self.logits[rows] = wanted
        self._struct.n_tokens = start + n
        return range(start, start + n)

    def _room(self, n: int) -> int:
        start: int = self._struct.n_tokens
        if start + n > self.capacity:
            raise BatchFull(
                f"{n} rows do not fit: {start} of {self.capacity} are in use "
                "(decode and clear, or make a larger batch)"
            )
        return start

    def check(self, n_vocab: int, n_seq_max: int, max_pos: int = _MAX_POS) -> None:
        """Raise `ArgumentError` for the first row that libllama must not see."""
        rows = slice(0, self.n_tokens)
        counts = self.n_seq_id[rows]
        used = np.arange(self.n_seq_max) < counts[:, None]
        check_range("batch.token", self.token[rows], 0, n_vocab - 1)
        check_range("batch.pos", self.pos[rows], 0, max_pos)
        check_range("batch.n_seq_id", counts, 1, self.n_seq_max)
        check_range("batch.seq_id", np.where(used, self.seq_id[rows], 0), 0, n_seq_max - 1)
