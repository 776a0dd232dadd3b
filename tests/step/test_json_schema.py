"""JSON schemas: what they become, what is no schema, and what is refused at submit. What answers
keep to, and which keywords are refused: test_schema_answers.py."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, GrammarError, NoCandidate
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.step.json_schema import schema_text, schema_to_gbnf
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Stepper

PERSON = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Model.default() as model, Engine(model, n_seq_max=4, n_ctx=2048, n_threads=1) as engine:
        yield engine


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
    "{", "[1]", 7, {"const": float("nan")}, {"const": {1, 2}}, nested(70),
    {"properties": {f"p{i}": {} for i in range(501)}}, {"description": "x" * 2**18},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"properties": {"_" * 513: {}}}, {"$ref": "#/" + "_" * 2048},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"const": "\ud800"},
]  # fmt: skip


@pytest.mark.parametrize("schema", BAD)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        SamplingParams(json_schema=schema)
    assert caught.value.argument == "json_schema"


@pytest.mark.parametrize(
    "schema",
    [
        {"x-mine": {"not": 1}},
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
    with pytest.raises(NoCandidate, match="in too many ways"):
        one.result(60)
    assert beside.result(60).tokens == alone.tokens


@pytest.mark.parametrize(
    ("schema", "allowed", "not_allowed"),
    [
        ({"type": "integer", "minimum": 100}, ["100", "1000", "999"], ["10", "99", "19"]),
        ({"type": "integer", "minimum": 2005}, ["2005", "3000", "10000"], ["25", "2004", "300"]),
        ({"type": "integer", "maximum": -100}, ["-100", "-2000"], ["-10", "-99", "100"]),
        ({"pattern": r"^v\.?1$"}, ['"v1"', '"v.1"'], ['"1"', '"v..1"']),
        ({"pattern": "^é+$"}, ['"é"', '"éé"'], ['""', '"e"']),
        ({"pattern": "^a+?$"}, ['"a"', '"aa"'], ['""']),
        ({"pattern": "^.$"}, ['"a"', '"é"'], ['"""', '"\\"', '"\n"']),
        ({"pattern": "^[^a]$"}, ['"b"'], ['"a"', '"""', '"\\"', '"\t"']),
        ({"pattern": "^[ -~]$"}, ['" "', '"z"', '"#"', '"]"'], ['"""', '"\\"']),
        ({"pattern": r'^"\\\^[\^"]$'}, [r'"\"\\^^"'], [r'""\^^"', r'"\"\\^""']),
        (
            {"properties": {"*": {"enum": [1]}}, "additionalProperties": {"type": "null"}},
            ['{"*":1}', '{"*":1, "b":null}', '{"b":null, "c":null}'],
            ['{"b":1}', '{"*":null}', '{"*":1, "*":1}'],
        ),
        (
            {"properties": {"a]": {}}, "additionalProperties": {"type": "null"}},
            ['{"b":null}', '{"ab":null}', '{"a]":1}'],
            ['{"\\":null}', '{"\n":null}', '{"a]":null,"a]":null}'],
        ),
    ],
)
def test_what_a_schema_allows(
    embedded_model: Model, schema: Any, allowed: list[str], not_allowed: list[str]
) -> None:
    vocab = embedded_model.vocab
    with Context(embedded_model, n_ctx=256) as context, Stepper(context) as stepper:

        def takes(text: str) -> bool:
            slot = stepper.make_slot(SamplingParams(temperature=0, json_schema=schema))
            tokens = vocab.tokenize(text, add_special=False)
            try:
                stepper.replay(slot, [*tokens, *sorted(vocab.eog_tokens)[:1]], 0, 1)
            except GrammarError:
                return False
            return True

        assert [text for text in allowed if not takes(text)] == []
        assert [text for text in not_allowed if takes(text)] == []
