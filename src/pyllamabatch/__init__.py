"""pyllamabatch: own the batch.

Names are imported when they are first used, so `import pyllamabatch` is cheap and does not load
llama.cpp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyllamabatch.adapter import LoraAdapter
    from pyllamabatch.batch import Batch
    from pyllamabatch.context import Context
    from pyllamabatch.engine import Engine
    from pyllamabatch.errors import PyllamabatchError
    from pyllamabatch.memory import Capabilities, Memory
    from pyllamabatch.model import Model
    from pyllamabatch.sampling import SamplingParams
    from pyllamabatch.sequence import Sampled, Sequence
    from pyllamabatch.stream import Result, Stream, Token
    from pyllamabatch.vocab import PieceDecoder, Vocab

_HOME = {
    "Batch": "batch",
    "Capabilities": "memory",
    "Context": "context",
    "Engine": "engine",
    "LoraAdapter": "adapter",
    "Memory": "memory",
    "Model": "model",
    "PieceDecoder": "vocab",
    "PyllamabatchError": "errors",
    "Result": "stream",
    "Sampled": "sequence",
    "SamplingParams": "sampling",
    "Sequence": "sequence",
    "Stream": "stream",
    "Token": "stream",
    "Vocab": "vocab",
}

__all__ = [
    "Batch",
    "Capabilities",
    "Context",
    "Engine",
    "LoraAdapter",
    "Memory",
    "Model",
    "PieceDecoder",
    "PyllamabatchError",
    "Result",
    "Sampled",
    "SamplingParams",
    "Sequence",
    "Stream",
    "Token",
    "Vocab",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("pyllamabatch")
    elif name in _HOME:
        value = getattr(import_module(f"pyllamabatch.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'pyllamabatch' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
