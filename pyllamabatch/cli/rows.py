"""The JSON lines that `generate` reads: one request each, checked before anything is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: What a line may ask to be answered; exactly one of them.
INPUT_FIELDS = ("prompt", "tokens", "messages")

RowId = str | int


@dataclass(frozen=True)
class Request:
    """One good line. Exactly one of `prompt`, `tokens` and `messages` is not None."""

    line: int  # 1-based, as an editor counts
    id: RowId  # the line's own id, else its line number
    prompt: str | None = None
    tokens: list[int] | None = None
    messages: list[dict[str, str]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # sampling fields of this line
    ignored: tuple[str, ...] = ()  # fields that mean nothing to us


@dataclass(frozen=True)
class BadLine:
    """A line that can't be run, and why."""

    line: int
    id: RowId
    problem: str
    raw: bytes


class LineProblem(ValueError):
    """Why a line can't be run; never leaves this module."""


def read_rows(lines: Iterable[bytes], option_names: frozenset[str]) -> Iterator[Request | BadLine]:
    """The requests of `lines`, lazily and in order; blank lines are skipped but counted.

    `option_names` are the sampling fields that a line may carry. Other fields are kept out
    of the request and listed in `Request.ignored`, so that a line may carry data of its own.
    """
    for number, raw in enumerate(lines, start=1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        raw = raw.strip()
        if not raw:
            continue
        row_id: RowId = number
        try:
            data = _load(raw)
            row_id = _row_id(data, number)
            yield _request(data, number, row_id, option_names)
        except LineProblem as problem:
            yield BadLine(number, row_id, str(problem), raw)


def digest(*parts: object) -> str:
    """16 hex digits that stay the same for the same request in every process and version."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


def _load(raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineProblem(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise LineProblem(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:
        raise LineProblem(f"not usable JSON: {error}") from None
    if not isinstance(data, dict):
        raise LineProblem("not a JSON object")
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise LineProblem("holds half of a surrogate pair, which is no text") from None
    return data


def _row_id(data: dict[str, Any], number: int) -> RowId:
    value = data.get("id")
    if value is None:
        return number
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise LineProblem("id: must be a string or a whole number")
    return value


def _request(
    data: dict[str, Any], number: int, row_id: RowId, option_names: frozenset[str]
) -> Request:
    given = [name for name in INPUT_FIELDS if data.get(name) is not None]
    if not given:
        raise LineProblem("needs one of prompt, tokens, messages")
    if len(given) > 1:
        raise LineProblem(f"has {' and '.join(given)}: give only one of them")
    value = data[given[0]]
    known = {*INPUT_FIELDS, "id"}
    return Request(
        line=number,
        id=row_id,
        prompt=_prompt(value) if given[0] == "prompt" else None,
        tokens=_tokens(value) if given[0] == "tokens" else None,
        messages=_messages(value) if given[0] == "messages" else None,
        options=_options(data, option_names),
        ignored=tuple(name for name in data if name not in known and name not in option_names),
    )


def _prompt(value: object) -> str:
    if not isinstance(value, str):
        raise LineProblem("prompt: must be a string")
    return value


def _tokens(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise LineProblem("tokens: must be a list of whole numbers")
    return value


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise LineProblem("messages: must be a list with at least one message")
    for message in value:
        if not isinstance(message, dict):
            raise LineProblem("messages: each one must be an object with role and content")
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise LineProblem("messages: role and content must be strings")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _options(data: dict[str, Any], option_names: frozenset[str]) -> dict[str, Any]:
    """The line's sampling fields in the types of `SamplingParams`; ranges are checked there.

    A null is a field that is not given.
    """
    options = {
        name: value for name, value in data.items() if name in option_names and value is not None
    }
    if isinstance(options.get("stop"), str):
        options["stop"] = (options["stop"],)
    for name in ("stop", "stop_token_ids"):
        if isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    if isinstance(options.get("logit_bias"), dict):
        try:
            options["logit_bias"] = {int(k): float(v) for k, v in options["logit_bias"].items()}
        except (TypeError, ValueError):
            raise LineProblem("logit_bias: must map token ids to numbers") from None
    return options
