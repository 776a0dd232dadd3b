"""The JSON lines that `generate` reads: one request each, checked before anything is run."""

from __future__ import annotations

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
ROLES = ("system", "developer", "user", "assistant", "tool")


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

    A field that is not known is a problem, or is left out with `ignore_unknown`.
    """
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
    if not isinstance(data, dict):
        raise _Problem("not a JSON object")
    return {name: value for name, value in data.items() if value is not None}


def _id(data: dict[str, Any], number: int) -> str | int:
    value = data.get("id", number)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _Problem("id: must be a string or a whole number")
    return value


def _check_names(data: dict[str, Any]) -> None:
    unknown = [name for name in data if name not in KNOWN_FIELDS]
    if not unknown:
        return
    words = []
    for name in unknown:
        near = get_close_matches(name, KNOWN_FIELDS, n=1, cutoff=0.5)
        words.append(f"{name!r} ({near[0]}?)" if near else repr(name))
    raise _Problem(f"unknown field {', '.join(words)}; --ignore-unknown leaves such fields out")


def _prompt(data: dict[str, Any]) -> tuple[Any, str]:
    """The prompt and its kind."""
    given = [name for name in PROMPT_FIELDS if name in data]
    if not given:
        raise _Problem("needs one of prompt, tokens, messages")
    if len(given) > 1:
        raise _Problem(f"has {' and '.join(given)}: give only one of them")
    kind, value = given[0], data[given[0]]
    if kind == "prompt" and not isinstance(value, str):
        raise _Problem("prompt: must be a string")
    if kind == "tokens" and not (isinstance(value, list) and all(type(t) is int for t in value)):
        raise _Problem("tokens: must be a list of whole numbers")
    return (_messages(value) if kind == "messages" else value), kind


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _Problem("messages: must be a list with at least one message")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise _Problem("messages: each one must be an object with role and content")
        if message["role"] not in ROLES:
            raise _Problem(f"messages: role {message['role']!r} is not one of {', '.join(ROLES)}")
        messages.append({"role": message["role"], "content": _content(message["content"])})
    return messages


def _content(value: object) -> str:
    """A text, or OpenAI's content parts: [{"type": "text", "text": ...}], joined by newlines."""
    if isinstance(value, list) and value:
        return "\n".join(map(_part, value))
    if not isinstance(value, str):
        raise _Problem("messages: content must be a string or a list of parts")
    return value


def _part(part: object) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise _Problem('messages: each part of a content must be {"type": "text", "text": "..."}')


def _options(data: dict[str, Any]) -> dict[str, Any]:
    """The line's sampling fields. Their types and ranges are for `SamplingParams` to check."""
    options = {name: data[name] for name in SAMPLING_FIELDS if name in data}
    if isinstance(options.get("logit_bias"), dict):  # JSON has no numbers as keys
        try:
            options["logit_bias"] = {int(k): float(v) for k, v in options["logit_bias"].items()}
        except (TypeError, ValueError):
            raise _Problem("logit_bias: must map token ids to numbers") from None
    return options
