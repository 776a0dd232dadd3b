"""What a context takes up, by buffer type."""

from __future__ import annotations

from typing import NamedTuple

from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.llama import runtime
from pyllamabatch.llama.context import Context
from pyllamabatch.raw import ffi, lib


class Part(NamedTuple):
    """Bytes in buffers of one type. model: weights; context: KV cells and states; compute: graphs.
    host: memory that the CPU can use."""

    buffer_type: str
    device: str
    host: bool
    model: int
    context: int
    compute: int


def memory_parts(context: Context) -> list[Part]:
    """The buffers of a context, without that of the logits; of a model loaded with no_alloc, the
    buffers that it would have."""
    with context.exclusive():
        n = lib.plb_memory_breakdown(context.ptr, ffi.NULL, 0)
        parts = ffi.new("plb_memory_part[]", max(n, 1))
        n = lib.plb_memory_breakdown(context.ptr, parts, n)
    if n < 0:
        raise PyllamabatchError("libllama can't say what the context takes up")
    text = runtime.text
    return [
        Part(text(p.buffer_type), text(p.device), bool(p.host), p.model, p.context, p.compute)
        for p in parts[0:n]
    ]
