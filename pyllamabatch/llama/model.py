"""Model: a GGUF file, loaded."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pyllamabatch.errors import ArgumentError, ClosedError, ModelLoadError
from pyllamabatch.llama import runtime
from pyllamabatch.llama.handle import Handle, Owner
from pyllamabatch.llama.host import PathLike, gguf_file
from pyllamabatch.llama.params import (
    KvOverride,
    Progress,
    device_list,
    fill,
    metadata,
    override_array,
    progress_callback,
    share_array,
    string,
)
from pyllamabatch.llama.vocab import Vocab
from pyllamabatch.raw import ffi, lib

_RESERVED = frozenset(
    {"devices", "tensor_split", "kv_overrides", "progress_callback", "progress_callback_user_data"}
)


class Model(Owner):
    """Weights and vocabulary, shared by any number of contexts and threads.

    Closing a model that still has contexts is fine: nothing new can be made of it, and its memory
    is freed when the last of its contexts is closed.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        splits: Sequence[PathLike] | None = None,
        devices: Sequence[str] | None = None,
        n_gpu_layers: int = -1,
        load_mode: str | int = "auto",
        tensor_split: Sequence[float] | None = None,
        kv_overrides: Mapping[str, KvOverride] | None = None,
        progress: Progress | None = None,
        vocab_only: bool = False,
        no_alloc: bool = False,
        **params: object,
    ) -> None:
        """Load a GGUF file.

        splits: the files of a split model, in order, when their names do not follow llama.cpp's
            pattern (`path` is then only a name); otherwise give the first one as `path`.
        devices: names as in `pyllamabatch info`; [] is CPU only, None is all.
        n_gpu_layers: layers on the devices, -1 for all.
        load_mode: "auto", "mmap", "mlock", "mmap_mlock", "direct_io" or "none".
        tensor_split: the share of each device.
        kv_overrides: metadata to replace, by key.
        progress: called with 0.0 to 1.0 while loading; returning False cancels
            (`ModelLoadCancelled`). An exception in it cancels and is raised.
        vocab_only, no_alloc: only the vocabulary; only the shapes. No context can decode then.
        params: any other field of `llama_model_params` under its own name (`split_mode`,
            `main_gpu`, `check_tensors`, `use_extra_bufts`, `no_host`, `lazy_mode`, ...).

        Raises `ModelLoadError`, `ModelLoadCancelled` or `ArgumentError`.
        """
        runtime.ensure()
        if no_alloc:  # libllama asserts that nothing is mapped
            if load_mode not in ("auto", "none"):
                raise ArgumentError("load_mode", load_mode, "no_alloc reads nothing: leave it out")
            load_mode = "none"
        files = [gguf_file(p) for p in (splits or [path])]
        native = lib.llama_model_default_params()
        keep: list[object] = []  # what the struct points to, until the model is loaded
        fill(
            native,
            dict(params, n_gpu_layers=n_gpu_layers, load_mode=load_mode,
                 vocab_only=vocab_only, no_alloc=no_alloc),
            _RESERVED,
        )  # fmt: skip
        if devices is not None:
            keep.append(array := device_list(devices))
            native.devices = array
        if tensor_split is not None:
            keep.append(array := share_array(tensor_split))
            native.tensor_split = array
        if kv_overrides:
            keep.append(array := override_array(kv_overrides))
            native.kv_overrides = array

        self.path = os.fspath(path)
        # What to load it with again, without its weights (device/residency.py).
        again: dict[str, Any] = {"splits": splits, "devices": devices, "n_gpu_layers": n_gpu_layers}
        again |= {"tensor_split": tensor_split, "kv_overrides": kv_overrides}
        self._load: dict[str, Any] = {**params, **again}
        self._no_alloc = no_alloc
        self._vocab_only = vocab_only
        with progress_callback(progress) as (callback, user_data, failure):
            native.progress_callback = callback
            native.progress_callback_user_data = user_data
            names = [ffi.new("char[]", file) for file in files]
            paths = ffi.new("const char *[]", names)
            ptr, log = runtime.logged(lib.plb_model_load, paths, len(names), native)
        if ptr == ffi.NULL:
            if failure:
                raise failure[0]
            raise ModelLoadError(self.path, "llama.cpp rejects it", log)
        self._handle = Handle(ptr, lib.llama_model_free)
        self._close = weakref.finalize(self, self._handle.release)
        self.vocab = Vocab(self)

    @classmethod
    def default(cls, **params: Any) -> Model:
        """The small model that comes with the package."""
        from pyllamabatch.models import default_model_path

        return cls(default_model_path(), **params)

    @property
    def ptr(self) -> Any:
        """`struct llama_model *`; `ClosedError` when closed."""
        if not self._close.alive:
            raise ClosedError(f"the model {self.path} is closed")
        return self._handle.ptr

    @property
    def _native(self) -> Any:
        """The pointer for the facts below, which a context that outlives the model still needs."""
        if self._handle.ptr is None:
            raise ClosedError(f"the model {self.path} is closed")
        return self._handle.ptr

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def close(self) -> None:
        """Let go of the model. Contexts that use it go on; closing twice is fine."""
        self._close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.description
        return f"<Model {Path(self.path).name}: {state}>"

    # -- what it is --

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The scalar metadata of the GGUF file, as text."""
        return metadata(
            self._native,
            lib.llama_model_meta_count,
            lib.llama_model_meta_key_by_index,
            lib.llama_model_meta_val_str_by_index,
        )

    @cached_property
    def architecture(self) -> str:
        return self.metadata.get("general.architecture", "")

    @cached_property
    def description(self) -> str:
        """Architecture, size and file type in one line."""
        return string(lambda buffer, size: lib.llama_model_desc(self._native, buffer, size))

    @cached_property
    def n_params(self) -> int:
        return int(lib.llama_model_n_params(self._native))

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(lib.llama_model_size(self._native))

    @cached_property
    def n_ctx_train(self) -> int:
        return int(lib.llama_model_n_ctx_train(self._native))

    @cached_property
    def n_embd(self) -> int:
        return int(lib.llama_model_n_embd(self._native))

    @cached_property
    def n_embd_out(self) -> int:
        """Width of an output embedding."""
        return int(lib.llama_model_n_embd_out(self._native))

    @cached_property
    def n_cls_out(self) -> int:
        """Outputs of a classifier or reranker; meaningless for other models."""
        return int(lib.llama_model_n_cls_out(self._native))

    @cached_property
    def n_layer(self) -> int:
        return int(lib.llama_model_n_layer(self._native))

    @cached_property
    def n_head(self) -> int:
        return int(lib.llama_model_n_head(self._native))

    @cached_property
    def n_head_kv(self) -> int:
        return int(lib.llama_model_n_head_kv(self._native))

    @cached_property
    def head_dims(self) -> tuple[int, int]:
        """Width of one attention head's key and value."""
        width = self.n_embd // self.n_head if self.n_head else 0
        key = f"{self.architecture}.attention.key_length"
        value = f"{self.architecture}.attention.value_length"
        return int(self.metadata.get(key, width)), int(self.metadata.get(value, width))

    @property
    def n_vocab(self) -> int:
        return self.vocab.n_tokens

    @cached_property
    def n_swa(self) -> int:
        """Tokens in the sliding window; 0 when there is none."""
        return int(lib.llama_model_n_swa(self._native))

    @cached_property
    def has_encoder(self) -> bool:
        return bool(lib.llama_model_has_encoder(self._native))

    @cached_property
    def has_decoder(self) -> bool:
        return bool(lib.llama_model_has_decoder(self._native))

    @cached_property
    def decoder_start_token(self) -> int | None:
        """The token that starts a decoder's output; None for decoder-only models."""
        token = int(lib.llama_model_decoder_start_token(self._native))
        return token if token >= 0 else None

    @cached_property
    def is_recurrent(self) -> bool:
        return bool(lib.llama_model_is_recurrent(self._native))

    @cached_property
    def is_hybrid(self) -> bool:
        return bool(lib.llama_model_is_hybrid(self._native))

    @cached_property
    def is_causal(self) -> bool:
        """False for models whose tokens see the tokens after them (embedding models)."""
        return self.metadata.get(f"{self.architecture}.attention.causal", "true") != "false"

    @cached_property
    def rope_type(self) -> int:
        """`enum llama_rope_type`: -1 none, 0 norm, 2 neox, 8 M-RoPE, ..."""
        return int(lib.llama_model_rope_type(self._native))

    @cached_property
    def has_position_table(self) -> bool:
        """Positions are looked up in a table of n_ctx_train rows, and added to the tokens."""
        if self.architecture == "mpt":  # with ALiBi it has none
            return float(self.metadata.get("mpt.attention.max_alibi_bias", 0)) == 0
        return self.architecture in ("bert", "gpt2", "starcoder")

    def chat_template(self, name: str | None = None) -> str | None:
        """The model's chat template (or the one of that name), None when it has none."""
        key = ffi.NULL if name is None else name.encode()
        found = lib.llama_model_chat_template(self._native, key)
        return None if found == ffi.NULL else runtime.text(found)
