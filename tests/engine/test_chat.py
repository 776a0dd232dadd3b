"""Chats on an engine: from messages to the answer's message, tools' grammars among them. The
embedded model knows nothing of tools: what it writes is what the grammar leaves it."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.engine.chat import ChatRequest
from pyllamabatch.errors import ArgumentError, ChatTemplateError, GrammarError
from pyllamabatch.llama.chat_message import ChatDelta, ChatMessage
from pyllamabatch.llama.grammar import Grammar
from tests.llama.test_chat import HERMES, TIME, USER, WEATHER

GREEDY = SamplingParams(temperature=0, max_tokens=64)
LONG = SamplingParams(temperature=0.9, seed=9, max_tokens=400)
LETTER = SamplingParams(grammar="root ::= [a-z]")
COPY = {"role": "user", "content": "Copy: hello"}
CHOICE = {
    "type": "function",
    "function": {
        "name": "choose",
        "parameters": {
            "type": "object",
            "properties": {"letter": {"enum": ["a", "b"]}},
            "required": ["letter"],
        },
    },
}
# The answer has begun: this model would not come to a call by itself.
BEGUN = [USER, {"role": "assistant", "content": "<tool_call>\n"}]
REQUIRED: dict[str, Any] = {
    "template": HERMES,
    "tools": [CHOICE],
    "tool_choice": "required",
    "continue_final_message": True,
}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.default() as model:
        yield model


@pytest.fixture(scope="module")
def engine(model: Model) -> Iterator[Engine]:
    # With more threads one is given up on busy cores, and a long row gets other last bits.
    with Engine(model, n_seq_max=4, n_ctx=4096, n_threads=1, cost=None) as engine:
        yield engine


def added_up(deltas: list[ChatDelta]) -> tuple[str, str, dict[int, tuple[str, str]]]:
    calls: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        for more in delta.tool_calls:
            name, arguments = calls.get(more.index, ("", ""))
            calls[more.index] = name + more.name, arguments + more.arguments
    return (
        "".join(delta.content for delta in deltas),
        "".join(delta.reasoning_content for delta in deltas),
        calls,
    )


def test_one_call_from_messages_to_text(engine: Engine, model: Model) -> None:
    answer = engine.chat([COPY], GREEDY)
    prompt = model.vocab.apply_chat_template([COPY])
    (plain,) = engine.generate([prompt], GREEDY)
    assert answer.message == ChatMessage(plain.text)
    assert answer.result.tokens == plain.tokens
    assert answer.finish_reason == "stop"


def test_the_same_streamed_and_for_asyncio(engine: Engine) -> None:
    whole = engine.chat([COPY], GREEDY).message.content
    stream = engine.chat.submit([COPY], GREEDY)
    for _ in range(2):  # as often as one likes
        assert added_up(list(stream))[0] == whole
    assert stream.result().message.content == whole

    async def both() -> tuple[list[ChatDelta], ChatMessage]:
        deltas = [delta async for delta in engine.chat.stream([COPY], GREEDY)]
        return deltas, (await engine.chat.agenerate([COPY], GREEDY)).message

    deltas, message = asyncio.run(both())
    assert added_up(deltas)[0] == message.content == whole


def test_a_required_tool_is_called(engine: Engine) -> None:
    answer = engine.chat(BEGUN, LONG, **REQUIRED)
    assert answer.message.tool_calls
    for call in answer.message.tool_calls:
        assert call.name == "choose"
        assert json.loads(call.arguments)["letter"] in ("a", "b")
        assert call.id
    assert answer.finish_reason == "tool_calls"


def test_a_streamed_tool_call(engine: Engine) -> None:
    stream = engine.chat.submit(BEGUN, LONG, **REQUIRED)
    deltas = list(stream)
    calls = stream.result().message.tool_calls
    assert added_up(deltas)[2] == {i: (c.name, c.arguments) for i, c in enumerate(calls)}
    assert calls

    async def read() -> list[ChatDelta]:
        return [delta async for delta in engine.chat.stream(BEGUN, LONG, **REQUIRED)]

    for name, arguments in added_up(asyncio.run(read()))[2].values():
        assert (name, json.loads(arguments)["letter"] in ("a", "b")) == ("choose", True)


def test_a_lazy_grammar_leaves_other_text_free(engine: Engine, model: Model) -> None:
    """With tools that it need not call, the model's answer is the one without their grammar."""
    answer = engine.chat([COPY], GREEDY, template=HERMES, tools=[WEATHER, TIME])
    prompt = model.vocab.chat_template(HERMES).render([COPY], tools=[WEATHER, TIME])
    assert prompt.grammar is not None
    assert prompt.grammar.lazy
    (plain,) = engine.generate([prompt], GREEDY)
    assert answer.result.tokens == plain.tokens


def lazy(engine: Engine, prompt: str, **start: Any) -> str:
    grammar = Grammar('root ::= "x: " [0-9]+ "."', lazy=True, **start)
    params = SamplingParams(temperature=0, max_tokens=40, grammar=grammar)
    (result,) = engine.generate([prompt], params)
    assert result.error is None
    return result.text


def test_triggers(engine: Engine, model: Model) -> None:
    prompt = model.vocab.apply_chat_template([{"role": "user", "content": "Copy: ab x: cd"}])
    free = lazy(engine, prompt, trigger_patterns=("never",))
    assert "x: c" in free
    for start in (
        {"trigger_patterns": ("x: ",)},
        {"trigger_patterns": (r"^[\s\S]*?(x: )[\s\S]*",)},
        {"trigger_tokens": tuple(model.vocab.tokenize("x", add_special=False).tolist())},
    ):
        text = lazy(engine, prompt, **start)
        before, _, after = text.partition("x: ")
        assert before == free.partition("x: ")[0]
        assert after.rstrip(".").isdigit()


def test_no_trigger_inside_of_thoughts(engine: Engine, model: Model) -> None:
    def tokens(text: str) -> tuple[int, ...]:
        return tuple(model.vocab.tokenize(text, add_special=False).tolist())

    prompt = model.vocab.apply_chat_template([{"role": "user", "content": "Copy: ab x: cd"}])
    free = lazy(engine, prompt, trigger_patterns=("never",))
    opened, closed = tokens("a"), (tokens("~"), tokens("d"))
    start: dict[str, Any] = {"trigger_patterns": ("x: ",), "thinking_start": opened}
    assert lazy(engine, prompt, **start, thinking_ends=closed).startswith("ab x: cd")
    assert lazy(engine, prompt, **start, thinking_ends=(tokens("b"),)) == lazy(
        engine, prompt, trigger_patterns=("x: ",)
    )
    assert free.startswith("ab x: cd")


def test_a_prefill_is_the_grammars_first_part(engine: Engine, model: Model) -> None:
    prefill = tuple(model.vocab.tokenize("x: ", add_special=False).tolist())
    grammar = Grammar('root ::= "x: " [0-9]{3}', prefill=prefill)
    params = SamplingParams(temperature=0, max_tokens=9, grammar=grammar)
    (result,) = engine.generate(["Number x: "], params)
    assert result.text.isdigit()
    assert len(result.text) == 3


def test_an_answer_that_goes_on_behind_its_end(engine: Engine, model: Model) -> None:
    """The prefill ends the generation where the grammar wants more."""
    assert model.vocab.eos is not None
    grammar = Grammar('root ::= "x: " [0-9]{3}', prefill=(model.vocab.eos,))
    with pytest.raises(ArgumentError, match=f"ends it, {model.vocab.eos}"):
        engine.generate(["x"], SamplingParams(max_tokens=9, grammar=grammar))


def test_preserved_tokens_are_text(engine: Engine, model: Model) -> None:
    end = model.vocab.tokenize("<|im_start|>", add_special=False, parse_special=True).tolist()
    params = SamplingParams(temperature=0, max_tokens=2, logit_bias={end[0]: 100.0})
    (hidden,) = engine.generate(["a"], params)
    (shown,) = engine.generate(["a"], replace(params, preserved_tokens=end[:1]))
    assert hidden.tokens == shown.tokens == end[:1] * 2
    assert (hidden.text, shown.text) == ("", "<|im_start|>" * 2)


def test_an_answer_that_is_cut_off(engine: Engine) -> None:
    answer = engine.chat(BEGUN, SamplingParams(max_tokens=12, temperature=0), **REQUIRED)
    assert answer.finish_reason == "length"
    assert len(answer.result.tokens) == 12


def test_a_schema_is_the_contents(engine: Engine) -> None:
    """Of this model some answers begin with thoughts that do not come to an end."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    drawn = [SamplingParams(max_tokens=200, seed=seed) for seed in range(4)]
    streams = [
        engine.chat.submit([USER], params, json_schema=schema, template=HERMES) for params in drawn
    ]
    streams += [engine.chat.submit([USER], replace(params, json_schema=schema)) for params in drawn]
    answers = [stream.result() for stream in streams]
    for half in (answers[:4], answers[4:]):
        whole = [answer.message.content for answer in half if answer.finish_reason == "stop"]
        assert whole
        assert all(json.loads(content)["n"] in (1, 2) for content in whole)


def test_without_thoughts_the_schema_is_the_whole_answers(engine: Engine, model: Model) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    params = replace(GREEDY, json_schema=schema)
    alone = engine.submit(model.vocab.apply_chat_template([USER]), params).result()
    for given in ({"params": params}, {"params": GREEDY, "json_schema": schema}):
        answer = engine.chat([USER], **given)
        assert answer.message.content == alone.text == answer.result.text
        assert answer.result.tokens == alone.tokens


@pytest.mark.parametrize("template", ["chatml", HERMES], ids=["plain", "thinking"])
def test_a_begun_answer_and_its_rest_are_what_the_schema_allows(
    engine: Engine, template: str
) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    begun = {"role": "assistant", "content": '{"n":'}
    given: dict[str, Any] = {"json_schema": schema, "template": template}
    answer = engine.chat([USER, begun], GREEDY, continue_final_message=True, **given)
    assert json.loads(begun["content"] + answer.result.text)["n"] in (1, 2)
    assert answer.message.content == begun["content"] + answer.result.text
    with pytest.raises(ArgumentError, match="is not what its grammar allows"):
        engine.chat([USER, {**begun, "content": "It"}], continue_final_message=True, **given)
    given["template"] = "llama2"  # it ends the text
    with pytest.raises(ArgumentError, match="leaves out what has begun"):
        engine.chat([USER, begun], GREEDY, continue_final_message=True, **given)


@pytest.mark.parametrize(
    "words",
    [
        "<|tool_calls_section_begin|><|tool_call_begin|>",
        "<|open|><|close|><|end_of_msg|>",
        "<|role_sep|><|message_sep|>",
        ">>>all>>>${recipient}",
        "List of tools: [",
    ],
    ids=["Kimi K2's", "Kimi K3's", "GigaChat 3's", "functionary's", "LFM2's"],
)
def test_a_schema_that_a_format_leaves_out_beside_tools(engine: Engine, words: str) -> None:
    given: ChatRequest = {
        "template": f"{{# {words} #}}{HERMES}",
        "tools": [WEATHER],
        "json_schema": {"type": "object"},
    }
    with pytest.raises(ArgumentError, match="tools='1 of them': not beside this JSON schema"):
        engine.chat.prepare([USER], None, given)
    for choice in ("none", "required"):  # an answer without calls, and one that is all calls
        engine.chat.prepare([USER], None, {**given, "tool_choice": choice})
    engine.chat.prepare([USER], None, {**given, "template": HERMES})


@pytest.mark.parametrize(
    ("given", "params", "named"),
    [
        ({"tols": [WEATHER]}, None, "did you mean tools"),
        ({"temperature": 0}, None, "SamplingParams"),
        ({}, "greedy", "must be SamplingParams"),
        ({"template": "no-such"}, None, "no chat template has the name"),
        (
            {**REQUIRED, "continue_final_message": False},
            SamplingParams(grammar="root ::= [a-z]"),
            "tools have a grammar",
        ),
        ({"json_schema": {"not": {}}}, None, "json_schema: not"),
        ({"tools": [WEATHER], "tool_choice": "required"}, None, "tools='1 of them': .*no place"),
        ({}, SamplingParams(preserved_tokens=[10**6]), "preserved_tokens"),
        ({}, SamplingParams(grammar=Grammar("root ::= [a]", lazy=True)), "needs a trigger"),
    ],
)
def test_what_is_refused(engine: Engine, given: dict[str, Any], params: Any, named: str) -> None:
    with pytest.raises((ArgumentError, ChatTemplateError), match=named):
        engine.chat.submit([USER], params, **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trigger_patterns", "x: "),
        ("trigger_patterns", ("a\0b",)),
        ("trigger_patterns", ("\ud800",)),
        ("trigger_patterns", (5,)),
        ("trigger_tokens", (2**40,)),
        ("trigger_tokens", (-1,)),
        ("prefill", 5),
        ("thinking_ends", (5,)),
    ],
)
def test_a_grammars_fields_are_sequences_of_what_they_name(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        Grammar("root ::= [a]", lazy=True, **{name: value})
    assert caught.value.argument == name


def test_a_trigger_that_is_no_regular_expression(engine: Engine) -> None:
    for pattern in ("a" * 90_000, "(" * 20_000 + "a" + ")" * 20_000):
        large = Grammar("root ::= [a]", lazy=True, trigger_patterns=(pattern,))
        with pytest.raises(GrammarError, match=f"a trigger pattern of {len(pattern)} bytes"):
            engine.submit("x", SamplingParams(grammar=large))
    grammar = Grammar("root ::= [a]", lazy=True, trigger_patterns=("(",))
    with pytest.raises(GrammarError, match="no regular expression"):
        engine.submit("a", SamplingParams(grammar=grammar))
