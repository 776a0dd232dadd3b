"""The JSON lines that `generate` reads: one request each, checked before anything is run."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from pyllamabatch.step.sampling_params import SamplingParams

PROMPT_FIELDS = ("prompt", "tokens", "messages")
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
KNOWN_FIELDS = ("id", *PROMPT_FIELDS, *SAMPLING_FIELDS)


@dataclass(frozen=True)
class InputLine:
    """One line: what it asks, or the problem with it."""

    number: int  # 1-based, as an editor counts
    id: str | int  # the line's own id, else its number
    prompt: Any = None  # of the kind: a text, token ids, or messages
    kind: str = ""  # one of PROMPT_FIELDS
    options: dict[str, Any] = field(default_factory=dict)  # sampling fields of this line
    problem: str = ""  # why the line can't be run, "" if it can
    raw: bytes = b""  # of a line with a problem


class _Problem(ValueError):
    """Why a line can't be run."""


def read_lines(lines: Iterable[bytes], *, ignore_unknown: bool = False) -> Iterator[InputLine]:
    """The requests of `lines`, lazily and in order. Blank lines are skipped, but counted.

    A field that is not known is a problem, or is left out with `ignore_unknown`."""
    for number, raw in enumerate(lines, start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        raw = raw.strip()
        if not raw:
            continue
        line_id: str | int = number
        try:
            data = _object(raw)
            line_id = _id(data, number)
            if not ignore_unknown:
                _check_names(data)
            yield InputLine(number, line_id, *_prompt(data), _options(data))
        except _Problem as problem:
            yield InputLine(number, line_id, problem=str(problem), raw=raw)


def digest(*parts: object) -> str:
    """16 hex digits, the same for the same JSON values in every process and version."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _need(condition: object, problem: str) -> None:
    if not condition:
        raise _Problem(problem)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw.decode("utf-8"))
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise _Problem(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except UnicodeEncodeError:
        raise _Problem("holds half of a surrogate pair, which is no text") from None
    except json.JSONDecodeError as error:
        raise _Problem(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise _Problem(f"not usable JSON: {error}") from None
    _need(isinstance(data, dict), "not a JSON object")
    return {name: value for name, value in data.items() if value is not None}


def _id(data: dict[str, Any], number: int) -> str | int:
    value: str | int = data.get("id", number)
    _need(type(value) in (str, int), "id: must be a string or a whole number")
    return value


def _check_names(data: dict[str, Any]) -> None:
    words = []
    for name in data.keys() - set(KNOWN_FIELDS):
        near = get_close_matches(name, KNOWN_FIELDS, n=1, cutoff=0.5)
        words.append(f"{name!r} ({near[0]}?)" if near else repr(name))
    unknown = ", ".join(sorted(words))
    _need(not words, f"unknown field {unknown}; --ignore-unknown leaves such fields out")


def _prompt(data: dict[str, Any]) -> tuple[Any, str]:
    """The prompt and its kind. Messages are for `ChatTemplate.render` to check."""
    given = [name for name in PROMPT_FIELDS if name in data]
    _need(given, "needs one of prompt, tokens, messages")
    _need(len(given) == 1, f"has {' and '.join(given)}: give only one of them")
    kind, value = given[0], data[given[0]]
    if kind == "prompt":
        _need(isinstance(value, str), "prompt: must be a string")
    elif kind == "tokens":
        whole = isinstance(value, list) and all(type(token) is int for token in value)
        _need(whole, "tokens: must be a list of whole numbers")
    return value, kind


def _options(data: dict[str, Any]) -> dict[str, Any]:
    """The line's sampling fields. Their types and ranges are for `SamplingParams` to check."""
    options = {name: data[name] for name in SAMPLING_FIELDS if name in data}
    if isinstance(options.get("logit_bias"), dict):  # JSON has no numbers as keys
        try:
            options["logit_bias"] = {int(k): float(v) for k, v in options["logit_bias"].items()}
        except (TypeError, ValueError):
            raise _Problem("logit_bias: must map token ids to numbers") from None
    return options
