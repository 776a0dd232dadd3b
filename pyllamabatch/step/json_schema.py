"""JSON schemas as grammars, by llama.cpp's own converter.

    SamplingParams(json_schema={"type": "object", "properties": {"n": {"type": "integer"}}})

The converter honours the keywords in `HONOURED`. Any other that would say something about the text
raises `ArgumentError` with its name: a schema is honoured whole or refused. oneOf is honoured where
types, values or a required property tell its branches apart, allOf of one schema, of open objects
without a property in common, or of enums; `required` where `properties` names them, too."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pyllamabatch.errors import ArgumentError, GrammarError
from pyllamabatch.llama.json_limits import DEPTH_MAX, check_schema, json_text, target

Schema = Mapping[str, Any] | str

SIZE_MAX = 1 << 18
INT64 = 1 << 63
STEPS_MAX = 1 << 16  # branches of oneOf compared in one schema, each as often as it is

HONOURED = frozenset({
    "type", "enum", "const", "$ref", "oneOf", "anyOf", "allOf",
    "properties", "required", "additionalProperties",
    "items", "prefixItems", "minItems", "maxItems",
    "pattern", "minLength", "maxLength", "format",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
})  # fmt: skip
FORMATS = ("date", "time", "date-time", "uuid", *(f"uuid{i}" for i in range(1, 6)))
# What says nothing about the text. So do names that begin with "x-".
_NOTES = frozenset({
    "title", "description", "default", "example", "examples", "deprecated", "readOnly",
    "writeOnly", "discriminator", "$schema", "$id", "$anchor", "$comment", "$defs", "definitions",
})  # fmt: skip
# The converter's dates have a 31st of February.
_DAY = (
    "[1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_LEAP_YEAR = "([1-9][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00)"
_DATE = f"({_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = (
    "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{3})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_DATES = {"date": f"^{_DATE}$", "date-time": f"^{_DATE}T{_TIME}$"}
_INTEGER_ONLY = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# The converter reads the first of these alone, and not the others beside it.
_ALONE = (
    ("$ref", HONOURED - {"$ref", "type"}),
    ("oneOf", HONOURED - {"oneOf", "type"}),
    ("anyOf", HONOURED - {"anyOf", "type"}),
    ("allOf", HONOURED - {"allOf", "type"}),
    ("const", HONOURED - {"const", "type"}),
    ("enum", HONOURED - {"enum", "type"}),
    ("items", {"prefixItems"}),
    ("pattern", {"format", "minLength", "maxLength"}),
    ("format", {"minLength", "maxLength"}),
    ("minimum", {"exclusiveMinimum"}),
    ("maximum", {"exclusiveMaximum"}),
)


def schema_text(schema: Schema, argument: str = "json_schema") -> str:
    """The schema as JSON, checked for what the converter could not stand.

    A mapping, or JSON text. Raises `ArgumentError` for anything else, for a schema of more
    than 2**18 bytes or 64 levels, for an object of more than 500 properties, for names of more than
    512 characters and references of more than 2048, for references that lead back to themselves,
    and for keywords that the converter would leave out in silence."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError) as error:
        raise ArgumentError(argument, schema, f"must be JSON: {error}") from None
    text = json_text(argument, value)
    size = len(text.encode())
    if not isinstance(value, Mapping):
        raise ArgumentError(argument, schema, "must be an object")
    if size > SIZE_MAX:
        raise ArgumentError(argument, f"{size} bytes", f"at most {SIZE_MAX}")
    check_schema(argument, value)
    checked = json.loads(text)
    _unwrap(checked)
    _check_keywords(argument, checked)
    _bound_days(checked)
    return json_text(argument, checked)


@lru_cache(maxsize=64)
def schema_to_gbnf(text: str) -> str:
    """The grammar (GBNF, start rule `root`) of the JSON texts that a schema allows; `text` is the
    schema as `schema_text` gives it. Raises `GrammarError` for one that the converter does not
    understand, or could only keep in part."""
    from pyllamabatch.llama import runtime
    from pyllamabatch.raw import ffi, lib

    out, log = runtime.logged(lib.plb_json_schema_to_gbnf, text.encode())
    if out == ffi.NULL:
        raise GrammarError(f"the JSON schema can't be made a grammar: {log}")
    grammar: bytes = ffi.string(ffi.gc(out, lib.plb_text_free))
    return grammar.decode()


def _schemas(root: Any) -> Iterator[dict[str, Any]]:
    """Every schema in a schema, wherever its references lead; true, false and what the converter
    refuses itself left out."""
    todo = [root]
    seen: set[int] = set()
    while todo:
        schema = todo.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        if isinstance(schema.get("$ref"), str):
            todo.append(target(root, schema["$ref"]))
        for keyword in ("items", "prefixItems", "additionalProperties", "oneOf", "anyOf", "allOf"):
            value = schema.get(keyword)
            todo += value if isinstance(value, list) else [value]
        for keyword in ("properties", "$defs", "definitions"):
            value = schema.get(keyword)
            todo += value.values() if isinstance(value, Mapping) else ()


def _check_keywords(argument: str, root: Any) -> None:
    known = _Known(root)
    for schema in _schemas(root):
        try:
            why = (
                _left_out(schema)
                or _base(schema, root)
                or _overlap(schema, known)
                or _all_of(schema, known)
                or _wider(schema, known)
                or _empty(schema, known)
            )
        except (AttributeError, LookupError, TypeError):
            raise ArgumentError(argument, schema, "must be a JSON schema") from None
        if why is not None:
            keyword, limit = why
            raise ArgumentError(f"{argument}: {keyword}", schema[keyword], limit)


def _base(schema: Mapping[str, Any], root: Any) -> tuple[str, str] | None:
    """$id, where references below it begin at it: the converter's all begin at the root."""
    if schema is root or "$id" not in schema or all("$ref" not in one for one in _schemas(schema)):
        return None
    return "$id", "only in the root, or where there is no $ref below it"


def _overlap(schema: Mapping[str, Any], known: "_Known") -> tuple[str, str] | None:
    """oneOf, where a value may be of two of its branches: the grammar reads it as anyOf."""
    if known.apart(schema.get("oneOf", ())):
        return None
    if known.steps > STEPS_MAX:
        return "oneOf", "fewer branches, or one required property that tells them all apart"
    return (
        "oneOf",
        "branches that no two values share (by type, const, enum or a required property)",
    )


def _all_of(schema: Mapping[str, Any], known: "_Known") -> tuple[str, str] | None:
    """allOf, but of open objects without a property in common, or of enums that share a value: of
    any other part the converter keeps nothing."""
    parts = [known.resolved(part) for part in schema.get("allOf", ())]
    if not parts:
        return None
    keywords = {keyword for part in parts for keyword in part} - _NOTES
    if keywords <= {"type", "properties", "required"}:
        names = [name for part in parts for name in part.get("properties", ())]
        objects = all(one.get("type", "object") == "object" for one in (schema, *parts))
        if objects and len(names) == len({*names}):
            return None
    if keywords <= {"type", "enum"} and "type" not in schema and known.shared(parts):
        return None
    return "allOf", "open objects that share no property, or enums that share a value"


def _wider(schema: Mapping[str, Any], known: "_Known") -> tuple[str, str] | None:
    """What the converter reads in place of the type beside it, where it has values of others."""
    for keyword in ("$ref", "oneOf", "anyOf", "const", "enum") if "type" in schema else ():
        if keyword in ("oneOf", "anyOf"):
            parts = schema.get(keyword, [])
        else:
            parts = [schema] if keyword in schema else []
        for part in map(known.resolved, parts):
            told = isinstance(part, Mapping) and part.keys() & {"type", "const", "enum"}
            if told and not known.types(part) <= _types({"type": schema["type"]}):
                return keyword, f"values of the type beside it only: {schema['type']}"
    return None


def _empty(schema: Mapping[str, Any], known: "_Known") -> tuple[str, str] | None:
    """A keyword that no text keeps which the converter would write."""
    types = known.types(schema)
    names = {*schema.get("properties", ())}
    if "object" in types and not {*schema.get("required", ())} <= names:
        return "required", "names of its own properties only"
    items = schema.get("prefixItems", schema.get("items"))
    for keyword, sign in (("minItems", 1), ("maxItems", -1)) if isinstance(items, list) else ():
        if "array" in types and sign * schema.get(keyword, len(items)) > sign * len(items):
            return keyword, f"a grammar has all {len(items)} items that are named, and no other"
    low = schema.get("minimum", schema.get("exclusiveMinimum", -INT64))
    high = schema.get("maximum", schema.get("exclusiveMaximum", INT64 - 1))
    if not all(type(bound) in (int, float) for bound in (low, high)):
        return None  # the converter refuses it
    low = math.floor(low) + 1 if "exclusiveMinimum" in schema else math.ceil(low)
    high = math.ceil(high) - 1 if "exclusiveMaximum" in schema else math.floor(high)
    if low > high:
        keyword = next(keyword for keyword in _INTEGER_ONLY if keyword in schema)
        return keyword, "bounds that an integer of 64 bits can keep"
    return None


class _Known:
    """What one check knows of a schema's parts, each read once: as many references may lead to one
    as there are bytes for. A part stands under its id, so it must be a part of `root`."""

    def __init__(self, root: Any) -> None:
        self.steps = 0
        self._root = root
        self._types: dict[int, set[str]] = {}
        self._values: dict[int, set[str] | None] = {}
        self._shared: dict[frozenset[int], bool] = {}
        self._apart: dict[frozenset[int], bool] = {}

    def types(self, schema: Mapping[str, Any]) -> set[str]:
        """As `_types`."""
        if id(schema) not in self._types:
            self._types[id(schema)] = _types(schema)
        return self._types[id(schema)]

    def values(self, schema: Mapping[str, Any]) -> set[str] | None:
        """The keys of `_values`."""
        if id(schema) not in self._values:
            values = _values(schema)
            self._values[id(schema)] = None if values is None else {*map(_key, values)}
        return self._values[id(schema)]

    def shared(self, schemas: Sequence[Mapping[str, Any]]) -> bool:
        """A value is of all the schemas, which count theirs up."""
        which = frozenset(map(id, schemas))
        if which not in self._shared:
            values = [self.values(one) or set() for one in schemas]
            self._shared[which] = bool(set.intersection(*values))
        return self._shared[which]

    def resolved(self, schema: Any) -> Any:
        """What a reference to a place in the root leads to; the schema itself where it is none."""
        for _ in range(len(_NOTES)):  # references that lead back are refused elsewhere
            if not (isinstance(schema, Mapping) and str(schema.get("$ref", "")).startswith("#/")):
                return schema
            schema = target(self._root, schema["$ref"])
        return schema

    def apart(self, schemas: Sequence[Any], levels: int = DEPTH_MAX) -> bool:
        """No value is of two of the schemas, as far as that is plain to see."""
        schemas = [one for one in map(self.resolved, schemas) if one is not False]
        if len(schemas) < 2:
            return True
        self.steps += len(schemas)
        which = frozenset(map(id, schemas))
        plain = all(isinstance(one, Mapping) for one in schemas) and len(which) == len(schemas)
        if not plain or levels == 0 or self.steps > STEPS_MAX:
            return False
        if which not in self._apart:
            self._apart[which] = False  # where it leads back to itself
            self._apart[which] = self._told_apart(schemas, levels - 1)
        return self._apart[which]

    def _told_apart(self, schemas: Sequence[Mapping[str, Any]], levels: int) -> bool:
        values = [self.values(one) for one in schemas]
        rest = [one for one, each in zip(schemas, values, strict=True) if each is None]
        objects = [one for one in rest if self.types(one) == {"object"}]
        types = [self.types(one) for one in rest if self.types(one) != {"object"}]
        types.append({"object"} if objects else set())
        types.append(set().union(*(self.types(one) for one in schemas if self.values(one))))
        if not (_disjoint([each or set() for each in values]) and _disjoint(types)):
            return False
        if len(objects) < 2:
            return True
        required = [{*one.get("required", ())} & {*one.get("properties", ())} for one in objects]
        for name in sorted(set.intersection(*required)):
            if self.apart([one["properties"][name] for one in objects], levels):
                return True
        pairs = ([a, b] for i, a in enumerate(objects) for b in objects[:i])
        return len(objects) > 2 and all(self.apart(pair, levels) for pair in pairs)


def _disjoint(sets: Sequence[set[str]]) -> bool:
    return len(set().union(*sets)) == sum(map(len, sets))


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types of its values, "number" for integers, too."""
    values = _values(schema)
    if values is not None:
        return {_type_of(value) for value in values}
    types = schema.get("type", [*_JSON_TYPES, "object"])
    given = {types} if isinstance(types, str) else {*types}
    return {"number" if type == "integer" else type for type in given}


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """All values that it has; None where they are not counted up."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "null": type(None),
    "boolean": bool,
    "number": (int, float),
    "string": str,
    "array": list,
}


def _type_of(value: Any) -> str:
    return next((name for name, kind in _JSON_TYPES.items() if isinstance(value, kind)), "object")


def _key(value: Any) -> str:
    """The same text for values that JSON schema takes for the same: 1 and 1.0, not 1 and true."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_number), sort_keys=True)


def _number(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


def _unwrap(root: Any) -> None:
    """Put the part of an allOf that has one in its place: so generators write notes on a $ref.
    Not where a reference leads through the allOf, or starts from a base that the part has."""
    pointed_at = {id(schema) for schema in _led_through(root)}
    for schema in _schemas(root):
        while isinstance(parts := schema.get("allOf"), list) and len(parts) == 1:
            part, kind = parts[0], schema.get("type")
            if not isinstance(part, dict) or id(schema) in pointed_at:
                break
            if "$id" in part and any("$ref" in one for one in _schemas(part)):
                break
            if schema.keys() & HONOURED - {"allOf", "type"}:
                break
            if kind not in (None, part.get("type", kind)):
                break
            del schema["allOf"]
            schema.update({**part, **schema})


def _led_through(root: Any) -> Iterator[Any]:
    """The schemas of which a reference names a part of their allOf."""
    for schema in _schemas(root):
        names = str(schema.get("$ref")).split("/allOf/")
        for i in range(1, len(names)):
            yield target(root, "/allOf/".join(names[:i]))


def _bound_days(root: Any) -> None:
    """Put patterns in place of the formats of dates."""
    for schema in _schemas(root):
        if schema.get("format") in _DATES:
            schema["pattern"] = _DATES[schema.pop("format")]


def _left_out(schema: Mapping[str, Any]) -> tuple[str, str] | None:
    """A keyword that the converter would leave out, and what can be done; None without one."""
    for keyword in schema:
        if keyword not in HONOURED | _NOTES and not keyword.startswith("x-"):
            return keyword, "a grammar can't keep this keyword: leave it out"
    types = schema.get("type")
    if types != "integer" and not (isinstance(types, list) and "integer" in types):
        types = ["number"]
    for keyword in _INTEGER_ONLY:
        if keyword in schema and "number" in types:
            return keyword, "a grammar keeps bounds of integers only"
    if "format" in schema and schema["format"] not in FORMATS:
        return "format", f"a grammar keeps {', '.join(FORMATS[:4])} only"
    for first, others in _ALONE:
        for keyword in sorted(others & schema.keys()) if first in schema else ():
            return keyword, f"a grammar can't keep it beside {first}"
    return None
