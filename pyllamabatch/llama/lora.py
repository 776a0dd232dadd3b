"""LoraAdapter: a LoRA for a model."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamabatch.errors import (
    AdapterError,
    ArgumentError,
    ClosedError,
    ModelLoadError,
    UnsupportedOperation,
    number,
)
from pyllamabatch.llama import runtime
from pyllamabatch.llama.handle import Handle, Owner
from pyllamabatch.llama.host import PathLike, gguf_file
from pyllamabatch.llama.params import metadata
from pyllamabatch.raw import ffi, lib

if TYPE_CHECKING:
    from pyllamabatch.llama.context import Context
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
        ptr, log = runtime.logged(lib.plb_lora_load, model.ptr, file)
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


LoraSet = tuple[tuple[str, float], ...]
"""Names with their scales, by name; () is the model as it is."""
LoraNames = list[tuple[str, float]]
"""The same by the names of the files, which other engines know them by."""


class Loras:
    """`adapters`: by the names that requests give them. ArgumentError for one of another model.
    They stay usable when they are closed elsewhere, until `close`."""

    def __init__(self, context: Context, adapters: Mapping[str, LoraAdapter]) -> None:
        for name, adapter in adapters.items():
            if not isinstance(name, str) or not name:
                raise ArgumentError("loras", name, "a name must be text")
            if adapter.model is not context.model:
                raise ArgumentError("loras", name, "was loaded for another model")
            _ = adapter.ptr  # raises when it is closed
        self._context = context
        self._of: dict[str, tuple[Handle, str]] = {
            name: (adapter._handle.retain(), Path(adapter.path).name)
            for name, adapter in adapters.items()
        }
        self.applied: LoraSet = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._of)

    def choose(self, wanted: str | Mapping[str, float] | None) -> LoraSet:
        """What a request asks for: a name, or names with scales (0: as if it were not named).
        ArgumentError for what there is not. From any thread."""
        if wanted is None:
            return ()
        scales = {wanted: 1.0} if isinstance(wanted, str) else wanted
        if not isinstance(scales, Mapping):
            raise ArgumentError("lora", wanted, "must be a name, or names with scales")
        for name, scale in scales.items():
            if name not in self._of:
                known = ", ".join(self._of) or "none: see Engine(loras=...)"
                raise ArgumentError("lora", name, f"the engine's adapters are {known}")
            number(f"lora[{name!r}]", scale)
        return tuple(sorted((name, float(scale)) for name, scale in scales.items() if scale))

    def files(self, lora: LoraSet) -> LoraNames:
        return sorted((self._of[name][1], scale) for name, scale in lora)

    def apply(self, lora: LoraSet) -> None:
        """To the context, from the next decode on. By the thread that computes."""
        if lora != self.applied:
            self._context._set_loras([(*self._of[name], scale) for name, scale in lora])
            self.applied = lora

    def close(self) -> None:
        for handle, _ in self._of.values():
            handle.release()
        self._of = {}
