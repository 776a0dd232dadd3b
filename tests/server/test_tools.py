"""Tools and thoughts in all three interfaces. A grammar in the place of the template's makes the
embedded model say what a model with such a template would."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import openai
import pytest

from pyllamabatch import SamplingParams
from pyllamabatch.engine.chat import with_prompt
from pyllamabatch.llama.chat import ChatPrompt
from pyllamabatch.llama.model import Model
from pyllamabatch.server import service
from pyllamabatch.server.options import ServerOptions
from pyllamabatch.server.responses import ResponsesBody, messages_of
from pyllamabatch.server.tokens import n_within
from tests.llama.test_chat import CALL, HERMES, USER, WEATHER
from tests.support.served import SUM_CHAT, Served, serving

SAID = f"<think>\nAsk for it.\n</think>\n\nI look. {CALL}"
FORCED = {"temperature": 0}
RESULT = "It rains."
ARGUMENTS = {"city": "Paris"}
FUNCTION: Any = WEATHER["function"]


@pytest.fixture(scope="module")
def hermes(embedded_model: Model) -> Iterator[Served]:
    def forced(params: SamplingParams, prompt: ChatPrompt) -> SamplingParams:
        params = with_prompt(params, prompt)
        if prompt.grammar is None:
            return params
        said = "Yes." if RESULT in prompt else SAID
        return replace(params, grammar=f"root ::= {json.dumps(said)}", preserved_tokens=())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "with_prompt", forced)
        with serving(embedded_model, ServerOptions(chat_template=HERMES)) as served:
            yield served


@pytest.fixture(scope="module")
def client(hermes: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": [USER], "tools": [WEATHER]}
    (choice,) = client.chat.completions.create(**asked, extra_body=FORCED).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert (call.type, call.id != "") == ("function", True)
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    assert choice.message.content.strip() == "I look."
    assert choice.message.reasoning_content.strip() == "Ask for it."

    deltas: list[Any] = []
    ends: list[Any] = []
    for chunk in client.chat.completions.create(**asked, stream=True, extra_body=FORCED):
        deltas += [choice.delta for choice in chunk.choices]
        ends += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert calls[0].function.name == "weather"
    assert json.loads("".join(call.function.arguments for call in calls)) == ARGUMENTS
    assert "".join(delta.content or "" for delta in deltas).strip() == "I look."
    assert ends == ["tool_calls"]

    result = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    message = choice.message.model_dump(exclude_none=True)
    again = {**asked, "messages": [USER, message, result]}
    assert client.chat.completions.create(**again).choices[0].message.content == "Yes."


@pytest.mark.parametrize(
    ("part", "n"), [("ab", 1), ("bcd", 3), ("c", 1), ("abcdef", 4), ("", 0), ("ac", 0), ("x", 0)]
)
def test_the_tokens_of_a_part(part: str, n: int) -> None:
    assert n_within(part, range(4), [b"ab", b"c", b"de", b"f"].__getitem__) == n


def test_responses(client: openai.OpenAI) -> None:
    tool = {"type": "function", **FUNCTION, "strict": True}
    asked: dict[str, Any] = {"model": "m", "input": USER["content"], "tools": [tool]}
    response = client.responses.create(**asked, extra_body=FORCED)
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    call: Any = response.output[2]
    assert (call.name, json.loads(call.arguments)) == ("weather", ARGUMENTS)
    thoughts: Any = response.output[0]
    assert response.usage is not None
    n_thoughts = response.usage.output_tokens_details.reasoning_tokens
    assert n_thoughts == len(thoughts.content[0].text)  # its vocabulary is one of bytes
    with client.responses.stream(**asked, extra_body=FORCED) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert final.usage is not None
    assert final.usage.output_tokens_details.reasoning_tokens == n_thoughts
    assert {"response.function_call_arguments.done", "response.reasoning_text.delta"} <= kinds
    assert [item.type for item in final.output] == [item.type for item in response.output]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    turns: Any = [USER, *[item.model_dump() for item in response.output], result]
    again = client.responses.create(**{**asked, "input": turns})
    assert again.output_text == "Yes."


def test_what_codex_sends_hinders_nothing(hermes: Served) -> None:
    tools: list[Any] = [{"type": "custom", "name": "apply_patch"}, {"type": "web_search"}]
    function = {"type": "function", **FUNCTION}
    body = {
        "model": "m", "input": [{"type": "message", **USER}], "tools": [*tools, function],
        "tool_choice": "auto", "parallel_tool_calls": False, "store": False, **FORCED,
        "reasoning": {"effort": "medium", "summary": "auto"}, "text": {"verbosity": "low"},
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "a",
        "client_metadata": {"session_id": "a"}, "access_programs": [],
        "stream_options": {"reasoning_summary_delivery": "sequential_cutoff"},
    }  # fmt: skip
    *_, last = hermes.events("/v1/responses", body)
    assert last["response"]["output"][2]["name"] == "weather"
    path = "/v1/responses/input_tokens"
    assert hermes.ok(path, body) == hermes.ok(path, {**body, "tools": [function]})
    assert hermes.ok(path, {**body, "tools": tools}) == hermes.ok(path, {**body, "tools": []})


def test_messages(hermes: Served) -> None:
    tool = {"name": "weather", "input_schema": FUNCTION["parameters"]}
    asked: dict[str, Any] = {"model": "m", "max_tokens": 300, "messages": [USER], "tools": [tool]}
    with anthropic.Anthropic(base_url=hermes.url, api_key="none", max_retries=0) as client:
        message = client.messages.create(**asked, extra_body=FORCED)
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        call: Any = message.content[2]
        assert (call.name, call.input, message.stop_reason) == ("weather", ARGUMENTS, "tool_use")
        with client.messages.stream(**asked, extra_body=FORCED) as stream:
            final = stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
        last: Any = final.content[2]
        assert last.input == ARGUMENTS
        result = {"type": "tool_result", "tool_use_id": call.id, "content": RESULT}
        said = [block.model_dump() for block in message.content]
        turns = [
            USER,
            {"role": "assistant", "content": said},
            {"role": "user", "content": [result]},
        ]
        again = client.messages.create(**{**asked, "messages": turns})
        assert [block.text for block in again.content if block.type == "text"] == ["Yes."]


def test_a_cut_off_answer_is_read_as_far_as_it_goes(hermes: Served) -> None:
    body = {"messages": [USER], "tools": [WEATHER], "max_tokens": len(SAID) - 20, **FORCED}
    (choice,) = hermes.ok("/v1/chat/completions", body)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].strip() == "I look."


def test_the_item_that_is_cut_off_says_so(hermes: Served) -> None:
    """An agent runs what is complete, as it comes."""
    tool = {"type": "function", **FUNCTION}
    body = {"input": [USER], "tools": [tool], "max_output_tokens": len(SAID) - 20, **FORCED}
    statuses = ["completed", "completed", "incomplete"]
    whole = hermes.ok("/v1/responses", body)
    assert [item["status"] for item in whole["output"]] == statuses
    *events, last = hermes.events("/v1/responses", body)
    assert [item["status"] for item in last["response"]["output"]] == statuses
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert [item["status"] for item in done] == statuses
    assert done[-1]["name"] == "weather"


def test_log_probabilities_are_those_of_an_answer_that_is_all_text(hermes: Served) -> None:
    body = {"input": "Hi", "include": ["message.output_text.logprobs"]}
    assert hermes.refused("/v1/responses", body)["param"] == "include"


def test_a_grammar_beside_tools_is_refused(hermes: Served, embedded_model: Model) -> None:
    body = {"messages": [USER], "tools": [WEATHER], "grammar": 'root ::= "a"'}
    assert hermes.refused("/v1/chat/completions", body)["param"] == "grammar"


def test_an_unknown_format_is_refused_beside_tools_too(hermes: Served) -> None:
    schema = {"type": "string", "format": "email"}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for more in ({}, {"tools": [WEATHER]}):
        body = {"messages": [USER], "response_format": wanted, **more}
        error = hermes.refused("/v1/chat/completions", body)
        assert error["param"] == "json_schema: format"


def test_a_template_without_tools_says_so(served: Served) -> None:
    error = served.refused("/v1/chat/completions", {**SUM_CHAT, "tools": [WEATHER]})
    assert error["param"] == "tools"
    assert served.ok(
        "/v1/chat/completions", {**SUM_CHAT, "tools": [WEATHER], "tool_choice": "none"}
    )


def test_no_effort_is_no_thinking(embedded_model: Model) -> None:
    """Any other one is the template's variable."""
    template = HERMES + "{{ reasoning_effort | default('') }}"
    with serving(embedded_model, ServerOptions(chat_template=template)) as served:

        def prompt(**more: Any) -> str:
            return str(served.ok("/apply-template", {"messages": [USER], **more})["prompt"])

        own = prompt()
        off = prompt(chat_template_kwargs={"enable_thinking": False})
        assert off != own == prompt(reasoning_effort="")
        assert prompt(reasoning_effort="none") == off
        assert prompt(reasoning_effort="low") == own + "low"
        vocab = embedded_model.vocab
        for effort, text in (("none", off), ("low", own + "low")):
            body = {"input": USER["content"], "reasoning": {"effort": effort}}
            counted = served.ok("/v1/responses/input_tokens", body)["input_tokens"]
            assert counted == len(vocab.tokenize(text, parse_special=True))


def test_thoughts_of_former_items_go_to_the_template() -> None:
    """What the model thought, said and called in one answer is one message."""
    said = {"type": "message", "role": "assistant", "content": "I look."}
    call = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "a", "output": RESULT}
    thoughts: dict[str, Any] = {"type": "reasoning", "summary": []}
    mine = {**thoughts, "content": [{"type": "reasoning_text", "text": "Ask for it."}]}
    whole = {"role": "assistant", "content": "I look.", "reasoning_content": "Ask for it."}
    calls = [{"id": "a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    for items, answer in (
        ([mine, said, call], {**whole, "tool_calls": calls}),
        ([mine, call], {**whole, "content": None, "tool_calls": calls}),
        ([mine], {**whole, "content": ""}),
        (
            [{**thoughts, "encrypted_content": "x"}, said],
            {"role": "assistant", "content": "I look."},
        ),
    ):
        body = ResponsesBody(input=[USER, *items, result])
        asked, found, tool = messages_of(body)
        assert (asked, found, tool["content"]) == (USER, answer, RESULT)


def test_thinking_for_requests_that_do_not_say(embedded_model: Model) -> None:
    options = ServerOptions(chat_template=HERMES, thinking=False)
    with serving(embedded_model, options) as served:
        off, on = (
            served.ok("/apply-template", {"messages": [USER], "chat_template_kwargs": said})[
                "prompt"
            ]
            for said in ({}, {"enable_thinking": True})
        )
    assert off == on + "<think>\n\n</think>\n\n"
