"""What a model answered in a chat: content, reasoning and tool calls, whole or piece by piece."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from pyllamabatch.errors import ChatParseError

READINGS = 256
SPARE = 8192
Part = Literal["content", "reasoning_content"]


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

    `markers`: content and thoughts end before one of these only. Every tool call gets an id. What
    the deltas have said is never taken back.

    A parser reads the whole text each time. Content and thoughts grow without it, up to what may be
    a marker. Else text waits, but not at `now` or `last`, until the characters of all readings are
    at most `READINGS` times those of the text and `SPARE` more."""

    def __init__(
        self, parse: Callable[[str, bool], ChatMessage], markers: tuple[str, ...] = ()
    ) -> None:
        self._parse = parse
        self._marker = pattern_of(markers)
        self._text = ""
        self._n_said = 0  # characters of the text that were read, or have grown a part
        self._n_read = 0  # characters, of all readings
        self._growing: Part | None = None
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
        marker = self._marker.search(self._text, self._n_said)
        if not (now or last):
            if self._growing and (marker is None or marker["whole"] is None):
                return self._grown(self._growing, n if marker is None else marker.start())
            if self._n_read + n > READINGS * (n + SPARE):
                return ChatDelta()
        new, self._n_said = self._text[self._n_said :], n
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
        grown: dict[tuple[str, str], Part] = {
            (new, ""): "content", ("", new): "reasoning_content",
        }  # fmt: skip
        self._growing = grown.get((content, reasoning)) if new and marker is None else None
        return ChatDelta(content, reasoning, tuple(deltas))

    def _grown(self, part: Part, end: int) -> ChatDelta:
        """It has the characters of the text before this one."""
        new, self._n_said = self._text[self._n_said : end], end
        self._said = longer(self._said, part, new)
        self.message = longer(self.message, part, new)
        return ChatDelta(new) if part == "content" else ChatDelta(reasoning_content=new)

    def _parsed(self, partial: bool) -> ChatMessage:
        self._n_read += len(self._text)
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


def longer(message: ChatMessage, part: Part, new: str) -> ChatMessage:
    return replace(message, **{part: getattr(message, part) + new})


@lru_cache(maxsize=256)
def pattern_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the first marker, group "whole", or what a text ends with that may become one."""
    if not markers:
        return re.compile("(?P<whole>(?!))")
    whole = "|".join(map(re.escape, markers))
    begun = "|".join(re.escape(m[:n]) for m in markers for n in range(1, len(m)))
    first = "".join(re.escape(marker[0]) for marker in markers)
    return re.compile(f"(?=[{first}])(?:(?P<whole>{whole})|(?:{begun or '(?!)'})\\Z)")


def added(old: str, new: str) -> str:
    """What `new` has behind `old`; "" where it has become another text."""
    return new[len(old) :] if new.startswith(old) else ""
