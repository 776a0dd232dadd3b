"""pyllamabatch: own the batch.

Names are imported when they are first used, so `import pyllamabatch` is cheap and does not load
llama.cpp."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyllamabatch.engine.embedder import Embedder as Embedder
    from pyllamabatch.engine.engine import Engine as Engine
    from pyllamabatch.engine.results import Result as Result
    from pyllamabatch.engine.results import Token as Token
    from pyllamabatch.engine.sequence import Sampled as Sampled
    from pyllamabatch.engine.sequence import Sequence as Sequence
    from pyllamabatch.engine.stream import Stream as Stream
    from pyllamabatch.errors import PyllamabatchError as PyllamabatchError
    from pyllamabatch.llama.batch import Batch as Batch
    from pyllamabatch.llama.context import Context as Context
    from pyllamabatch.llama.lora import LoraAdapter as LoraAdapter
    from pyllamabatch.llama.memory import Capabilities as Capabilities
    from pyllamabatch.llama.memory import Memory as Memory
    from pyllamabatch.llama.model import Model as Model
    from pyllamabatch.llama.runtime import keep_wired as keep_wired
    from pyllamabatch.llama.vocab import PieceDecoder as PieceDecoder
    from pyllamabatch.llama.vocab import Vocab as Vocab
    from pyllamabatch.step.sampling_params import SamplingParams as SamplingParams

_HOME = {
    "Batch": "llama.batch",
    "Capabilities": "llama.memory",
    "Context": "llama.context",
    "Embedder": "engine.embedder",
    "Engine": "engine.engine",
    "LoraAdapter": "llama.lora",
    "Memory": "llama.memory",
    "Model": "llama.model",
    "PieceDecoder": "llama.vocab",
    "PyllamabatchError": "errors",
    "Result": "engine.results",
    "Sampled": "engine.sequence",
    "SamplingParams": "step.sampling_params",
    "Sequence": "engine.sequence",
    "Stream": "engine.stream",
    "Token": "engine.results",
    "Vocab": "llama.vocab",
    "keep_wired": "llama.runtime",
}

__all__ = [*_HOME, "__version__"]


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
