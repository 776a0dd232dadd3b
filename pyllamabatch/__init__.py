"""pyllamabatch: own the batch.

Names are imported when they are first used, so `import pyllamabatch` is cheap and does not load
llama.cpp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyllamabatch.engine.engine import Engine
    from pyllamabatch.engine.sequence import Sampled, Sequence
    from pyllamabatch.engine.stream import Result, Stream, Token
    from pyllamabatch.errors import PyllamabatchError
    from pyllamabatch.llama.batch import Batch
    from pyllamabatch.llama.context import Context
    from pyllamabatch.llama.lora import LoraAdapter
    from pyllamabatch.llama.memory import Capabilities, Memory
    from pyllamabatch.llama.model import Model
    from pyllamabatch.llama.vocab import PieceDecoder, Vocab
    from pyllamabatch.step.sampling_params import SamplingParams

_HOME = {
    "Batch": "llama.batch",
    "Capabilities": "llama.memory",
    "Context": "llama.context",
    "Engine": "engine.engine",
    "LoraAdapter": "llama.lora",
    "Memory": "llama.memory",
    "Model": "llama.model",
    "PieceDecoder": "llama.vocab",
    "PyllamabatchError": "errors",
    "Result": "engine.stream",
    "Sampled": "engine.sequence",
    "SamplingParams": "step.sampling_params",
    "Sequence": "engine.sequence",
    "Stream": "engine.stream",
    "Token": "engine.stream",
    "Vocab": "llama.vocab",
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
