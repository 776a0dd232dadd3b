"""What a model answered in a chat: content, reasoning and tool calls, whole or piece by piece."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyllamabatch.errors import ChatParseError

OFTEN = 2048


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants to be called. `arguments`: JSON text. `id`: "" where the
    model's format has none."""

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """An answer, in the parts that its model's format has."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, parsed: Mapping[str, Any]) -> ChatMessage:
        """From a message in OpenAI's words."""
        calls = parsed.get("tool_calls") or ()
        return cls(
            parsed.get("content") or "",
            parsed.get("reasoning_content") or "",
            tuple(
                ToolCall(
                    call["function"]["name"], call["function"]["arguments"], call.get("id", "")
                )
                for call in calls
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """In OpenAI's words: the next turn's `messages` may have it as it is."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                    **({"id": call.id} if call.id else {}),
                }
                for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of tool call number `index`. `name` and `id` are in the first one of each call only."""

    index: int
    arguments: str
    name: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What a piece of text adds to a message. False when that is nothing."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning_content or self.tool_calls)


class MessageReader:
    """Reads an answer that arrives piece by piece.

        reader = prompt.reader()
        for text in stream.text_stream():
            delta = reader.feed(text)
        delta = reader.feed("", last=True)

    `message`: what there is so far. Every tool call gets an id. What the deltas have said is never
    taken back. A parser reads the whole text each time: of one that is longer than `OFTEN`
    characters it is read again once it has grown by a 64th, and at `now` or `last`."""

    def __init__(self, parse: Callable[[str, bool], ChatMessage]) -> None:
        self._parse = parse
        self._text = ""
        self._n_read = 0  # characters of the text that `message` is of
        self._ids: list[str] = []
        self._said = self.message = self._parsed(partial=True)  # of an answer that is continued

    @property
    def text(self) -> str:
        """All text so far."""
        return self._text

    def feed(self, text: str, *, now: bool = False, last: bool = False) -> ChatDelta:
        """What `text` adds. now: nothing of it waits for more. last: no more will come; raises
        `ChatParseError` when the whole is not what the format allows."""
        self._text += text
        n = len(self._text)
        if not (now or last) and n - self._n_read < max(1, (n - OFTEN) // 64):
            return ChatDelta()
        self._n_read = n
        try:
            self.message = self._parsed(partial=not last)
        except ChatParseError:
            if last:
                raise  # else more text may make it one again
        said, message = self._said, self.message
        content = added(said.content, message.content)
        reasoning = added(said.reasoning_content, message.reasoning_content)
        calls, deltas = self._call_deltas(last)
        self._said = ChatMessage(
            said.content + content, said.reasoning_content + reasoning, tuple(calls)
        )
        return ChatDelta(content, reasoning, tuple(deltas))

    def _parsed(self, partial: bool) -> ChatMessage:
        message = self._parse(self._text, partial)
        calls = []
        for i, call in enumerate(message.tool_calls):
            if i == len(self._ids):
                self._ids.append(call.id or secrets.token_urlsafe(24))
            calls.append(replace(call, id=self._ids[i]))
        return replace(message, tool_calls=tuple(calls))

    def _call_deltas(self, last: bool) -> tuple[list[ToolCall], list[ToolCallDelta]]:
        """A name may still grow while there are no arguments: it is said with the first of them, or
        when another call begins."""
        said, calls = list(self._said.tool_calls), self.message.tool_calls
        deltas: list[ToolCallDelta] = []
        for i, call in enumerate(calls):
            if i < len(said):
                more = added(said[i].arguments, call.arguments)
                if more:
                    deltas.append(ToolCallDelta(i, more))
                    said[i] = replace(said[i], arguments=said[i].arguments + more)
            elif call.name and (call.arguments or last or i + 1 < len(calls)):
                deltas.append(ToolCallDelta(i, call.arguments, call.name, call.id))
                said.append(call)
            else:
                break
        return said, deltas


def added(old: str, new: str) -> str:
    """What `new` has behind `old`; "" where it has become another text."""
    return new[len(old) :] if new.startswith(old) else ""
