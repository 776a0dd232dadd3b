"""Model: a GGUF file, loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pyllamabatch.errors import ModelLoadError
from pyllamabatch.llama import runtime
from pyllamabatch.llama.handle import Held, Owner, here, owned
from pyllamabatch.llama.host import PathLike, gguf_file
from pyllamabatch.llama.params import Progress, metadata, model_params, progress_handle, string
from pyllamabatch.llama.vocab import Vocab
from pyllamabatch.raw import ffi, lib

_NOT_AGAIN = ("load_mode", "vocab_only", "no_alloc")


def _devices(native: Any, named: Sequence[str] | None) -> Sequence[str]:
    """Names of those that a model with these parameters may have layers on."""
    names = [d.name for d in runtime.default_devices()] if named is None else named
    if native.split_mode == lib.LLAMA_SPLIT_MODE_NONE:
        return names[native.main_gpu :][:1] if native.main_gpu >= 0 else ()
    return names


class Model(Owner):
    """Weights and vocabulary of a GGUF file, shared by any number of contexts and threads.

        with Model("model.gguf") as model, Context(model, n_ctx=4096) as context:
            tokens = model.vocab.tokenize("Hello")

    Closing a model that still has contexts is fine: nothing new can be made of it, and its memory
    is freed when the last of its contexts is closed. What it says about itself stays readable.

    Sizes are counts (`n_ctx_train` tokens, `n_layer` layers, `n_swa` tokens of the sliding window,
    0 without one), `size_bytes` is the bytes of all tensors. `n_embd_out` is the width of an output
    embedding, `n_cls_out` the scores of a classifier or reranker. `rope_type` is
    `enum llama_rope_type`. `decoder_start_token` is None for decoder-only models."""

    def __init__(
        self,
        path: PathLike,
        *,
        splits: Sequence[PathLike] | None = None,
        n_gpu_layers: int = -1,
        progress: Progress | None = None,
        **params: Any,
    ) -> None:
        """Load a GGUF file.

        - splits: the files of a split model, in order, when their names do not follow llama.cpp's
          pattern (`path` is then only a name). Otherwise give the first one as `path`.
        - n_gpu_layers: layers on the devices, -1 for all.
        - progress: called with 0.0 to 1.0 while loading. Returning False cancels the load. An
          exception in it cancels the load and is raised.
        - params: any other field of `llama_model_params` under its own name, among them
          - devices: names as in `pyllamabatch info`; [] is CPU only, None is all.
          - tensor_split: the share of each device.
          - kv_overrides: metadata to replace, by key.
          - load_mtp: True loads the layers that predict further tokens, where the file has some
            (`Engine(speculate="mtp")`).
          - load_mode: "auto", "mmap", "mlock", "mmap_mlock", "direct_io" or "none".
          - vocab_only, no_alloc: only the vocabulary; only the shapes. No context can decode then.

        Raises `ModelLoadError`, `ModelLoadCancelled` or `ArgumentError`."""
        runtime.ensure()
        files = [ffi.new("char[]", gguf_file(p)) for p in (splits or [path])]
        native, keep = model_params({**params, "n_gpu_layers": n_gpu_layers})
        failure: list[BaseException] = []
        if progress is not None:
            keep.append(handle := progress_handle(progress, failure))
            native.progress_callback = lib.plb_py_progress
            native.progress_callback_user_data = handle

        self.path = os.fspath(path)
        # What to load it with again, without its weights (planner/residency.py).
        again = {name: value for name, value in params.items() if name not in _NOT_AGAIN}
        self._load: dict[str, Any] = again | {"splits": splits, "n_gpu_layers": n_gpu_layers}
        self._load_mode: Any = params.get("load_mode", "auto")
        self._no_alloc: bool = native.no_alloc
        self._vocab_only: bool = native.vocab_only
        self._devices = _devices(native, params.get("devices"))
        names = ffi.new("const char *[]", files)
        ptr, log = runtime.logged(lib.plb_model_load, names, len(files), native)
        if ptr == ffi.NULL:
            if failure:
                raise failure[0]
            raise ModelLoadError(self.path, "llama.cpp rejects it", log)
        super().__init__(Held(owned(ptr, free=here(lib.plb_model_free)), f"the model {self.path}"))
        self.vocab = Vocab(self)

        self.metadata = metadata("model", ptr)
        """The scalar metadata of the GGUF file, as text."""
        self.architecture: str = self.metadata.get("general.architecture", "")
        self.description: str = string(lib.llama_model_desc, ptr)
        """Architecture, size and file type in one line."""
        self.size_bytes: int = lib.llama_model_size(ptr)
        self.n_params: int = lib.llama_model_n_params(ptr)
        self.n_vocab: int = self.vocab.n_tokens
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(ptr)
        self.n_embd: int = lib.llama_model_n_embd(ptr)
        self.n_embd_out: int = lib.llama_model_n_embd_out(ptr)
        self.n_cls_out: int = lib.llama_model_n_cls_out(ptr)
        self.n_layer: int = lib.llama_model_n_layer(ptr)
        # libllama aborts for the heads of a model without layers (vocab_only)
        self.n_head: int = lib.llama_model_n_head(ptr) if self.n_layer else 0
        self.n_head_kv: int = lib.llama_model_n_head_kv(ptr) if self.n_layer else 0
        self.n_swa: int = lib.llama_model_n_swa(ptr)
        self.n_layer_nextn: int = lib.llama_model_n_layer_nextn(ptr)
        """Layers behind those that predict further tokens, loaded or not."""
        every = self.n_layer + self.n_layer_nextn + 1  # the output counts as one
        on_devices = every if n_gpu_layers < 0 else min(n_gpu_layers, every)
        self.offloaded: float = on_devices / every if self._devices else 0.0
        """The share of its layers, 0.0 to 1.0, that devices other than the CPU compute."""
        self.rope_type: int = lib.llama_model_rope_type(ptr)
        self.has_encoder: bool = lib.llama_model_has_encoder(ptr)
        self.has_decoder: bool = lib.llama_model_has_decoder(ptr)
        self.is_recurrent: bool = lib.llama_model_is_recurrent(ptr)
        self.is_hybrid: bool = lib.llama_model_is_hybrid(ptr)
        start: int = lib.llama_model_decoder_start_token(ptr)
        self.decoder_start_token: int | None = start if start >= 0 else None

    @classmethod
    def default(cls, **params: Any) -> Model:
        """The small model that comes with the package."""
        from pyllamabatch.models import default_model_path

        return cls(default_model_path(), **params)

    @classmethod
    def from_hub(
        cls,
        repository: str,
        *,
        token: str | None = None,
        endpoint: str | None = None,
        **params: Any,
    ) -> Model:
        """A model of a Hugging Face hub: "owner/name", or "owner/name:quant". See
        `pyllamabatch.models.hub`. Raises `DownloadError` besides."""
        from pyllamabatch.models.hub import hub_file

        return cls(hub_file(repository, token=token, endpoint=endpoint), **params)

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.description
        return f"<Model {Path(self.path).name}: {state}>"

    def devices(self) -> list[runtime.BackendDevice]:
        """Those that may have layers of it, beside the CPU, with what they have free now."""
        known = runtime.devices()
        return [known[name] for name in self._devices if name in known]

    @cached_property
    def head_dims(self) -> tuple[int, int]:
        """Width of one attention head's key and value."""
        width = self.n_embd // self.n_head if self.n_head else 0
        key = f"{self.architecture}.attention.key_length"
        value = f"{self.architecture}.attention.value_length"
        return int(self.metadata.get(key, width)), int(self.metadata.get(value, width))

    @cached_property
    def is_causal(self) -> bool:
        """False for models whose tokens see the tokens after them (embedding models)."""
        return self.metadata.get(f"{self.architecture}.attention.causal", "true") != "false"

    @cached_property
    def has_position_table(self) -> bool:
        """Positions are looked up in a table of n_ctx_train rows, and added to the tokens."""
        if self.architecture == "mpt":  # with ALiBi it has none
            return float(self.metadata.get("mpt.attention.max_alibi_bias", 0)) == 0
        return self.architecture in ("bert", "gpt2", "starcoder")

    def chat_template(self, name: str | None = None) -> str | None:
        """The model's chat template (or the one of that name), None when it has none."""
        key = ffi.NULL if name is None else name.encode()
        return runtime.text(lib.llama_model_chat_template(self.ptr, key)) or None
