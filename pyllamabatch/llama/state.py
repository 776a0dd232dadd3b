"""A sequence's state as bytes: libllama's data behind a header of ours.

libllama checks a blob as it goes, partly by assertion; so a blob reaches it only when the header
says that it is whole, of a model of the same make, and computed with the same parameters. All
numbers little-endian:

    8s magic  I version  16s fingerprint of the model  I tokens  I note  Q bytes
    I CRC-32 of what follows
    int32[tokens], note (JSON in UTF-8), libllama's data

The note holds the parameters of the context that the data depends on, so that one which differs
can be named, and what else the saver wants to have back.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllamabatch.errors import StateError, UnsupportedOperation, integer
from pyllamabatch.llama import runtime
from pyllamabatch.llama.host import write_whole
from pyllamabatch.raw import ffi, lib

if TYPE_CHECKING:
    from pyllamabatch.llama.context import Context
    from pyllamabatch.llama.host import PathLike
    from pyllamabatch.llama.lora import LoraNames
    from pyllamabatch.llama.model import Model
    from pyllamabatch.llama.vocab import TokenArray, Tokens

_HEADER = struct.Struct("<8sI16sIIQI")
_MAGIC = b"PLBSTATE"
_VERSION = 2
# What the cells hold depends on these and libllama does not check them. It does check the types and
# the layout of the cells.
_PARAMETERS = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
    "attention_type",
    "type_k",
    "type_v",
)


def save(
    context: Context,
    seq_id: int,
    tokens: Tokens,
    note: Mapping[str, Any] | None = None,
    loras: LoraNames | None = None,
) -> bytes:
    """`note`: anything JSON; `read_note` gives it back. `loras`: default the context's."""
    seq = integer("seq_id", seq_id, 0, context.n_seq_max - 1)
    ids = context.model.vocab.check_tokens(tokens).astype("<i4").tobytes()
    if not context.capabilities.has_memory:
        raise UnsupportedOperation("the model keeps nothing between batches")
    if context.memory.is_stale(seq):
        raise UnsupportedOperation(
            f"a shift or copy of sequence {seq} is applied by the next decode: save it after that"
        )
    size = int(lib.llama_state_seq_get_size(context.ptr, seq))
    text = json.dumps({**(note or {}), "context": _facts(context, loras)}).encode()
    start = _HEADER.size + len(ids) + len(text)
    data = bytearray(start + size)
    data[_HEADER.size : start] = ids + text
    body = ffi.from_buffer("uint8_t[]", memoryview(data)[start:], require_writable=True)
    written, log = runtime.logged(lib.llama_state_seq_get_data, context.ptr, body, size, seq)
    if not 0 < written <= size:
        raise StateError(f"libllama could not save sequence {seq}\n{log}")
    del body
    del data[start + written :]
    rest = memoryview(data)[_HEADER.size :]
    _HEADER.pack_into(
        data, 0, _MAGIC, _VERSION, _fingerprint(context.model), len(ids) // 4, len(text),
        written, zlib.crc32(rest),
    )  # fmt: skip
    return bytes(data)


def restore(
    context: Context, seq_id: int, data: bytes, loras: LoraNames | None = None
) -> TokenArray:
    """Check the data, put it in place of the sequence and return its tokens."""
    seq = integer("seq_id", seq_id, 0, context.n_seq_max - 1)
    tokens, note, body = _parse(context.model, memoryview(data))
    _check_facts(_facts(context, loras), note)
    if not context.capabilities.has_memory:
        raise UnsupportedOperation("the model keeps nothing between batches")
    context.memory.seq_rm(seq)  # libllama leaves it in place when the saved one is empty
    source = ffi.from_buffer("uint8_t[]", body)
    taken, log = runtime.logged(lib.plb_state_seq_set, context.ptr, source, len(body), seq)
    if taken != len(body):
        context.memory.seq_rm(seq)  # what came before the failure
        raise StateError(f"the state does not fit this context; sequence {seq} is empty now\n{log}")
    context.memory.restored(seq)
    return tokens


def read_note(model: Model, data: bytes) -> tuple[TokenArray, dict[str, Any]]:
    """The tokens and the note of a saved state; StateError for one that is damaged or of another
    model."""
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
    rest = data[_HEADER.size :]
    n_bytes = 4 * n_tokens + n_note + size
    if len(rest) != n_bytes:
        raise StateError(f"{len(rest)} bytes instead of {n_bytes}: truncated?")
    if zlib.crc32(rest) != crc:
        raise StateError("damaged: the checksum is wrong")
    if fingerprint != _fingerprint(model):
        raise StateError("the state was saved with another model")
    tokens = np.frombuffer(rest[: 4 * n_tokens], "<i4").astype(np.int32)
    start = 4 * n_tokens + n_note
    note = json.loads(bytes(rest[4 * n_tokens : start]))
    return tokens, note, rest[start:]


def _facts(context: Context, loras: LoraNames | None) -> dict[str, Any]:
    """What a state of this context depends on, beside its model. A parameter that is 0 or unset
    takes the model's own value, so it is the same number in every context of that model."""
    facts: dict[str, Any] = {name: context.params[name] for name in _PARAMETERS}
    facts["loras"] = sorted(context.lora_names if loras is None else loras)
    return facts


def _check_facts(facts: Mapping[str, Any], note: Mapping[str, Any]) -> None:
    here, saved = json.loads(json.dumps(facts)), note["context"]
    for name, value in here.items():
        if saved.get(name) != value:
            raise StateError(
                f"the state was saved with {name}={saved.get(name)}, this context has {value}"
            )


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
    """Write whole or not at all."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise StateError(f"can't write {os.fspath(path)}: {error.strerror or error}") from error


def read(path: PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StateError(f"can't read {os.fspath(path)}: {error.strerror or error}") from error
