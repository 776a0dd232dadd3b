"""LoraAdapter: a LoRA for a model."""

from __future__ import annotations

import os
import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pyllamabatch.errors import AdapterError, ClosedError, ModelLoadError, UnsupportedOperation
from pyllamabatch.llama import log as _log
from pyllamabatch.llama.handle import Handle, Owner
from pyllamabatch.llama.params import PathLike, gguf_file, metadata
from pyllamabatch.raw import ffi, lib

if TYPE_CHECKING:
    from pyllamabatch.llama.model import Model


class LoraAdapter(Owner):
    """A LoRA for one model: apply it with `Context.set_loras`.

    Like a model it may be closed while contexts use it; they keep it until they drop it.
    """

    def __init__(self, model: Model, path: PathLike) -> None:
        """Load it. Raises `AdapterError` when it is not a LoRA for this model."""
        if model._vocab_only or model._no_alloc:
            raise UnsupportedOperation("the model was loaded without its weights")
        try:
            file = gguf_file(path)
        except ModelLoadError as error:
            raise AdapterError(str(error)) from None
        self.path = os.fspath(path)
        self.model = model
        _log.mark()
        ptr = lib.plb_lora_load(model.ptr, file)
        log = _log.errors()
        if ptr == ffi.NULL:
            raise AdapterError(f"can't load the adapter {self.path}\n{log}")
        self._handle = Handle(ptr, lib.llama_adapter_lora_free, model._handle)
        self._close = weakref.finalize(self, self._handle.release)

    @property
    def ptr(self) -> Any:
        if not self._close.alive:
            raise ClosedError(f"the adapter {self.path} is closed")
        return self._handle.ptr

    @property
    def closed(self) -> bool:
        return not self._close.alive

    @cached_property
    def metadata(self) -> dict[str, str]:
        return metadata(
            self.ptr,
            lib.llama_adapter_meta_count,
            lib.llama_adapter_meta_key_by_index,
            lib.llama_adapter_meta_val_str_by_index,
        )

    def close(self) -> None:
        self._close()
