"""What a preempted sequence costs: computing it again, or copying its state to the host and back.

    recompute = rows / rows a second          (prefill, measured over the last steps)
    swap      = 2 * bytes / bytes a second    (out and in, measured over the last copies)

And what share of computing it again a copy of its stream of cells takes, on the device.

Rates are running means in which a new measurement counts for a fifth. Before the first one nothing
is known of the device, and the sequence is computed again."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

Preemption = Literal["auto", "recompute", "swap"]

NEW = 0.2
COPY_RATE = 2e9  # bytes a second until it has been measured: pageable memory over PCIe 3
# Bytes that a device copies in a second, each way: the least of what is sold today.
COPY_RATE_CPU, COPY_RATE_GPU = 5e9, 100e9


class SwapChoice:
    """`mode`: "auto" takes what is cheaper, the others are forced. `bytes_per_token`: of a state.
    `stream_seconds`: for a copy of a stream of cells on the device, however many it holds."""

    def __init__(
        self,
        mode: Preemption = "auto",
        *,
        bytes_per_token: float = 0.0,
        stream_seconds: float = 0.0,
    ) -> None:
        if mode not in ("auto", "recompute", "swap"):
            raise ValueError(f"preemption {mode!r}: auto, recompute or swap")
        self.mode = mode
        self.bytes_per_token = bytes_per_token
        self.stream_seconds = stream_seconds
        self.copy_rate = COPY_RATE
        self.prefill_rate: float | None = None  # rows a second

    @classmethod
    def of_cells(
        cls, mode: Preemption, n_bytes: float, n_cells_seq: int, *, on_gpu: bool
    ) -> SwapChoice:
        """Where a cell has so many bytes, and a stream so many cells."""
        rate = COPY_RATE_GPU if on_gpu else COPY_RATE_CPU
        return cls(mode, bytes_per_token=n_bytes, stream_seconds=n_cells_seq * n_bytes / rate)

    def swaps(self, n_tokens: int) -> bool:
        """Whether a sequence of `n_tokens` computed tokens is swapped rather than recomputed."""
        if self.mode != "auto" or n_tokens == 0 or self.prefill_rate is None:
            return self.mode == "swap" and n_tokens > 0
        return 2 * self.bytes_per_token / self.copy_rate < 1 / self.prefill_rate

    def copy_share(self, n_tokens: int) -> float:
        """What a copy of a stream takes, as a share of computing its `n_tokens`; 0: not known."""
        return self.stream_seconds * (self.prefill_rate or 0.0) / n_tokens

    def computed(self, n_rows: int, seconds: float) -> None:
        """A step computed `n_rows` rows of prompts, nearly nothing else."""
        rate = n_rows / max(seconds, 1e-9)
        old = self.prefill_rate
        self.prefill_rate = rate if old is None else old + NEW * (rate - old)

    def copied(self, n_bytes: int, seconds: float, n_tokens: int) -> None:
        """A state of `n_tokens` was copied one way."""
        self.copy_rate += NEW * (n_bytes / max(seconds, 1e-9) - self.copy_rate)
        if n_tokens:
            self.bytes_per_token = n_bytes / n_tokens


class SwapSpace:
    """Saved states by sequence id: up to `n_bytes` in host memory, what is above that in files of
    `folder` (default: the system's folder for temporary files), which are gone with it."""

    def __init__(self, n_bytes: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.n_bytes = n_bytes
        self.used = 0
        self._folder = folder
        self._states: dict[int, bytes | Path] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, id: int) -> bool:
        return id in self._states

    def put(self, id: int, state: bytes) -> None:
        """OSError when it has to go to a file and can't."""
        self.drop(id)
        if self.used + len(state) <= self.n_bytes:
            self.used += len(state)
            self._states[id] = state
        else:
            self._states[id] = self._write(state)

    def resize(self, n_bytes: int) -> None:
        """So many bytes in host memory from now on: what is above that goes to files, the oldest
        first. OSError when it can't; what is not written yet stays in memory."""
        self.n_bytes = n_bytes
        for id, state in list(self._states.items()):
            if self.used <= n_bytes:
                return
            if isinstance(state, bytes):
                self._states[id] = self._write(state)
                self.used -= len(state)

    def _write(self, state: bytes) -> Path:
        handle, name = tempfile.mkstemp(prefix="pyllamabatch-", suffix=".state", dir=self._folder)
        path = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(state)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def take(self, id: int) -> bytes:
        """The state, which is not here any more. KeyError; OSError when its file is gone."""
        state = self._states[id]
        try:
            return state if isinstance(state, bytes) else state.read_bytes()
        finally:
            self.drop(id)

    def drop(self, id: int) -> None:
        """Fine when there is none."""
        state = self._states.pop(id, b"")
        if isinstance(state, bytes):
            self.used -= len(state)
        else:
            with suppress(OSError):
                state.unlink()

    def clear(self) -> None:
        for id in list(self._states):
            self.drop(id)
