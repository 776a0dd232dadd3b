"""A JSON schema is honoured whole or refused with the keyword named: every keyword of draft
2020-12, by what a model writes under the grammar, checked with `jsonschema`."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema_specifications import REGISTRY

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.errors import ArgumentError, GrammarError
from pyllamabatch.step import json_schema

N_EACH = 26  # answers of a schema
SHORT = {"type": "string", "maxLength": 4}
BOOL = {"type": "boolean"}
CHOICE = {"enum": ["a", "b"]}


def an_object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema if required is None else {**schema, "required": required}


EXPRESSED: dict[str, Any] = {
    "true": {"type": "boolean"},
    "null": {"type": "null"},
    "types": {"type": ["null", "boolean"]},
    "enum": {"enum": ["red", 5, None, True, {"a": [1]}, 'é"\\']},
    "const": {"const": {"k": [1, "two", None]}},
    "const text": {"const": "a\nb"},
    "string length": {"type": "string", "minLength": 2, "maxLength": 5},
    "min length": {"type": "string", "minLength": 3, "maxLength": 3},
    "max length": SHORT,
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}(-[0-9]{1,2})?$"},
    "pattern alternatives": {"type": "string", "pattern": "^(yes|no)$"},
    "date": {"type": "string", "format": "date"},
    "dates": {"type": "array", "items": {"type": "string", "format": "date"}, "maxItems": 3},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "integer bounds": {"type": "integer", "minimum": -3, "maximum": 12},
    "minimum": {"type": "integer", "minimum": 5, "maximum": 99999},
    "negative": {"type": "integer", "minimum": -20, "maximum": -5},
    "exclusive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 4},
    "one number": {"type": "integer", "minimum": 7, "maximum": 7},
    "object": an_object(["ok"], ok=BOOL),
    "optional": an_object(["a"], a=BOOL, b=CHOICE),
    "all optional": an_object(a=BOOL, b=CHOICE, c={"type": "null"}),
    "closed": {**an_object(["a"], a=BOOL), "additionalProperties": False},
    "typed rest": {"type": "object", "additionalProperties": False},
    "person": {
        **an_object(
            ["name", "age", "tags"],
            name={"type": "string", "pattern": "^[a-z]{2,5}$"},
            age={"type": "integer", "minimum": 0, "maximum": 120},
            tags={"type": "array", "items": CHOICE, "minItems": 1, "maxItems": 3},
        ),
        "additionalProperties": False,
    },
    "number or nothing": {"type": ["integer", "null"], "minimum": 0},
    "nested": an_object(["o"], o=an_object(["p"], p=an_object(["q"], q=CHOICE))),
    "items": {"type": "array", "items": BOOL, "maxItems": 4},
    "min items": {"type": "array", "items": CHOICE, "minItems": 2, "maxItems": 3},
    "no items": {"type": "array", "items": BOOL, "maxItems": 0},
    "prefix items": {"type": "array", "prefixItems": [BOOL, CHOICE]},
    "array of objects": {"type": "array", "items": an_object(["a"], a=BOOL), "maxItems": 2},
    "any of": {"anyOf": [BOOL, {"type": "null"}, CHOICE]},
    "one of": {"oneOf": [{"type": "null"}, {"enum": ["x", "y"]}]},
    "one of some values": {"oneOf": [{"const": 1}, {"enum": [2, True]}, {"type": "string"}]},
    "one of many values": {"oneOf": [{"const": i} for i in range(2000)]},
    "one of many kinds": {"oneOf": [an_object(["k"], k={"const": i}) for i in range(101)]},
    "one of kinds of kinds": {
        "oneOf": [an_object(["k", "m"], k={"const": i // 2}, m={"const": i % 2}) for i in range(6)]
    },
    "one of two kinds": {
        "oneOf": [
            {"$ref": "#/$defs/cat"},
            {
                "type": "object",
                "properties": {"kind": {"const": "dog"}, "b": {"type": "boolean"}},
                "required": ["kind", "b"],
                "additionalProperties": False,
            },
        ],
        "$defs": {
            "cat": {
                "type": "object",
                "properties": {"kind": {"const": "cat"}},
                "required": ["kind"],
                "additionalProperties": False,
            }
        },
    },
    "any of objects": {"anyOf": [an_object(["a"], a=BOOL), an_object(["b"], b=CHOICE)]},
    "all of": {"allOf": [an_object(["a"], a=BOOL), an_object(["b"], b=CHOICE)]},
    "all of one": {"allOf": [{"$ref": "#/$defs/v"}], "title": "t", "$defs": {"v": SHORT}},
    "all of one with definitions": {
        "allOf": [{"$ref": "#/$defs/v", "$defs": {"v": BOOL}}],
        "$defs": {"v": SHORT},
    },
    "reference into an all of": an_object(
        ["a", "b"],
        a={"allOf": [an_object(["c"], c=CHOICE)]},
        b={"$ref": "#/properties/a/allOf/0/properties/c"},
    ),
    "all of one beside a reference into another": an_object(
        ["a", "b"],
        a={"allOf": [an_object(["c"], c=CHOICE)], "description": "d"},
        b={"$ref": "#/properties/d/allOf/0"},
        d={"allOf": [an_object(["e"], e=SHORT), an_object(["f"], f=BOOL)]},
    ),
    "all of one with a name": {"allOf": [an_object(["c"], c=CHOICE) | {"$id": "https://e/u"}]},
    "all of enums": {"allOf": [CHOICE, {"enum": ["b", "c"]}]},
    "large minimum": {"type": "integer", "minimum": 1000},
    "negative maximum": {"type": "integer", "exclusiveMaximum": -100},
    "pattern of anything": {"type": "string", "pattern": "^.{1,5}$"},
    "pattern without some": {"type": "string", "pattern": "^[^a-z]{1,5}$"},
    "pattern with quotes": {"type": "string", "pattern": '^"\\\\+[ -~]{2}$'},
    "typed rest beside a name": {
        **an_object(["a"], a=BOOL),
        "additionalProperties": {"type": "null"},
    },
    "pair": {"type": "array", "prefixItems": [BOOL, CHOICE], "minItems": 2, "maxItems": 2},
    "safe integers": {"type": "integer", "minimum": 1 - 2**53, "maximum": 2**53 - 1},
    "reference": {"$ref": "#/$defs/v", "$defs": {"v": CHOICE}},
    "references": {
        **an_object(["l", "r"], l={"$ref": "#/$defs/v"}, r={"$ref": "#/$defs/v"}),
        "$defs": {"v": {"enum": [1, 2]}},
    },
    "recursive": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "anyOf": [
                    {"type": "null"},
                    {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                ]
            }
        },
    },
    "notes": {**BOOL, "title": "t", "description": "d", "default": 1, "examples": [2], "x-y": 3},
    "more notes": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://a.example/b",
        "$anchor": "c",
        "$comment": "d",
        "$defs": {},
        "definitions": {},
        "deprecated": True,
        "readOnly": True,
        "writeOnly": False,
        **BOOL,
    },
}
"""Schemas that a grammar expresses."""

REFUSED: dict[str, tuple[str, Any]] = {
    "number minimum": ("minimum", {"type": "number", "minimum": 0}),
    "number exclusive": ("exclusiveMaximum", {"type": "number", "exclusiveMaximum": 0}),
    "minimum of any type": ("minimum", {"minimum": 3}),
    "maximum of two types": ("maximum", {"type": ["integer", "number"], "maximum": 3}),
    "two bounds": ("exclusiveMinimum", {"type": "integer", "minimum": 1, "exclusiveMinimum": 1}),
    "required beside": ("required", {"anyOf": [{"type": "null"}], "required": ["a"]}),
    "in a property": ("not", {"properties": {"a": {"not": {}}}}),
    "in a definition": ("not", {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"not": {}}}}}),
    "multiple": ("multipleOf", {"type": "integer", "multipleOf": 5}),
    "not": ("not", {"type": "string", "not": {"const": "a"}}),
    "if": ("if", {"type": "object", "if": {}, "then": {}, "else": {}}),
    "contains": ("contains", {"type": "array", "contains": BOOL}),
    "min contains": ("minContains", {"type": "array", "minContains": 2}),
    "max contains": ("maxContains", {"type": "array", "maxContains": 2}),
    "unique": ("uniqueItems", {"type": "array", "items": BOOL, "uniqueItems": True}),
    "min properties": ("minProperties", {"type": "object", "minProperties": 2}),
    "max properties": ("maxProperties", {"type": "object", "maxProperties": 2}),
    "pattern properties": ("patternProperties", {"type": "object", "patternProperties": {}}),
    "property names": ("propertyNames", {"type": "object", "propertyNames": SHORT}),
    "dependent required": ("dependentRequired", {"type": "object", "dependentRequired": {}}),
    "dependent schemas": ("dependentSchemas", {"type": "object", "dependentSchemas": {}}),
    "unevaluated properties": (
        "unevaluatedProperties",
        {"type": "object", "unevaluatedProperties": False},
    ),
    "unevaluated items": ("unevaluatedItems", {"type": "array", "unevaluatedItems": False}),
    "email": ("format", {"type": "string", "format": "email"}),
    "encoding": ("contentEncoding", {"type": "string", "contentEncoding": "base64"}),
    "schema of a text": ("contentSchema", {"type": "string", "contentSchema": {}}),
    "a reference from another base": (
        "\\$id",
        {"items": {"$id": "b", "$ref": "#/$defs/v", "$defs": {"v": BOOL}}, "$defs": {"v": CHOICE}},
    ),
    "a reference from an all of's base": (
        "\\$id",
        {
            "allOf": [{"$id": "b", "$ref": "#/$defs/v", "$defs": {"v": BOOL}}],
            "$defs": {"v": CHOICE},
        },
    ),
    "media type": ("contentMediaType", {"type": "string", "contentMediaType": "text/html"}),
    "dynamic": ("\\$dynamicRef", {"$dynamicRef": "#x"}),
    "beside": ("minLength", {"type": "string", "pattern": "^a$", "minLength": 1}),
    "one of two numbers": ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
    "one of equal values": ("oneOf", {"oneOf": [{"enum": [1, 2]}, {"const": 1.0}]}),
    "one of a type and all": ("oneOf", {"oneOf": [{"type": "null"}, {}]}),
    "one of two objects": (
        "oneOf",
        {"oneOf": [an_object(a={"type": "null"}), an_object(b={"type": "null"})]},
    ),
    "one of too many kinds": (
        "oneOf",
        {
            "oneOf": [
                an_object(["k", "m"], k={"const": i // 2}, m={"const": i % 2}) for i in range(300)
            ]
        },
    ),
    "one of equal numbers": ("oneOf", {"oneOf": [{"const": [1]}, {"enum": [2, [1.0]]}]}),
    "behind a reference": ("minimum", {"$ref": "#/x-a", "x-a": {"type": "number", "minimum": 5}}),
    "all of texts": ("allOf", {"allOf": [SHORT, CHOICE]}),
    "all of closed": (
        "allOf",
        {"allOf": [{**an_object(a=BOOL), "additionalProperties": False}, an_object(b=BOOL)]},
    ),
    "all of one property": ("allOf", {"allOf": [an_object(a=BOOL), an_object(a=CHOICE)]}),
    "all of enums apart": ("allOf", {"allOf": [CHOICE, {"enum": ["c"]}]}),
    "all of beside": ("allOf", {"type": "integer", "allOf": [CHOICE, CHOICE]}),
    "beside an enum": ("minLength", {"enum": ["a", "bbb"], "minLength": 2}),
    "enum of another type": ("enum", {"type": "string", "enum": ["a", None]}),
    "const of another type": ("const", {"type": "integer", "const": "a"}),
    "any of another type": ("anyOf", {"type": "string", "anyOf": [SHORT, {"type": "null"}]}),
    "reference to another type": (
        "\\$ref",
        {"type": "object", "$ref": "#/$defs/v", "$defs": {"v": CHOICE}},
    ),
    "required without a schema": ("required", an_object(["b"], a=BOOL)),
    "required of any object": ("required", {"type": "object", "required": ["a"]}),
    "more than the named items": ("minItems", {"prefixItems": [BOOL], "minItems": 2}),
    "fewer than the named items": ("maxItems", {"prefixItems": [BOOL, BOOL], "maxItems": 1}),
    "no integer": ("minimum", {"type": "integer", "minimum": 5, "maximum": 3}),
    "no small integer": ("minimum", {"type": "integer", "minimum": 2**70}),
    "deep inside": ("multipleOf", an_object(a={"type": "array", "items": {"multipleOf": 2}})),
}
"""Schemas with a keyword that a grammar can't keep, and its name."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Model.default() as model, Engine(model, n_seq_max=16, n_ctx=8192, cost=None) as engine:
        yield engine


def test_answers_are_what_their_schemas_allow(engine: Engine) -> None:
    loose: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1}
    streams = []
    for name, schema in EXPRESSED.items():
        params = SamplingParams(max_tokens=96, json_schema=schema, **loose)
        streams.append((name, engine.submit_n("Answer: ", params, n=N_EACH)))
    wrong: list[tuple[str, str]] = []
    n_whole = 0
    for name, answers in streams:
        validator = Draft202012Validator(
            EXPRESSED[name], format_checker=Draft202012Validator.FORMAT_CHECKER
        )
        texts = [r.text for r in (s.result() for s in answers) if r.finish_reason == "stop"]
        assert texts, name
        n_whole += len(texts)
        wrong += [(name, text) for text in texts if not validator.is_valid(json.loads(text))]
    assert wrong == []
    assert n_whole >= 0.8 * N_EACH * len(EXPRESSED)


def keywords_of_the_draft() -> set[str]:
    """All of 2020-12's vocabularies."""
    meta = "https://json-schema.org/draft/2020-12/meta/"
    texts = [REGISTRY.contents(uri) for uri in REGISTRY if uri.startswith(meta)]
    return {keyword for text in texts for keyword in text["properties"]}


def test_every_keyword_is_honoured_says_nothing_or_is_refused() -> None:
    """What is honoured is what the answers above were checked for."""
    honoured = {keyword for schema in EXPRESSED.values() for keyword in keywords_in(schema)}
    keywords = keywords_of_the_draft()
    assert len(keywords) > 50
    for keyword in sorted(keywords - honoured):
        with pytest.raises(ArgumentError, match=re.escape(f"json_schema: {keyword}=")):
            SamplingParams(json_schema={keyword: {}})


def keywords_in(schema: Any) -> Iterator[str]:
    for value in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(value, (dict, list)):
            yield from keywords_in(value)
    yield from schema if isinstance(schema, dict) else ()


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{i}": {"type": "number", "$ref": "#/$defs/v"} for i in range(400)}},
        {"oneOf": [{"enum": [400 * i + j for j in range(400)]} for i in range(10)] + [SHORT]},
        {"properties": {f"p{i}": {"allOf": [{"$ref": "#/$defs/v"}] * 2} for i in range(50)}},
    ],
)
def test_a_schemas_values_are_read_a_few_times(
    schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many references lead to them, and with however many others they are compared."""
    read: list[Any] = []

    def counted(of_value: Callable[[Any], str]) -> Callable[[Any], str]:
        def reads(value: Any) -> str:
            read.append(value)
            return of_value(value)

        return reads

    for name in ("_type_of", "_key"):
        monkeypatch.setattr(json_schema, name, counted(getattr(json_schema, name)))
    json_schema.schema_text({**schema, "$defs": {"v": {"enum": list(range(4000))}}})
    assert 4000 <= len(read) <= 3 * 8000


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_grammar_can_not_keep_is_refused(name: str) -> None:
    keyword, schema = REFUSED[name]
    Draft202012Validator.check_schema(schema)
    with pytest.raises((ArgumentError, GrammarError), match=keyword):
        SamplingParams(json_schema=schema)
