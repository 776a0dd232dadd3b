"""A content of several parts gives the prompt that llama.cpp makes of them, in each interface."""

import json
from typing import Any

import pytest

from pyllamabatch.llama.model import Model
from pyllamabatch.server.options import ServerOptions
from tests.llama.test_chat import HERMES, WEATHER
from tests.support.served import SUM, Served, serving

TEXTS = ("One.", "Two.", "Three.")
STRING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS = "{% for part in m.content %}[{{ part.text }}]{% endfor %}"
TYPED = "{% for m in messages %}<{{ m.role }}>" + PARTS + "{% endfor %}"
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    + PARTS
    + "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (STRING, "<user>One.\nTwo.\nThree."),
        (TYPED, "<user>[One.][Two.][Three.]"),
        (EITHER, "<user>[One.][Two.][Three.]"),
    ],
)
def test_parts_are_joined_as_by_llama_cpp(
    embedded_model: Model, template: str, prompt: str
) -> None:
    def asked(kind: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": kind, "text": text} for text in TEXTS]}

    vocab = embedded_model.vocab
    assert vocab.apply_chat_template([asked("text")], template=template) == prompt
    n = len(vocab.tokenize(prompt, parse_special=True))
    options = ServerOptions(chat_template=template, sampling={"max_tokens": 1})
    with serving(embedded_model, options) as served:
        chat = {"messages": [asked("text")]}
        assert served.ok("/apply-template", chat) == {"prompt": prompt}
        counted = served.ok("/v1/messages/count_tokens", chat)
        assert counted == {"input_tokens": n}
        response = served.ok("/v1/responses", {"input": [asked("input_text")]})
        assert response["usage"]["input_tokens"] == n


BEGUN: list[dict[str, Any]] = [
    {"role": "user", "content": SUM},
    {"role": "assistant", "content": "It is"},
]


def test_an_answer_at_the_end_goes_on(served: Served) -> None:
    """As in llama-server and with Anthropic's models. vLLM's clients ask for another one."""
    vocab = served.engine.model.vocab
    prompt = vocab.chat_template().render(BEGUN, continue_final_message=True)
    assert prompt.endswith("It is")
    n = len(vocab.tokenize(prompt))
    assert served.ok("/apply-template", {"messages": BEGUN}) == {"prompt": prompt}
    assert served.ok("/v1/messages/count_tokens", {"messages": BEGUN}) == {"input_tokens": n}
    response = served.ok("/v1/responses", {"input": BEGUN, "max_output_tokens": 1})
    assert response["usage"]["input_tokens"] == n
    for more in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        asked = served.ok("/apply-template", {"messages": BEGUN, **more})
        assert asked == {"prompt": vocab.apply_chat_template(BEGUN)}
    called = {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    for empty in ("", [{"type": "text", "text": ""}]):
        placeholder = [*BEGUN[:1], {"role": "assistant", "content": empty}]
        asked = served.ok("/apply-template", {"messages": placeholder})
        assert asked == {"prompt": vocab.apply_chat_template(placeholder)}
    calls: list[dict[str, Any]] = [*BEGUN[:1], {**BEGUN[1], "tool_calls": [called]}]
    asked = served.ok("/apply-template", {"messages": calls})
    assert asked == {"prompt": vocab.apply_chat_template(calls)}


def test_what_must_be_json_or_a_call_begins_anew(embedded_model: Model) -> None:
    """A text that no such answer begins with was the start of one, and refused."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    required: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required"}
    function: Any = WEATHER["function"]
    of_anthropic = {**function, "input_schema": function["parameters"]}
    template = embedded_model.vocab.chat_template(HERMES)
    n = len(embedded_model.vocab.tokenize(template.render(BEGUN), parse_special=True))
    options = ServerOptions(chat_template=HERMES, sampling={"max_tokens": 1})
    with serving(embedded_model, options) as served:
        for prompt, more in (
            (template.render(BEGUN), {"response_format": named}),
            (template.render(BEGUN, **required), required),
            (template.render(BEGUN, tools=[WEATHER], continue_final_message=True),
             {"tools": [WEATHER]}),
        ):  # fmt: skip
            asked = served.ok("/apply-template", {"messages": BEGUN, **more})
            assert asked == {"prompt": prompt}
        chat = {"messages": BEGUN, "response_format": named}
        assert served.ok("/v1/chat/completions", chat)["usage"]["prompt_tokens"] == n
        format = {"format": {"type": "json_schema", "schema": schema}}
        body = {"messages": BEGUN, "max_tokens": 1, "output_config": format}
        assert served.ok("/v1/messages", body)["usage"]["input_tokens"] <= n
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            called = {"messages": BEGUN, "tools": [of_anthropic], "tool_choice": choice}
            counted = served.ok("/v1/messages/count_tokens", called)
            prompt = template.render(BEGUN, **required)
            n_called = len(embedded_model.vocab.tokenize(prompt, parse_special=True))
            assert counted == {"input_tokens": n_called}
        text = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
        response = served.ok("/v1/responses", {"input": BEGUN, "text": text})
        assert response["usage"]["input_tokens"] == n
        explicit = {**chat, "continue_final_message": True}
        assert served.post("/v1/chat/completions", explicit).status_code == 400


def test_a_begun_json_goes_on(served: Served) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    begun = [*BEGUN[:1], {"role": "assistant", "content": '{"n":'}]
    asked = {"messages": begun, "json_schema": schema, "continue_final_message": True}
    (choice,) = served.ok("/v1/chat/completions", {**asked, "temperature": 0})["choices"]
    assert json.loads('{"n":' + choice["message"]["content"])["n"] in (1, 2)
