"""The tensors of a model's files, by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pyllamabatch.llama import runtime
from pyllamabatch.llama.model import Model
from pyllamabatch.raw import ffi, lib


def tensors(model: Model) -> Iterator[tuple[str, str, int]]:
    """Name, type and bytes of every tensor."""
    for path in _files(model):
        params = ffi.new("struct gguf_init_params *", {"no_alloc": True, "ctx": ffi.NULL})
        gguf = lib.gguf_init_from_file(os.fsencode(path), params[0])
        if gguf == ffi.NULL:
            continue
        try:
            for i in range(lib.gguf_get_n_tensors(gguf)):
                kind = runtime.text(lib.ggml_type_name(lib.gguf_get_tensor_type(gguf, i)))
                size = int(lib.gguf_get_tensor_size(gguf, i))
                yield runtime.text(lib.gguf_get_tensor_name(gguf, i)), kind.upper(), size
        finally:
            lib.gguf_free(gguf)


def _files(model: Model) -> list[Path]:
    """The model's file, or all of them where it is split."""
    if model._load["splits"]:
        return [Path(part) for part in model._load["splits"]]
    first = Path(model.path)
    if found := re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", first.name):
        stem, count = found.groups()
        return [first.with_name(f"{stem}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    return [first]
