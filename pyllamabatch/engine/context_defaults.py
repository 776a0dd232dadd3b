"""The sizes of an engine's context where none were asked for, and why."""

from typing import NamedTuple

from ..cost.kernels import is_cuda
from ..errors import integer
from ..llama import runtime
from ..llama.model import Model

UBATCH, CUDA_UBATCH = 512, 2048  # rows that are computed at once
GRAPH_BYTES = 256  # of a graph's buffers, for each row and each value of a hidden state, at most
GRAPH_SHARE = 1 / 8  # of the device's free memory, for these


class Chosen(NamedTuple):
    value: int
    why: str


def why_batch(asked: int, rows: int) -> str:
    """Why a step has `rows` rows at most, where it may have had `asked`."""
    if rows < asked:
        return "as many as there are cells"
    return "longer prompts go in pieces, between which others get theirs"


def cuda_gpus(model: Model) -> list[runtime.BackendDevice]:
    """Those that compute layers of `model`."""
    return [d for d in model.devices() if is_cuda(d.backend)] if model.offloaded else []


def ubatch_of(model: Model, given: int | None) -> Chosen:
    """n_ubatch for `model` on this machine; `given`: what was asked for, None: nothing."""
    gpus = cuda_gpus(model)
    free = sum(gpu.free for gpu in gpus)
    return ubatch(given, cuda=bool(gpus), n_embd=model.n_embd, free=free)


def ubatch(given: int | None, *, cuda: bool, n_embd: int = 0, free: float = 0.0) -> Chosen:
    """The same for a device with so many bytes free, whose kernels are CUDA's, or not."""
    if given is not None:
        return Chosen(integer("n_ubatch", given, 0, 2**31 - 1), "as was asked for")
    if not cuda:
        return Chosen(UBATCH, "more rows at once are hardly faster here, and others wait longer")
    rows = CUDA_UBATCH
    while rows > UBATCH and GRAPH_BYTES * rows * n_embd > GRAPH_SHARE * free:
        rows //= 2
    if rows < CUDA_UBATCH:
        return Chosen(rows, f"buffers for {CUDA_UBATCH} rows would take much of the free memory")
    return Chosen(rows, "CUDA computes long prompts faster with many rows at once")
