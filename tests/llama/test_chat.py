"""Chats by llama.cpp's own templates and parsers. That every template of the pinned tree renders as
llama-server does is tools/chat_templates.py's to show."""

import json
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyllamabatch import Model
from pyllamabatch.errors import ArgumentError, ChatParseError, ChatTemplateError
from pyllamabatch.llama.chat import GIVEN, ChatPrompt, ChatTemplate
from pyllamabatch.llama.chat_message import ChatMessage, MessageReader, ToolCall

USER = {"role": "user", "content": "Is it raining in Paris?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
LISTS = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {}}, "required": ["city"]},
    },
}
# A template of the kind that Hermes and Qwen models have: thoughts, then content or calls.
HERMES = """
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}For each call: <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.default() as model:
        yield model


@pytest.fixture(scope="module")
def hermes(model: Model) -> ChatTemplate:
    return ChatTemplate(model, HERMES)


def test_the_models_own_template(model: Model) -> None:
    template = ChatTemplate(model)
    assert template.source == model.chat_template()
    prompt = template.render([USER])
    assert prompt == model.vocab.apply_chat_template([USER])
    assert (prompt.grammar, prompt.stops, prompt.preserved_tokens) == (None, (), {})
    assert prompt.parse("No.") == ChatMessage("No.")


def test_a_template_of_ones_own_is_honoured(model: Model) -> None:
    template = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    assert model.vocab.apply_chat_template([USER], template=template) == (
        "[user: Is it raining in Paris?]"
    )


def test_each_loop_of_a_template_has_its_own(model: Model) -> None:
    """Where its body names it (vendor/patches/jinja-work.patch)."""
    template = (
        "{% for m in messages %}{{ loop.index }}{% for i in range(2) %}{{ i }}{% endfor %}"
        "{% for i in range(2) %}{% if i %}{{ loop.index0 }}{% endif %}{% endfor %}"
        "{% for i in [] %}{% else %}{{ loop.length }}{% endfor %}{% endfor %}"
    )
    two = [USER, {"role": "assistant", "content": "No."}]
    assert model.vocab.apply_chat_template(two, template=template) == "1011220112"


def test_a_default_system_turn_appears(model: Model) -> None:
    template = (
        "{% if messages[0].role != 'system' %}SYSTEM Be kind.\n{% endif %}"
        "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
    )
    vocab = model.vocab
    assert vocab.apply_chat_template([USER], template=template).startswith("SYSTEM Be kind.\nuser")
    system = [{"role": "system", "content": "Be brief."}, USER]
    assert vocab.apply_chat_template(system, template=template).startswith("system Be brief.")


def test_builtin_names_are_known_without_jinja(model: Model) -> None:
    prompt = model.vocab.apply_chat_template([USER], template="llama3")
    assert "<|start_header_id|>user<|end_header_id|>\n\nIs it raining" in prompt


def test_tools_are_rendered_and_a_lazy_grammar_asked_for(hermes: ChatTemplate) -> None:
    prompt = hermes.render([USER], tools=[WEATHER, TIME])
    assert '"name": "weather"' in prompt
    assert hermes.capabilities["supports_tools"]
    grammar = prompt.grammar
    assert grammar is not None
    assert grammar.lazy
    assert grammar.trigger_patterns
    assert "weather" in grammar.text
    assert "time" in grammar.text


def test_tool_choices(hermes: ChatTemplate) -> None:
    required = hermes.render([USER], tools=[WEATHER, TIME], tool_choice="required").grammar
    assert required is not None
    assert not required.lazy
    free = hermes.render([USER], tools=[WEATHER, TIME], tool_choice="none")
    assert free.grammar is None
    one = {"type": "function", "function": {"name": "time"}}
    named = hermes.render([USER], tools=[WEATHER, TIME], tool_choice=one).grammar
    assert named is not None
    assert not named.lazy
    assert "weather" not in named.text


def test_an_answer_in_its_parts(hermes: ChatTemplate) -> None:
    prompt = hermes.render([USER], tools=[WEATHER])
    message = prompt.parse(f"<think>\nI ask.\n</think>\n\nLet me see.\n{CALL}")
    assert message.reasoning_content.strip() == "I ask."
    assert message.content.strip() == "Let me see."
    (call,) = message.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Paris"})
    plain = hermes.render([USER], reasoning_format="none").parse("<think>\nHm.\n</think>\n\nNo.")
    assert plain.content.startswith("<think>")


def test_an_answer_is_the_next_turns_message(hermes: ChatTemplate) -> None:
    assert ChatMessage("4", "2 + 2").to_dict().items() >= {"reasoning_content": "2 + 2"}.items()
    said = ChatMessage("", "", (ToolCall("weather", '{"city": "Paris"}', "c1"),))
    result = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    prompt = hermes.render([USER, said.to_dict(), result], tools=[WEATHER])
    assert '"arguments": {"city": "Paris"}' in prompt
    assert prompt.index("tool_call>\n{") < prompt.index("<|im_start|>tool\nrain")


def read_in_pieces(reader: MessageReader, text: str, size: int) -> ChatMessage:
    """The message that the deltas add up to."""
    content, reasoning = "", ""
    calls: dict[int, tuple[str, str, str]] = {}
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for delta in [*map(reader.feed, pieces), reader.feed("", last=True)]:
        content += delta.content
        reasoning += delta.reasoning_content
        for more in delta.tool_calls:
            name, arguments, id = calls.get(more.index, ("", "", ""))
            assert bool(more.name) == (more.index not in calls)
            calls[more.index] = name + more.name, arguments + more.arguments, id + more.id
    return ChatMessage(content, reasoning, tuple(ToolCall(*calls[i]) for i in sorted(calls)))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_deltas_add_up_to_the_message(hermes: ChatTemplate, size: int) -> None:
    prompt = hermes.render([USER], tools=[WEATHER], parallel_tool_calls=True)
    second = CALL.replace("Paris", "Rome é")
    for text in (f"<think>\nI ask.\n</think>\n\nSo:\n{CALL}\n{second}", "No call < at all.", ""):
        reader = prompt.reader()
        message = read_in_pieces(reader, text, size)
        assert message == reader.message
        assert reader.text == text
        whole = prompt.parse(text)
        assert [(c.name, c.arguments) for c in message.tool_calls] == [
            (c.name, c.arguments) for c in whole.tool_calls
        ]
        assert (message.content, message.reasoning_content) == (
            whole.content,
            whole.reasoning_content,
        )
        assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)


def test_brackets_in_strings_are_no_levels(hermes: ChatTemplate) -> None:
    said = ChatMessage(tool_calls=(ToolCall("weather", json.dumps({"city": '\\"' + "[" * 99})),))
    assert '\\\\\\"[[[' in hermes.render([USER, said.to_dict()], tools=[WEATHER])


class OneCall:
    """A parser of content, and of what is behind "<call>" as arguments. It counts characters."""

    def __init__(self) -> None:
        self.n_texts = self.n_characters = 0

    def __call__(self, text: str, partial: bool) -> ChatMessage:
        self.n_texts += 1
        self.n_characters += len(text)
        content, marker, arguments = text.partition("<call>")
        if not marker:
            held = next((n for n in range(5, 0, -1) if text.endswith("<call>"[:n])), 0)
            return ChatMessage(text[: len(text) - held] if partial else text)
        return ChatMessage(content, "", (ToolCall("f", arguments),))


@pytest.mark.parametrize("size", [1, 3, 50])
def test_content_comes_at_once_and_is_not_read_again(size: int) -> None:
    parse = OneCall()
    reader, said = MessageReader(parse, ("<call>",)), ""
    text = "".join(f"{i:04} <ca <c" for i in range(3_000))
    for i in range(0, len(text), size):
        said += reader.feed(text[i : i + size]).content
        assert said == reader.message.content
        assert len(reader.text) - len(said) < len("<call>")
    assert parse.n_texts < 9
    delta = reader.feed("<call>{}")
    assert [(call.name, call.arguments) for call in delta.tool_calls] == [("f", "{}")]
    assert said + delta.content == text


def test_what_must_be_read_again_costs_as_many_readings_as_the_text_is_long() -> None:
    parse = OneCall()
    reader, said = MessageReader(parse, ("<call>",)), ""
    for piece in ("<call>", *(f"{i:04}" for i in range(10_000))):
        said += "".join(call.arguments for call in reader.feed(piece).tool_calls)
        waits = len(reader.text) - len("<call>") - len(said)
        assert waits <= len(reader.text) // 256 + 4
    assert parse.n_characters <= 256 * (len(reader.text) + 8192)
    (more,) = reader.feed("!", now=True).tool_calls
    said += more.arguments
    assert "<call>" + said == reader.text


def test_thinking_can_be_switched_off(hermes: ChatTemplate) -> None:
    assert hermes.supports_thinking
    on, off = hermes.render([USER]), hermes.render([USER], enable_thinking=False)
    assert off == on + "<think>\n\n</think>\n\n"


def test_a_message_that_goes_on(hermes: ChatTemplate) -> None:
    begun = {"role": "assistant", "content": "It is"}
    prompt = hermes.render([USER, begun], continue_final_message=True)
    assert prompt.endswith("It is")
    assert prompt.parse(" raining.").content == "It is raining."
    assert prompt.reader().feed(" raining.").content == " raining."


def test_a_schema_of_the_content(hermes: ChatTemplate) -> None:
    schema = {"type": "object", "properties": {"rain": {"type": "boolean"}}, "required": ["rain"]}
    for given in (schema, json.dumps(schema)):
        grammar = hermes.render([USER], json_schema=given).grammar
        assert grammar is not None
        assert "rain" in grammar.text


@pytest.mark.parametrize(
    "words",
    [
        "<tool_call><function=<parameter=",
        "[SYSTEM_PROMPT][TOOL_CALLS][ARGS]",
        "dsml_token DSML tool_calls",
    ],
    ids=["Qwen3-Coder's", "Ministral's", "DeepSeek's"],
)
def test_a_schema_beside_tools_is_the_grammar(model: Model, words: str) -> None:
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(model, f"{{# {words} #}}{{{{ tools }}}}{turns}")
    prompt = template.render([USER], tools=[TIME], json_schema={"type": "integer", "maximum": 7})
    assert prompt.grammar is not None
    assert not prompt.grammar.lazy
    assert "response-format" in prompt.grammar.text


def test_text_parts_and_template_variables(model: Model) -> None:
    template = ChatTemplate(model, "{{ mood }}{% for m in messages %}<{{ m.content }}>{% endfor %}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    prompt = template.render(
        [{"role": "user", "content": parts}], template_kwargs={"mood": "good: "}
    )
    assert prompt == "good: <a\nb>"


def test_a_prompt_is_a_text(hermes: ChatTemplate) -> None:
    prompt = hermes.render([USER], tools=[WEATHER])
    copy = pickle.loads(pickle.dumps(prompt))
    assert isinstance(copy, ChatPrompt)
    assert copy == prompt
    assert ChatPrompt("x").parse("answer") == ChatMessage("answer")


def test_threads_share_a_template(hermes: ChatTemplate) -> None:
    def work(i: int) -> tuple[str, str]:
        prompt = hermes.render([{"role": "user", "content": str(i)}], tools=[WEATHER])
        return prompt, prompt.parse(CALL).tool_calls[0].arguments

    with ThreadPoolExecutor(8) as pool:
        prompts, arguments = zip(*pool.map(work, range(8)), strict=True)
    assert len({*prompts}) == 8
    assert len({*arguments}) == 1


def test_a_template_outlives_its_closed_model() -> None:
    model = Model.default(vocab_only=True)
    template = ChatTemplate(model)
    model.close()
    assert "raining" in template.render([USER])


def with_parameters(schema: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


REFUSED: dict[str, list[dict[str, Any]]] = {
    "template": [
        {"template": "{{ no such }}"},
        {"template": "{% for %}"},
        {"template": ""},
        {"template": "{{ raise_exception('only poems') }}"},
    ],
    "did you mean chatml": [{"template": "chat-ml"}],
    "messages": [{"messages": m} for m in ("hi", [], [1], None, USER)],
    r"messages\[0\].role": [{"messages": [{"content": "x"}]}],
    r"messages\[0\].content": [
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": "\0"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    ],
    r"messages\[1\].tool_calls\[0\].function.arguments": [
        {"messages": [USER, ChatMessage(tool_calls=(ToolCall("weather", deep),)).to_dict()]}
        for deep in ('{"city": "]", "x": ' + "[" * 50_000 + "]" * 50_000 + "}", "\ufeff" + "[" * 65)
    ],
    "tools": [{"tools": "weather"}],
    r"tools\[0\]": [{"tools": [t]} for t in (1, {}, {"type": "function"}, {"type": "web"})],
    r"tools\[1\].function.name": [
        {"tools": [WEATHER, {"type": "function", "function": {"name": name}}]}
        for name in ("", "_" * 30_000)
    ],
    r"tools\[0\].function.parameters=7": [{"tools": [with_parameters(7)]}],
    r"tools\[0\].function.parameters=.*in a name": [
        {"tools": [with_parameters({"properties": {"_" * 30_000: {}}})]}
    ],
    r"tools\[0\].function.parameters=.*in a \$ref": [
        {"tools": [with_parameters({"properties": {"a": {"$ref": "#/" + "_" * 30_000}}})]}
    ],
    "tool_choice": [
        {"tools": [WEATHER], "tool_choice": c}
        for c in ("any", {"type": "function", "function": {"name": "wether"}})
    ],
    "reasoning_format": [{"reasoning_format": "loud"}],
    "enable_thinking": [{"enable_thinking": "no"}],
    "continue_final_message": [
        {"continue_final_message": True},
        {"continue_final_message": "thoughts"},
        {"continue_final_message": True, "add_generation_prompt": True},
    ],
    "did you mean tools": [{"tool": []}],
    "json_schema": [{"json_schema": {"$ref": "#"}}],
    "template_kwargs": [
        {"template_kwargs": [1]},
        *({"template_kwargs": {"x": 1, name: None}} for name in GIVEN),
        {"template_kwargs": {"x": json.loads("[" * 99 + "]" * 99)}},
    ],
}


@pytest.mark.parametrize(
    ("named", "given"), [(name, one) for name, each in REFUSED.items() for one in each]
)
def test_what_is_refused(model: Model, named: str, given: dict[str, Any]) -> None:
    given = {"messages": [USER], **given}
    template, messages = given.pop("template", HERMES), given.pop("messages")
    with pytest.raises((ArgumentError, ChatTemplateError), match=named):
        ChatTemplate(model, template).render(messages, **given)


def test_a_template_that_raises_says_what(model: Model) -> None:
    template = ChatTemplate(
        model, "{% if messages | length > 1 %}{{ raise_exception('only one') }}{% endif %}hi"
    )
    assert template.render([USER]) == "hi"
    with pytest.raises(ChatTemplateError, match="only one"):
        template.render([USER, USER])


def test_an_answer_of_another_format(hermes: ChatTemplate) -> None:
    prompt = hermes.render([USER], tools=[WEATHER])
    broken = "<tool_call>\nrain?\n</tool_call>"
    with pytest.raises(ChatParseError, match="does not match") as caught:
        prompt.parse(broken)
    assert caught.value.text == broken
    assert prompt.parse(broken, partial=True).tool_calls == ()


def test_an_answer_of_many_levels(hermes: ChatTemplate) -> None:
    prompt = hermes.render([USER], tools=[LISTS])
    for n, opened in ((60, "[" * 60), (60, '{"a":' * 60)):
        closed = opened + ("]" * n if opened[0] == "[" else "1" + "}" * n)
        (call,) = prompt.parse(CALL.replace('"Paris"', closed)).tool_calls
        assert json.loads(call.arguments)["city"] == json.loads(closed)
    for deep in ("[" * 50_000, '{"a":' * 50_000):
        for partial in (False, True):
            with pytest.raises(ChatParseError, match="nested too deep"):
                prompt.parse(CALL.split('"Paris"')[0] + deep, partial)


def test_a_tools_pattern_that_llama_cpp_does_not_know(
    hermes: ChatTemplate, capfd: pytest.CaptureFixture[str]
) -> None:
    """A call's argument may then be any text; the content that a schema promised may not."""
    schema = {"type": "object", "properties": {"year": {"type": "string", "pattern": "\\d{4}"}}}
    grammar = hermes.render([USER], tools=[with_parameters(schema)]).grammar
    assert grammar is not None
    assert "year" in grammar.text
    with pytest.raises(ChatTemplateError, match="not supported"):
        hermes.render([USER], json_schema=schema)
    assert capfd.readouterr() == ("", "")
