"""Chats: messages to a prompt, and an answer's text to its parts, for all interfaces.

`turn_of` is the one place that knows how. Interfaces translate their messages to OpenAI's, and the
parts of an answer from `ChatDelta`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..engine.chat import end, rendered
from ..engine.results import Result
from ..llama.chat import ChatOptions, ChatPrompt
from ..llama.chat_message import ChatDelta, MessageReader
from .errors import invalid
from .service import Service

ROLES = ("system", "developer", "user", "assistant", "tool")
FREE = (None, "auto", "none")
"""Values of tool_choice with which an answer may be a text."""
TEXT_PARTS = ("text", "input_text", "output_text", "reasoning_text", "refusal")


class PlainReader:
    """Of an answer that is all content."""

    def feed(self, text: str) -> ChatDelta:
        """What `text` adds."""
        return ChatDelta(text)


@dataclass(frozen=True)
class Turn:
    """A prompt, and how its answer is read. `plain`: it is all content."""

    prompt: ChatPrompt
    plain: bool

    def reader(self) -> PlainReader | MessageReader:
        """For one answer."""
        return PlainReader() if self.plain else self.prompt.reader()


def turn_of(service: Service, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> Turn:
    """The turn that answers these messages, which are `checked`, and in OpenAI's form, as its
    tools are. An answer at their end goes on, as in llama-server and with Anthropic's models,
    unless the options say otherwise, or want JSON or a call: it need not be the start of one."""
    free = options.get("json_schema") is None and options.get("tool_choice") in FREE
    if messages and free and is_begun(messages[-1]) and "add_generation_prompt" not in options:
        options.setdefault("continue_final_message", True)
    if service.options.thinking is not None:
        options.setdefault("enable_thinking", service.options.thinking)
    template = service.vocab.chat_template(service.options.chat_template)
    return Turn(*rendered(template, messages, options))


def set_effort(options: ChatOptions, effort: object) -> None:
    """OpenAI's effort of reasoning: a variable of the template, or "none", as in llama-server."""
    kwargs = {**options.get("template_kwargs", {}), "reasoning_effort": effort}
    if effort == "none":
        del kwargs["reasoning_effort"]
        options["enable_thinking"] = False
    options["template_kwargs"] = kwargs


def is_begun(message: Mapping[str, Any]) -> bool:
    """An answer that can go on: it has a text, or thoughts, and no calls."""
    if message["role"] != "assistant" or message.get("tool_calls"):
        return False
    content = message["content"]
    parts = content if isinstance(content, list) else [{"text": content}]
    return bool(message.get("reasoning_content")) or any(part["text"] for part in parts)


def checked(name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose role is known and whose content is a text or parts. `name`: for errors."""
    role = message.get("role")
    if role not in ROLES:
        raise invalid(f"{name}.role", role, f"must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant":
        return {**message, "content": None if message.get("tool_calls") else ""}
    return {**message, "content": content_of(f"{name}.content", content)}


def content_of(name: str, content: object) -> str | list[dict[str, str]]:
    """A text, or its parts: the template joins them, or llama.cpp does for it."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(name, content, "must be a text or a list of parts")
    return [part_of(name, part) for part in content]


def part_of(name: str, part: object) -> dict[str, str]:
    """A part with a text, as llama.cpp has it."""
    kind, text = part, None
    if isinstance(part, dict):
        kind, text = part.get("type"), part.get("text", part.get("refusal"))
    if kind not in TEXT_PARTS:
        raise invalid(name, kind, "only parts of type text are supported")
    if not isinstance(text, str):
        raise invalid(name, part, 'a part of type text needs a "text"')
    return {"type": "text", "text": text}


def text_of(name: str, content: object) -> str:
    """A text, or the texts of its parts, where llama-server joins them before the template."""
    found = content_of(name, content)
    return found if isinstance(found, str) else "".join(part["text"] for part in found)


def rest_of(turn: Turn, reader: PlainReader | MessageReader, result: Result) -> ChatDelta:
    """What the end of an answer adds. One that was cut off need not be what the format allows."""
    return ChatDelta() if isinstance(reader, PlainReader) else end(reader, turn.prompt, result)


# -- answers that are lists of blocks (Responses, Messages)

Kind = Literal["reasoning", "text", "tool"]


@dataclass
class Block:
    """A part of an answer. `text`: of a tool call, its arguments as JSON."""

    index: int
    kind: Kind
    text: str = ""
    name: str = ""
    id: str = ""


class BlockEvent(NamedTuple):
    """A block opens, grows by `text`, or is complete."""

    what: Literal["open", "grow", "close"]
    block: Block
    text: str = ""


class Blocks:
    """Cuts an answer into blocks, one open at a time."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None
        self._calls: dict[int, Block] = {}

    def feed(self, delta: ChatDelta) -> Iterator[BlockEvent]:
        """What more of the answer does to them."""
        if delta.reasoning_content:
            yield from self._grow("reasoning", delta.reasoning_content)
        if delta.content:
            yield from self._grow("text", delta.content)
        for call in delta.tool_calls:
            if call.index not in self._calls:
                yield from self.close()
                block = self._calls[call.index] = self._add("tool")
                block.name, block.id = call.name, call.id
                yield BlockEvent("open", block)
            block = self._calls[call.index]
            block.text += call.arguments
            yield BlockEvent("grow", block, call.arguments)

    def close(self) -> Iterator[BlockEvent]:
        """The open one is complete."""
        if self._open is not None:
            block, self._open = self._open, None
            yield BlockEvent("close", block)

    def _grow(self, kind: Kind, text: str) -> Iterator[BlockEvent]:
        block = self._open
        if block is None or block.kind != kind:
            yield from self.close()
            block = self._add(kind)
            yield BlockEvent("open", block)
        block.text += text
        yield BlockEvent("grow", block, text)

    def _add(self, kind: Kind) -> Block:
        self._open = block = Block(len(self.all), kind)
        self.all.append(block)
        return block


def blocks_of(turn: Turn, result: Result) -> list[Block]:
    """Those of a whole answer; one empty text where there is nothing."""
    blocks, reader = Blocks(), turn.reader()
    for delta in (reader.feed(result.text), rest_of(turn, reader, result)):
        for _ in blocks.feed(delta):
            pass
    return blocks.all or [Block(0, "text")]
