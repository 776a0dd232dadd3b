"""LoRA adapters: one for a model, and those that the requests of an engine name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path

from pyllamabatch.errors import (
    AdapterError,
    ArgumentError,
    ModelLoadError,
    UnsupportedOperation,
    number,
)
from pyllamabatch.llama import runtime
from pyllamabatch.llama.handle import Held, Owner, here, owned
from pyllamabatch.llama.host import PathLike, gguf_file
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.params import metadata
from pyllamabatch.raw import ffi, lib


class LoraAdapter(Owner):
    """A LoRA for one model.

        with LoraAdapter(model, "lora.gguf") as lora:
            context.set_loras([(lora, 0.5)])

    Like a model it may be closed while contexts use it: they keep it until they drop it."""

    def __init__(self, model: Model, path: PathLike) -> None:
        """Load it. Raises `AdapterError` when it is not a LoRA for this model, and
        `UnsupportedOperation` when the model has no weights (vocab_only, no_alloc)."""
        if model._vocab_only or model._no_alloc:
            raise UnsupportedOperation("the model was loaded without its weights")
        try:
            file = gguf_file(path)
        except ModelLoadError as error:
            raise AdapterError(str(error)) from None
        ptr, log = runtime.logged(lib.plb_lora_load, model.ptr, file)
        if ptr == ffi.NULL:
            raise AdapterError(f"can't load the adapter {os.fspath(path)}\n{log}")
        ptr = owned(ptr, model.ptr, free=here(lib.plb_lora_free))
        super().__init__(Held(ptr, f"the adapter {os.fspath(path)}"))
        self.model = model
        self.path = os.fspath(path)

    def share(self) -> LoraAdapter:
        """Another owner of the same adapter, which stays open when this one is closed."""
        other = copy(self)
        Owner.__init__(other, Held(self.ptr, self._held.what))
        return other

    @property
    def file_name(self) -> str:
        """The name of its file, by which saved states know it."""
        return Path(self.path).name

    @cached_property
    def metadata(self) -> dict[str, str]:
        return metadata("adapter", self.ptr)


SetLoras = Callable[[Sequence[tuple[LoraAdapter, float]]], None]
LoraSet = tuple[tuple[str, float], ...]
"""Names with their scales, by name; () is the model as it is."""
LoraNames = list[tuple[str, float]]
"""The same by the names of the files, which other engines know them by."""


class Loras:
    """The adapters of an engine by the names that requests give them.

    libllama applies adapters to a whole context: rows with different ones can't be in one decode.
    The adapters stay usable when they are closed elsewhere, until `close`."""

    def __init__(
        self, model: Model, adapters: Mapping[str, LoraAdapter], set_loras: SetLoras
    ) -> None:
        """set_loras: `Context.set_loras`. Raises `ArgumentError` for an adapter of another model,
        `ClosedError` for one that is closed."""
        for name, adapter in adapters.items():
            if not isinstance(name, str) or not name:
                raise ArgumentError("loras", name, "a name must be text")
            if not isinstance(adapter, LoraAdapter):
                raise ArgumentError(f"loras[{name!r}]", adapter, "must be LoraAdapter(model, path)")
            if adapter.model is not model:
                raise ArgumentError("loras", name, "was loaded for another model")
        self._set_loras = set_loras
        self._of = {name: adapter.share() for name, adapter in adapters.items()}
        self.applied: LoraSet = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._of)

    def choose(self, wanted: str | Mapping[str, float] | None) -> LoraSet:
        """What a request asks for: a name, or names with scales (0: as if it were not named).

        Raises `ArgumentError` for a name that there is not. Any thread may call it."""
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
        return sorted((self._of[name].file_name, scale) for name, scale in lora)

    def apply(self, lora: LoraSet) -> None:
        """Set them in the context, from the next decode on. By the thread that computes."""
        if lora != self.applied:
            self._set_loras([(self._of[name], scale) for name, scale in lora])
            self.applied = lora

    def close(self) -> None:
        for adapter in self._of.values():
            adapter.close()
        self._of = {}
