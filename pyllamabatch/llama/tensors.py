"""The tensors of a model's files, by name."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from pyllamabatch.llama import runtime
from pyllamabatch.llama.model import Model
from pyllamabatch.raw import ffi, lib


def tensors(model: Model) -> Iterator[tuple[str, str, int, int]]:
    """Name, type, bytes and number of values of every tensor."""
    for path in _files(model):
        params = ffi.new("struct gguf_init_params *", {"no_alloc": True, "ctx": ffi.NULL})
        gguf = lib.gguf_init_from_file(os.fsencode(path), params[0])
        if gguf == ffi.NULL:
            continue
        try:
            for i in range(lib.gguf_get_n_tensors(gguf)):
                name, number = lib.gguf_get_tensor_name(gguf, i), lib.gguf_get_tensor_type(gguf, i)
                kind, size = (
                    runtime.text(lib.ggml_type_name(number)),
                    lib.gguf_get_tensor_size(gguf, i),
                )
                n_values = size // lib.ggml_type_size(number) * lib.ggml_blck_size(number)
                yield runtime.text(name), kind.upper(), int(size), int(n_values)
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
