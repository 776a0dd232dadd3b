"""LoRA adapters of an engine: which of them a request names, and which the context has just now.

libllama applies adapters to a whole context, so rows with different ones can't be in one decode.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArgumentError

if TYPE_CHECKING:
    from .context import Context
    from .handle import Handle
    from .lora import LoraAdapter

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
            real = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
            if not real or not math.isfinite(scale):
                raise ArgumentError(f"lora[{name!r}]", scale, "a scale must be a finite number")
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
