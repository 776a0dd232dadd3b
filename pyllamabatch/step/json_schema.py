"""JSON schemas as grammars, by llama.cpp's own converter.

    SamplingParams(json_schema={"type": "object", "properties": {"n": {"type": "integer"}}})

What the converter knows: types, enum, const, objects (required, additionalProperties), arrays
(items, prefixItems, minItems, maxItems), string lengths, the formats date, time, date-time and
uuid, anchored regular expressions, ranges of integers, oneOf, anyOf, allOf and references inside of
the document. It ignores other keywords, ranges of numbers among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pyllamabatch.errors import ArgumentError, GrammarError

Schema = Mapping[str, Any] | str

# The converter recurses as deep as the schema is nested, and once per optional property.
DEPTH_MAX = 64
SIZE_MAX = 1 << 18
PROPERTIES_MAX = 500


def schema_text(schema: Schema, argument: str = "json_schema") -> str:
    """The schema as JSON, checked for what the converter could not stand.

    A mapping, or JSON text. Raises ArgumentError for anything else, for a schema of more
    than 2**18 bytes or 64 levels, for an object of more than 500 properties, and for references
    that lead back to themselves.
    """
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(argument, schema, f"must be JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ArgumentError(argument, schema, "must be an object")
    if size > SIZE_MAX:
        raise ArgumentError(argument, f"{size} bytes", f"at most {SIZE_MAX}")
    _check(argument, value)
    return text


@lru_cache(maxsize=64)
def schema_to_gbnf(text: str) -> str:
    """The grammar (GBNF, start rule `root`) of the JSON texts that a schema allows; `text` is the
    schema as `schema_text` gives it. Raises GrammarError for one that the converter does not
    understand, or could only keep in part."""
    from pyllamabatch.llama import runtime
    from pyllamabatch.raw import ffi, lib

    out, log = runtime.logged(lib.plb_json_schema_to_gbnf, text.encode())
    if out == ffi.NULL:
        raise GrammarError(f"the JSON schema can't be made a grammar: {log}")
    grammar: bytes = ffi.string(ffi.gc(out, lib.plb_text_free))
    return grammar.decode()


def _check(argument: str, root: Any) -> None:
    todo: list[tuple[Any, int]] = [(root, 1)]
    while todo:
        value, depth = todo.pop()
        if depth > DEPTH_MAX:
            raise ArgumentError(argument, f"{depth} levels", f"at most {DEPTH_MAX}")
        if isinstance(value, Mapping):
            if len(value) > PROPERTIES_MAX:
                limit = f"at most {PROPERTIES_MAX} in one object"
                raise ArgumentError(argument, f"{len(value)} properties", limit)
            _check_reference(argument, root, value)
            todo += [(child, depth + 1) for child in value.values()]
        elif isinstance(value, (list, tuple)):
            todo += [(child, depth + 1) for child in value]


def _check_reference(argument: str, root: Any, node: Any) -> None:
    """References that only lead to references must end somewhere."""
    seen: set[str] = set()
    while isinstance(node, Mapping) and isinstance(ref := node.get("$ref"), str):
        if ref in seen:
            raise ArgumentError(argument, ref, "a $ref must not lead back to itself")
        seen.add(ref)
        node = _target(root, ref)


def _target(root: Any, ref: str) -> Any:
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
