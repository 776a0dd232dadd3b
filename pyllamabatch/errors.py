"""What can go wrong, one exception per kind of failure; all of them are `PyllamabatchError`.

The checks of arguments that every room shares are at the end: `integer`, `number`, `flag`,
`choice`, `unknown_keyword`."""

import math
import numbers
import operator
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class PyllamabatchError(Exception):
    """Base of every exception of this package."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by what `__init__` has made: its own arguments are not `args`."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class NotBuilt(PyllamabatchError, ImportError):
    """This checkout has no compiled module yet."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[1]
        super().__init__(f"this checkout is not built: run python3 -m pip install -e . in {root}")


class ArgumentError(PyllamabatchError, ValueError):
    """An argument that libllama would reject, or abort on. Nothing has been done."""

    def __init__(self, argument: str, value: object, limit: str) -> None:
        super().__init__(f"{argument}={_short(value)}: {limit}")
        self.argument, self.value, self.limit = argument, value, limit


class RequestTooLong(ArgumentError):
    """A prompt, or a prompt and its budget, that can never fit the context."""


class ClosedError(PyllamabatchError):
    """The object was closed. Make a new one."""


class EngineClosed(ClosedError):
    """The engine was closed while, or before, the request ran."""


class EngineDraining(PyllamabatchError):
    """The engine is drained, and takes nothing more to compute until `resume`. Nothing was done."""


class ModelLoadError(PyllamabatchError):
    """The file is missing, damaged or of a kind that this build can't load.

    `path` is the file; `log` holds llama.cpp's own last lines, which the message ends with."""

    def __init__(self, path: str, reason: str, log: str = "") -> None:
        super().__init__(f"can't load {path}: {reason}" + (f"\n{log}" if log else ""))
        self.path, self.reason, self.log = path, reason, log


class DownloadError(PyllamabatchError):
    """A model could not be brought: no network, no access, or not the file that was expected."""


class ModelLoadCancelled(PyllamabatchError):
    """The progress callback returned False."""


class ContextCreateError(PyllamabatchError):
    """libllama could not make the context: the message ends with its own last lines."""


class NotEnoughMemory(ContextCreateError):
    """The context could not fit: `needed` is a lower bound, `available` is free now (bytes)."""

    def __init__(self, needed: int, available: int, advice: str) -> None:
        least, free = f"{needed / 2**30:.1f} GiB", f"{available / 2**30:.1f} GiB"
        super().__init__(f"the context needs at least {least}, {free} are available: {advice}")
        self.needed, self.available = needed, available


class CellsUnavailable(ContextCreateError):
    """An engine gave the memory of its cells up and can't have it back now. It goes on: the next
    request may find it."""


class QueueFull(PyllamabatchError):
    """The waiting queue is full: `max_waiting` requests wait. Nothing was submitted."""


class Cancelled(PyllamabatchError):
    """Another thread has cancelled the call, which has not happened."""


class ContextBusy(PyllamabatchError):
    """Another thread is inside this context. A context serves one thread at a time."""


class BatchFull(PyllamabatchError):
    """The rows do not fit the batch. None was added: decode and clear first, or add fewer."""


class DecodeError(PyllamabatchError):
    """`llama_decode` or `llama_encode` returned `code` (not 0)."""

    def __init__(self, code: int, detail: str = "") -> None:
        super().__init__(f"{self.explanation} (code {code})" + (f"\n{detail}" if detail else ""))
        self.code, self.detail = code, detail

    explanation = "decode failed"


class KvCacheFull(DecodeError):
    """No free cells for the batch. The memory is as it was: free a sequence or decode less."""

    explanation = "no KV cells for this batch; the memory is unchanged"


class DecodeAborted(DecodeError):
    """The abort callback stopped it. Whole micro-batches may be in memory: see `Memory.pos_max`."""

    explanation = "decode was aborted; micro-batches already done stay in memory"


class InvalidBatch(DecodeError):
    """libllama rejected the rows. The memory is as it was."""

    explanation = "libllama rejected the batch; the memory is unchanged"


class FatalDecodeError(DecodeError):
    """The backend failed. Whole micro-batches may be in memory: see `Memory.pos_max`."""

    explanation = "the backend failed; micro-batches already done stay in memory"


def decode_error(code: int, detail: str = "") -> DecodeError:
    """The exception for a return code of `llama_decode` that is not 0."""
    kinds = {1: KvCacheFull, 2: DecodeAborted, -1: InvalidBatch}
    kind = kinds.get(code, FatalDecodeError if code < 0 else DecodeError)
    return kind(code, detail)


class UnsupportedOperation(PyllamabatchError):
    """This model, or the memory of this context, can't do it. See `Context.capabilities`."""


class TokenizeError(PyllamabatchError):
    """The text is not valid UTF-8, or the vocabulary can't tokenize it."""


class ChatTemplateError(PyllamabatchError):
    """The model has no chat template, llama.cpp can't read it, or it refuses the messages."""


class ChatParseError(PyllamabatchError):
    """An answer that is not what the model's chat format allows. `text` is what it generated."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(f"{reason or 'the answer can not be parsed'}: {_short(text)}")
        self.text = text


class GrammarError(PyllamabatchError):
    """The grammar does not parse, or leads nowhere."""


class SamplingError(PyllamabatchError):
    """No token could be chosen for a row: the logits are not numbers, a sampler has failed, or it
    is a `NoCandidate`."""


class NoCandidate(SamplingError):
    """What the request asks for leaves no token to choose: its grammar or its biases exclude all of
    them, or the grammar can go on in so many ways that it would take seconds."""


class StateError(PyllamabatchError):
    """A saved state that is damaged, or made by another model or context. Nothing was restored."""


class AdapterError(PyllamabatchError):
    """The LoRA file is missing, damaged or made for another model."""


class PlanError(PyllamabatchError):
    """A policy returned a plan that breaks `rule`. Nothing of it was applied."""

    def __init__(self, rule: str, detail: str = "") -> None:
        super().__init__(f"{rule}: {detail}" if detail else rule)
        self.rule = rule


class ProfileError(PyllamabatchError):
    """A file that is not a device profile, or of a schema that this version does not know."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


# -- checks of arguments --


def integer(name: str, value: object, low: int, high: int) -> int:
    """An integer (NumPy's too) in low..high. Raises `ArgumentError`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        n = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError(name, value, "must be an integer") from None
    if not low <= n <= high:
        raise ArgumentError(name, value, f"must be in {low}..{high}")
    return n


def number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number (NumPy's too) in low..high, as a float. Raises `ArgumentError`."""
    real = isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)
    try:
        x = float(value) if real else math.nan  # type: ignore[arg-type]
    except OverflowError:
        x = math.inf
    if not math.isfinite(x):
        raise ArgumentError(name, value, "must be a finite number")
    if not low <= x <= high:
        limit = f"at least {low:g}" if high == math.inf else f"in {low:g}..{high:g}"
        raise ArgumentError(name, value, f"must be {limit}")
    return x


def flag(name: str, value: object) -> bool:
    """True or False. Raises `ArgumentError`."""
    if not isinstance(value, bool):
        raise ArgumentError(name, value, "must be True or False")
    return value


def choice(name: str, value: object, choices: Collection[str]) -> str:
    """One of some words. Raises `ArgumentError`, which names them."""
    if isinstance(value, str) and value in choices:
        return value
    raise ArgumentError(name, value, f"must be one of {', '.join(choices)}")


def unknown_keyword(name: str, value: object, known: Iterable[str]) -> ArgumentError:
    """The error for a keyword that does not exist: it names the nearest right one."""
    known = sorted(known)
    longer = [one for one in known if len(name) > 2 and one.startswith(name)]
    near = sorted(longer, key=len) or get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    return ArgumentError(name, value, f"no such parameter; {hint}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
