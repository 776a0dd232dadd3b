"""Chats by llama.cpp's own templates and parsers: the prompt that llama-server makes of messages,
and the message that it reads in an answer.

    template = ChatTemplate(model)
    prompt = template.render([{"role": "user", "content": "Is it raining?"}], tools=tools)
    ...                                      # `engine.chat` does what lies between
    message = prompt.parse(text)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from pyllamabatch.errors import (
    ArgumentError,
    ChatParseError,
    ChatTemplateError,
    choice,
    flag,
    unknown_keyword,
)
from pyllamabatch.llama import runtime
from pyllamabatch.llama.chat_message import ChatMessage, MessageReader
from pyllamabatch.llama.grammar import Grammar
from pyllamabatch.llama.handle import Owner, owned
from pyllamabatch.llama.json_limits import (
    NAME_MAX,
    check_length,
    check_nesting,
    check_nesting_of_text,
    check_schema,
    json_text,
)
from pyllamabatch.raw import ffi, lib

if TYPE_CHECKING:
    from typing_extensions import Unpack

Message = Mapping[str, Any]
REASONING_FORMATS = ("none", "auto", "deepseek", "deepseek-legacy")
SOURCE_BYTES_MAX = 1 << 20
DEFAULT_KWARGS = {"preserve_reasoning": True}
"""Variables that llama-server gives every template: thoughts of earlier turns stay."""
GIVEN = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")
"""Variables that a template has from the conversation and the model."""


class ChatOptions(TypedDict, total=False):
    """How messages become a prompt; the words are llama-server's.

    - tools: functions that the model may call, as OpenAI's API has them.
    - tool_choice: "auto", "none", "required", or {"type": "function", "function": {"name": ...}},
      which offers that one only, and requires it.
    - parallel_tool_calls: several calls in one answer. Default: if the template can.
    - json_schema: what the content must be, see `pyllamabatch.step.json_schema`.
    - reasoning_format: "deepseek" (default, the same as "auto") reads thoughts into
      `reasoning_content`; "none" leaves them in the content.
    - enable_thinking: False asks a template that knows of thinking to go without.
    - add_generation_prompt: end where the answer begins. Default True.
    - continue_final_message: the last message is an answer that goes on, instead.
    - template_kwargs: further variables of the template, none of `GIVEN`.
      preserve_reasoning=False leaves out the thoughts of earlier turns, where the template can."""

    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    json_schema: Mapping[str, Any] | str | None
    reasoning_format: Literal["none", "auto", "deepseek", "deepseek-legacy"]
    enable_thinking: bool
    add_generation_prompt: bool
    continue_final_message: bool | Literal["content", "reasoning_content"]
    template_kwargs: Mapping[str, Any]


class ChatPrompt(str):
    """A conversation as the prompt of a model: a text in which special tokens are written out. They
    are parsed when it is tokenized, and a BOS that it begins with is not doubled.

    - grammar: what an answer must look like, for tools and a schema; None: anything.
    - stops: texts that end an answer.
    - preserved_tokens: special tokens whose text the parser needs, and that text.
    - generation_prompt: what the template has put at the start of the answer.
    - markers: content and thoughts end before one of these, or with the answer."""

    grammar: Grammar | None = None
    stops: tuple[str, ...] = ()
    preserved_tokens: Mapping[int, str] = MappingProxyType({})
    generation_prompt: str = ""
    markers: tuple[str, ...] = ()
    _parser: Any = None

    @classmethod
    def of(cls, rendered: Mapping[str, Any], parser: Any) -> ChatPrompt:
        """From what `plb_chat_render` gives."""
        prompt = cls(rendered["prompt"])
        prompt._parser = parser
        prompt.stops = tuple(rendered["stops"])
        special = rendered["preserved_tokens"], rendered["preserved_texts"]
        prompt.preserved_tokens = dict(zip(*special, strict=True))
        prompt.generation_prompt = rendered["generation_prompt"]
        prompt.markers = tuple(sorted({*rendered["markers"]} - {""}))
        if rendered["grammar"]:
            lazy = rendered["grammar_lazy"]
            prompt.grammar = Grammar(
                rendered["grammar"],
                lazy,
                tuple(rendered["trigger_patterns"]) if lazy else (),
                tuple(rendered["trigger_tokens"]) if lazy else (),
                tuple(rendered["prefill"]),
                tuple(rendered["thinking_start"]),
                tuple(map(tuple, rendered["thinking_ends"])),
            )
        return prompt

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return ChatPrompt, (str(self),)  # another process renders its own

    def parse(self, text: str, partial: bool = False) -> ChatMessage:
        """The message in an answer to this prompt. partial: more may follow. Raises
        `ChatParseError` for a whole one that is not what the model's format allows."""
        if self._parser is None:
            return ChatMessage(text)
        data = text.encode("utf-8", "replace")
        out, log = runtime.logged(lib.plb_chat_parse, self._parser, data, len(data), partial)
        if out == ffi.NULL:
            raise ChatParseError(text, log.splitlines()[-1] if log else "")
        return ChatMessage.of(_taken(out))

    def reader(self) -> MessageReader:
        """For an answer that arrives piece by piece."""
        return MessageReader(self.parse, self.markers)


class ChatTemplate:
    """A model's chat template, or one of your own. Any thread may use it.

    `template`: Jinja, or one of the names of `chat_templates()`. None: the
    model's own. Raises `ChatTemplateError` when there is none, or llama.cpp can't read it."""

    def __init__(self, model: Owner, template: str | None = None) -> None:
        source = ffi.NULL if template is None else _source(template)
        if template is None and not runtime.text(lib.llama_model_chat_template(model.ptr, source)):
            raise ChatTemplateError(
                "the model has no chat template; give one, as in "
                'apply_chat_template(messages, template="chatml"), or see chat_templates()'
            )
        ptr, log = runtime.logged(lib.plb_chat_template_new, model.ptr, source)
        if ptr == ffi.NULL:
            raise ChatTemplateError(
                f'llama.cpp can\'t read this template: give one that it can, as "chatml". {log}'
            )
        self._ptr = owned(ptr, model.ptr, free=lib.plb_chat_template_free)

    @cached_property
    def _info(self) -> dict[str, Any]:
        return _taken(lib.plb_chat_template_info(self._ptr))

    @property
    def source(self) -> str:
        """The template's text."""
        return str(self._info["source"])

    @property
    def capabilities(self) -> dict[str, bool]:
        """What it has a place for, by llama.cpp's names ("supports_tools", ...)."""
        return dict(self._info["capabilities"])

    @property
    def supports_thinking(self) -> bool:
        """Answers may begin with thoughts."""
        return bool(self._info["supports_thinking"])

    def render(self, messages: Iterable[Message], **options: Unpack[ChatOptions]) -> ChatPrompt:
        """The prompt of a conversation.

        messages: {"role": ..., "content": text or text parts} each, and what OpenAI's API knows
        besides: "tool_calls", "tool_call_id", "reasoning_content". Raises `ArgumentError`, and
        `ChatTemplateError` when the template refuses them."""
        request = json_text("messages", _request(messages, options))
        parser = ffi.new("plb_chat_parser **")
        out, log = runtime.logged(lib.plb_chat_render, self._ptr, request.encode(), parser)
        if out == ffi.NULL:
            raise ChatTemplateError(f"the template refuses this chat: {log}")
        return ChatPrompt.of(_taken(out), owned(parser[0], free=lib.plb_chat_parser_free))


def chat_templates() -> list[str]:
    """The names of the chat templates that llama.cpp knows."""
    n = lib.llama_chat_builtin_templates(ffi.NULL, 0)
    names = ffi.new("const char *[]", n)
    lib.llama_chat_builtin_templates(names, n)
    return [runtime.text(name) for name in names]


def _taken(out: Any) -> dict[str, Any]:
    text: bytes = ffi.string(ffi.gc(out, lib.plb_text_free))
    return cast("dict[str, Any]", json.loads(text))


def _source(template: object) -> bytes:
    if not isinstance(template, str) or not template or "\0" in template:
        raise ArgumentError("template", template, "must be a text, without NUL characters")
    data = template.encode("utf-8", "replace")
    if len(data) > SOURCE_BYTES_MAX:
        raise ArgumentError("template", f"{len(data)} bytes", f"at most {SOURCE_BYTES_MAX}")
    if "{" not in template and template not in chat_templates():
        near = get_close_matches(template, chat_templates(), n=1)
        hint = f"did you mean {near[0]}?" if near else "see chat_templates()"
        raise ChatTemplateError(f"no chat template has the name {template[:80]!r}; {hint}")
    return data


def _request(messages: Iterable[Message], options: ChatOptions) -> dict[str, Any]:
    """The request of `plb_chat_render`, checked."""
    for name, value in options.items():
        if name not in ChatOptions.__annotations__:
            raise unknown_keyword(name, value, ChatOptions.__annotations__)
    request: dict[str, Any] = {"messages": _messages(messages)}
    for name in ("parallel_tool_calls", "enable_thinking", "add_generation_prompt"):
        if name in options:
            request[name] = flag(name, options[name])  # type: ignore[literal-required]
    going_on = options.get("continue_final_message", False)
    if going_on:
        if options.get("add_generation_prompt"):
            limit = "not together with add_generation_prompt"
            raise ArgumentError("continue_final_message", going_on, limit)
        if going_on is not True:
            choice("continue_final_message", going_on, ("content", "reasoning_content"))
        if request["messages"][-1]["role"] != "assistant":
            raise ArgumentError("continue_final_message", going_on, "the last message is no answer")
        request |= {"continue_final_message": going_on, "add_generation_prompt": False}
    if "reasoning_format" in options:
        request["reasoning_format"] = choice(
            "reasoning_format", options["reasoning_format"], REASONING_FORMATS
        )
    schema = options.get("json_schema")
    if schema is not None:
        request["json_schema"] = json.loads(schema) if isinstance(schema, str) else schema
        check_schema("json_schema", request["json_schema"])
    kwargs = options.get("template_kwargs", {})
    if not isinstance(kwargs, Mapping):
        raise ArgumentError("template_kwargs", kwargs, "a mapping of names to values")
    if given := [name for name in GIVEN if name in kwargs]:
        limit = f"{given[0]} is given to every template, and has a place of its own"
        raise ArgumentError("template_kwargs", kwargs, limit)
    check_nesting("template_kwargs", kwargs)
    request["template_kwargs"] = {**DEFAULT_KWARGS, **kwargs}
    tools = options.get("tools")
    if tools:
        request["tools"], request["tool_choice"] = _tools(tools, options.get("tool_choice", "auto"))
    elif (wanted := options.get("tool_choice", "auto")) not in ("auto", "none"):
        raise ArgumentError("tool_choice", wanted, "needs tools")
    return request


def _messages(messages: object) -> list[Message]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
        raise ArgumentError("messages", messages, 'a list of {"role": ..., "content": ...}')
    listed = list(messages)
    if not listed:
        raise ArgumentError("messages", listed, "at least one")
    check_nesting("messages", listed)
    for i, message in enumerate(listed):
        name = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ArgumentError(name, message, 'must be {"role": ..., "content": ...}')
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ArgumentError(f"{name}.role", role, 'a text, as "user", "assistant" or "system"')
        content = message.get("content")
        if content is None and not (role == "assistant" and message.get("tool_calls")):
            raise ArgumentError(f"{name}.content", content, "must be a string")
        _check_content(f"{name}.content", content)
        _check_calls(f"{name}.tool_calls", message.get("tool_calls"))
    return listed


def _check_content(name: str, content: object) -> None:
    if isinstance(content, str):
        if "\0" in content:
            raise ArgumentError(name, content, "must not contain a NUL character")
    elif isinstance(content, Sequence):
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else part
            if kind != "text":
                limit = 'a text part, {"type": "text", "text": ...}: this model reads text only'
                raise ArgumentError(f"{name}[{i}].type", kind, limit)
            if not isinstance(part.get("text"), str):
                raise ArgumentError(f"{name}[{i}].text", part.get("text"), "must be a string")
            _check_content(f"{name}[{i}].text", part["text"])
    elif content is not None:
        raise ArgumentError(name, content, "must be a string, or a list of text parts")


def _check_calls(name: str, calls: object) -> None:
    """Arguments are JSON in a text: templates write them out level by level."""
    for i, call in enumerate(calls if isinstance(calls, Sequence) else ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            check_nesting_of_text(f"{name}[{i}].function.arguments", arguments)


def _tools(tools: object, tool_choice: object) -> tuple[list[Mapping[str, Any]], str]:
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise ArgumentError("tools", tools, 'a list of {"type": "function", "function": {...}}')
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise ArgumentError(
                f"tools[{i}]", tool, 'must be {"type": "function", "function": ...}'
            )
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise ArgumentError(f"tools[{i}].function.name", function.get("name"), "a name")
        check_length(f"tools[{i}].function.name", function["name"], NAME_MAX, "a name")
        parameters = function.get("parameters", {})
        if not isinstance(parameters, Mapping):
            raise ArgumentError(f"tools[{i}].function.parameters", parameters, "a JSON schema")
        check_schema(f"tools[{i}].function.parameters", parameters)
    listed: list[Mapping[str, Any]] = list(tools)
    if isinstance(tool_choice, Mapping):
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        chosen = [tool for tool in listed if tool["function"]["name"] == name]
        if not chosen:
            names = ", ".join(tool["function"]["name"] for tool in listed)
            raise ArgumentError("tool_choice", tool_choice, f"a function of tools: {names}")
        return chosen, "required"
    return listed, choice("tool_choice", tool_choice, ("auto", "none", "required"))
