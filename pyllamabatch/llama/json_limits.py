"""Limits of the JSON that llama.cpp gets: its converters recurse as deep as it is nested."""

import json
import re
from collections.abc import Mapping
from typing import Any

from pyllamabatch.errors import ArgumentError

DEPTH_MAX = 64
PROPERTIES_MAX = 500  # the converter of schemas recurses once per optional property
NAME_MAX = 512  # it matches names by std::regex, which recurses once per character
REF_MAX = 2048  # and references too
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', re.DOTALL)


def json_text(argument: str, value: object) -> str:
    """`value` as JSON. Raises `ArgumentError` for what JSON or UTF-8 can't hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(argument, value, f"must be JSON: {error}") from None
    return text


def check_nesting(argument: str, root: Any) -> None:
    """Raises `ArgumentError` for more than `DEPTH_MAX` levels."""
    for _, depth in _walk(root):
        if depth > DEPTH_MAX:
            raise ArgumentError(argument, f"{depth} levels", f"at most {DEPTH_MAX}")


def check_nesting_of_text(argument: str, text: str) -> None:
    """`check_nesting` of a JSON text, by its brackets: whether it is JSON is not asked."""
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        bracket = text[found.start()]
        depth += (bracket in "[{") - (bracket in "]}")
        if depth > DEPTH_MAX:
            raise ArgumentError(argument, f"more than {DEPTH_MAX} levels", f"at most {DEPTH_MAX}")


def check_length(argument: str, text: str, limit: int, what: str) -> None:
    """Raises `ArgumentError` for a text of more than `limit` characters."""
    if len(text) > limit:
        given = f"{text[:32]}… ({len(text)} characters)"
        raise ArgumentError(argument, given, f"at most {limit} characters in {what}")


def check_schema(argument: str, root: Any) -> None:
    """Raises `ArgumentError` for a schema of more than `DEPTH_MAX` levels, `PROPERTIES_MAX`
    properties of one object, `NAME_MAX` characters of a name or `REF_MAX` of a reference, and for
    references that only lead back to themselves."""
    for value, depth in _walk(root):
        if depth > DEPTH_MAX:
            raise ArgumentError(argument, f"{depth} levels", f"at most {DEPTH_MAX}")
        if isinstance(value, Mapping):
            if len(value) > PROPERTIES_MAX:
                limit = f"at most {PROPERTIES_MAX} in one object"
                raise ArgumentError(argument, f"{len(value)} properties", limit)
            for name in value:
                check_length(argument, str(name), NAME_MAX, "a name")
            if isinstance(ref := value.get("$ref"), str):
                check_length(argument, ref, REF_MAX, "a $ref")
            _check_reference(argument, root, value)


def _walk(root: Any) -> Any:
    todo: list[tuple[Any, int]] = [(root, 1)]
    while todo:
        value, depth = todo.pop()
        yield value, depth
        if isinstance(value, Mapping):
            todo += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, (list, tuple)):
            todo += [(child, depth + 1) for child in value]


def _check_reference(argument: str, root: Any, node: Any) -> None:
    seen: set[str] = set()
    while isinstance(node, Mapping) and isinstance(ref := node.get("$ref"), str):
        if ref in seen:
            raise ArgumentError(argument, ref, "a $ref must not lead back to itself")
        seen.add(ref)
        node = target(root, ref)


def target(root: Any, ref: str) -> Any:
    """What a reference points to, read as the converter reads it; None for nothing."""
    node = root
    for name in ref.split("/")[1:]:
        if isinstance(node, Mapping):
            node = node.get(name)
        elif isinstance(node, (list, tuple)) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return None
    return node
