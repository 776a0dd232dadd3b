"""JSON schemas: what they become, what is refused, and that the engine keeps to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, GrammarError, SamplingError
from pyllamabatch.llama.model import Model
from pyllamabatch.step.json_schema import schema_text, schema_to_gbnf
from pyllamabatch.step.sampling_params import SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{2,5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Model.default() as model, Engine(model, n_seq_max=4, n_ctx=2048, n_threads=1) as engine:
        yield engine


def test_every_text_is_what_the_schema_says(engine: Engine) -> None:
    """High temperature: it is the grammar that decides, not the model."""
    params = [
        SamplingParams(json_schema=PERSON, temperature=3.0, seed=seed, max_tokens=200)
        for seed in range(8)
    ]
    results = engine.generate(["A person: "] * 8, params)
    for result in results:
        assert result.finish_reason == "stop"
        value = json.loads(result.text)
        assert set(value) == {"name", "age", "tags"}
        assert value["name"].isalpha()
        assert 2 <= len(value["name"]) <= 5
        assert 0 <= value["age"] <= 120
        assert 1 <= len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"a", "b"}
    assert len({result.text for result in results}) > 1


def test_text_and_mapping_are_the_same() -> None:
    a, b = SamplingParams(json_schema=PERSON), SamplingParams(json_schema=json.dumps(PERSON))
    assert a == b
    assert hash(a) == hash(b)
    assert json.loads(str(a.json_schema)) == PERSON


def test_the_grammar_of_a_schema() -> None:
    grammar = schema_to_gbnf(schema_text({"enum": ["yes", 1, None]}))
    assert 'root ::= ("\\"yes\\"" | "1" | "null")' in grammar


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BAD: list[Any] = [
    "{",
    "[1]",
    7,
    {"const": float("nan")},
    {"const": {1, 2}},
    nested(70),
    {"properties": {f"p{i}": {} for i in range(501)}},
    {"description": "x" * 2**18},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"properties": {"_" * 513: {}}},
    {"$ref": "#/" + "_" * 2048},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"const": "\ud800"},
]


@pytest.mark.parametrize("schema", BAD)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        SamplingParams(json_schema=schema)
    assert caught.value.argument == "json_schema"


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "number", "exclusiveMaximum": 0}, "exclusiveMaximum"),
        ({"minimum": 3}, "minimum"),
        ({"type": ["integer", "number"], "maximum": 3}, "maximum"),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": 1}, "exclusiveMinimum"),
        ({"type": "integer", "multipleOf": 5}, "multipleOf"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "maxProperties": 2}, "maxProperties"),
        ({"not": {"type": "null"}}, "not"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "string", "format": "email"}, "format"),
        ({"type": "string", "pattern": "^a*$", "maxLength": 3}, "maxLength"),
        ({"anyOf": [{"type": "null"}], "required": ["a"]}, "required"),
        ({"properties": {"a": {"not": {}}}}, "not"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"items": [{"not": {}}]}}}, "not"),
    ],
)
def test_what_would_be_left_out_is_refused(schema: Any, keyword: str) -> None:
    with pytest.raises(ArgumentError, match=f"json_schema: {keyword}="):
        SamplingParams(json_schema=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "a", "description": "b", "default": 1, "examples": [1], "x-mine": {"not": 1}},
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 9},
        {"type": ["integer", "null"], "minimum": 0},
        {"type": "string", "format": "date-time"},
        {"properties": {"not": {"type": "null"}, "if": {}}, "required": ["not"]},
        {"const": {"not": 1}},
        {"enum": [{"if": 1}]},
    ],
)
def test_what_says_nothing_about_the_text_is_accepted(schema: Any) -> None:
    params = SamplingParams(json_schema=schema)
    assert schema_to_gbnf(str(params.json_schema))


def test_a_grammar_and_a_schema_are_one_too_many() -> None:
    with pytest.raises(ArgumentError):
        SamplingParams(json_schema={}, grammar='root ::= "a"')


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "thing"}, "unrecognized type"),
        ({"anyOf": []}, "must not be empty"),
        ({"type": "array", "minItems": -3}, "minItems"),
        ({"$ref": "#/$defs/none"}, "cannot resolve"),
        ({"$ref": "https://example.com/schema"}, "only references into the same document"),
        ({"type": "string", "pattern": "^(a$"}, "unbalanced"),
        ({"type": "string", "pattern": "^a(?=b)$"}, "not supported"),
        ({"type": "string", "pattern": "^" + "(" * 5000 + "a" + ")" * 5000 + "$"}, "deep"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "recursi"),
    ],
)
def test_what_the_converter_refuses_is_an_error_at_submit(
    engine: Engine, schema: Any, why: str
) -> None:
    params = SamplingParams(json_schema=schema)
    with pytest.raises(GrammarError, match=why):
        engine.submit("x", params)


def test_nested_as_deep_as_allowed(engine: Engine) -> None:
    result = engine.submit(
        "x", SamplingParams(json_schema=nested(30), temperature=0, max_tokens=100)
    ).result(60)
    assert result.text.startswith("[")


ROW_OF_EMPTY = "^" + "(a|b)*" * 2000 + "$"
REPEATED_REPETITIONS = "^" + "(" * 8 + "a" + "{1,9})" * 8 + "$"


def test_a_grammar_that_begins_in_too_many_ways_is_refused(engine: Engine) -> None:
    grammar = "root ::= " + "(" * 6 + '"a"?' + "){0,9}" * 6
    with pytest.raises(GrammarError, match="in too many ways"):
        engine.submit("x", SamplingParams(grammar=grammar))


@pytest.mark.parametrize("pattern", [ROW_OF_EMPTY, REPEATED_REPETITIONS])
def test_too_many_ways_to_go_on_end_one_answer(engine: Engine, pattern: str) -> None:
    """Not the time of those beside it (`vendor/patches/llama-grammar-work.patch`)."""
    greedy = SamplingParams(temperature=0, max_tokens=5)
    alone = engine.submit("y", greedy).result(60)
    schema = {"type": "string", "pattern": pattern}
    one = engine.submit("x", SamplingParams(json_schema=schema, max_tokens=100))
    beside = engine.submit("y", greedy)
    with pytest.raises(SamplingError, match="in too many ways"):
        one.result(60)
    assert beside.result(60).tokens == alone.tokens
