"""A saved state: libllama's data of a sequence behind a header of ours.

libllama checks a blob as it goes, partly by assertion. So a blob reaches it only when the header
says that it is whole, of a model of the same make, and computed with the same parameters. All
numbers are little-endian:

    8s magic  I version  16s fingerprint of the model  I tokens  I note  Q bytes
    I CRC-32 of what follows
    int32[tokens], note (JSON in UTF-8), libllama's data

The note holds the parameters of the context that the data depends on, so that one which differs
can be named, and what else the saver wants to have back."""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyllamabatch.errors import StateError
from pyllamabatch.llama.host import PathLike, whole_file
from pyllamabatch.llama.lora import LoraNames
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.vocab import TokenArray, Tokens
from pyllamabatch.raw import lib

Facts = Mapping[str, Any]

_HEADER = struct.Struct("<8sI16sIIQI")
_MAGIC = b"PLBSTATE"
_VERSION = 2
# What the cells hold depends on these and libllama does not check them. It does check the types and
# the layout of the cells.
_PARAMETERS = (
    "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor",
    "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx", "attention_type", "type_k", "type_v",
)  # fmt: skip


def pack(
    model: Model, params: Facts, loras: LoraNames, tokens: Tokens, note: Facts | None, data: Any
) -> bytes:
    """A saved state around libllama's `data`. params: those of the context; note: anything JSON."""
    ids = model.vocab.check_tokens(tokens).astype("<i4").tobytes()
    text = json.dumps({**(note or {}), "context": _facts(params, loras)}).encode()
    crc = zlib.crc32(data, zlib.crc32(text, zlib.crc32(ids)))
    header = _HEADER.pack(
        _MAGIC, _VERSION, _fingerprint(model), len(ids) // 4, len(text), len(data), crc
    )
    return b"".join((header, ids, text, data))


def unpack(
    model: Model, params: Facts, loras: LoraNames, data: bytes
) -> tuple[TokenArray, memoryview]:
    """The tokens and libllama's data of a saved state that a context of these parameters may
    restore. Raises `StateError` for any other."""
    tokens, note, body = _parse(model, memoryview(data))
    saved = note["context"]
    for name, value in json.loads(json.dumps(_facts(params, loras))).items():
        if saved.get(name) != value:
            raise StateError(
                f"the state was saved with {name}={saved.get(name)}, this context has {value}"
            )
    return tokens, body


def read_note(model: Model, data: bytes) -> tuple[TokenArray, dict[str, Any]]:
    """The tokens and the note of a saved state. Raises `StateError` for one that is damaged or of
    another model."""
    tokens, note, _ = _parse(model, memoryview(data))
    return tokens, note


def _parse(model: Model, data: memoryview) -> tuple[TokenArray, dict[str, Any], memoryview]:
    if len(data) < _HEADER.size:
        raise StateError(f"{len(data)} bytes are too few for a state")
    magic, version, fingerprint, n_tokens, n_note, size, crc = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise StateError("not a state that this package saved")
    if version != _VERSION:
        raise StateError(f"a state of version {version}; this package reads {_VERSION}")
    content = data[_HEADER.size :]
    n_bytes = 4 * n_tokens + n_note + size
    if len(content) != n_bytes:
        raise StateError(f"{len(content)} bytes instead of {n_bytes}: truncated?")
    if zlib.crc32(content) != crc:
        raise StateError("damaged: the checksum is wrong")
    if fingerprint != _fingerprint(model):
        raise StateError("the state was saved with another model")
    start = 4 * n_tokens + n_note
    try:
        tokens = model.vocab.check_tokens(np.frombuffer(content[: 4 * n_tokens], "<i4"))
        note = json.loads(bytes(content[4 * n_tokens : start]))
        if not isinstance(note["context"], dict):
            raise TypeError("context")
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise StateError(f"damaged: {error!r}") from None
    return tokens, note, content[start:]


def _facts(params: Facts, loras: LoraNames) -> dict[str, Any]:
    """What a state depends on, beside its model. A parameter that is 0 or unset takes the model's
    own value, so it is the same number in every context of that model."""
    return {**{name: params[name] for name in _PARAMETERS}, "loras": sorted(loras)}


def _fingerprint(model: Model) -> bytes:
    """What has to be the same: the model's metadata and shapes, and llama.cpp's format."""
    facts = (
        sorted(model.metadata.items()),
        model.n_params,
        model.size_bytes,
        model.n_vocab,
        int(lib.LLAMA_STATE_SEQ_VERSION),
    )
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def write(path: PathLike, data: bytes) -> None:
    """Write whole or not at all. Raises `StateError`."""
    try:
        with whole_file(path) as part:
            part.write_bytes(data)
    except OSError as error:
        raise StateError(f"can't write {os.fspath(path)}: {error.strerror or error}") from error


def read(path: PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StateError(f"can't read {os.fspath(path)}: {error.strerror or error}") from error
