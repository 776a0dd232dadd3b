"""Anthropic's `/v1/messages`."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

import orjson
from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from ..engine.results import Chunk, Result
from ..engine.stream import Stream
from ..llama.chat import ChatOptions
from ..llama.chat_message import ChatDelta
from ..llama.json_limits import check_nesting
from . import bodies
from .answer import Answer, named_event, respond
from .bodies import Body, JsonSchema, ResponseFormat, SamplingBody
from .conversation import (
    Block,
    BlockEvent,
    Blocks,
    Turn,
    blocks_of,
    checked,
    part_of,
    rest_of,
    text_of,
    turn_of,
)
from .errors import ApiError, invalid, json_response
from .service import Service
from .tokens import prompt_usage

STAMP = re.compile(r"\A(x-anthropic-billing-header:[^\n]*?\bcch=)[^;\n]+")
"""Of Claude Code, another one in each request: nothing behind it would be cached. llama-server
writes the same over it."""


def unstamped(system: Any) -> Any:
    """A text, or blocks, with the same stamp in each request."""
    match system:
        case str():
            return STAMP.sub(r"\1fffff", system)
        case [{"text": text} as first, *more]:
            return [{**first, "text": unstamped(text)}, *more]
    return system


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: OutputFormat | None = None
    effort: str | None = None


class MessagesBody(SamplingBody):
    """`messages` of roles user and assistant; the system's text is `system`."""

    NAMES: ClassVar = {"stop": "stop_sequences", "response_format": "output_config.format"}

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    n: Literal[1] = 1
    system: str | list[dict[str, Any]] = ""
    stop_sequences: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None


async def messages(service: Service, request: Request) -> Response:
    """An answer as a list of content blocks."""
    body = await bodies.read(request, MessagesBody)
    if body.max_tokens is None:
        raise invalid("max_tokens", None, "missing")
    if body.stop is not None:
        raise invalid("stop", body.stop, "is stop_sequences here")
    body.stop = body.stop_sequences
    turn = await _read_turn(service, body)
    prepared = await service.submit(body, [turn.prompt])
    make = partial(MessagesAnswer, service, body, turn)
    return await respond(service, request, make, prepared.streams, stream=body.stream)


async def count_tokens(service: Service, request: Request) -> Response:
    """How many tokens the prompt of these messages has."""
    body = await bodies.read(request, MessagesBody)
    turn = await _read_turn(service, body)
    tokens = await service.apart(lambda: service.tokens(turn.prompt))
    return json_response({"input_tokens": len(tokens)})


async def _read_turn(service: Service, body: MessagesBody) -> Turn:
    """Apart where it may take long."""
    if body.output_config is not None and body.output_config.format is not None:
        schema = JsonSchema(schema=body.output_config.format.schema_)
        body.response_format = ResponseFormat(type="json_schema", json_schema=schema)
    return await service.run(lambda: _turn(service, body), long=body.makes_long_turn)


def _turn(service: Service, body: MessagesBody) -> Turn:
    tools = [_tool(i, tool) for i, tool in enumerate(body.tools or ())]
    options: ChatOptions = {"tools": tools, "tool_choice": _choice(body.tool_choice)}
    options["json_schema"] = body.schema_wanted()
    if (body.tool_choice or {}).get("disable_parallel_tool_use"):
        options["parallel_tool_calls"] = False
    if body.thinking is not None:
        options["enable_thinking"] = body.thinking.get("type") != "disabled"
    return turn_of(service, messages_of(body), options)


def _tool(i: int, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type") or "custom"
    if kind != "custom":  # of which Anthropic's models know what they take, and which run there
        raise invalid(f"tools[{i}].type", kind, "must be custom, with an input_schema")
    function = {
        "name": tool.get("name"),
        "description": tool.get("description", ""),
        "parameters": tool.get("input_schema", {}),
    }
    return {"type": "function", "function": function}


def _choice(given: dict[str, Any] | None) -> str | dict[str, Any]:
    match (given or {}).get("type", "auto"):
        case "tool":
            return {"type": "function", "function": {"name": (given or {}).get("name")}}
        case "any":
            return "required"
        case "auto" | "none" as word:
            return str(word)
        case kind:
            raise invalid("tool_choice.type", kind, "must be one of auto, any, tool, none")


def messages_of(body: MessagesBody) -> list[dict[str, Any]]:
    """The conversation in the form of chat completions."""
    found: list[dict[str, Any]] = []
    if body.system:
        found.append({"role": "system", "content": text_of("system", unstamped(body.system))})
    for i, message in enumerate(body.messages):
        role, content = message.get("role"), message.get("content")
        if content == [] and role != "assistant":
            raise invalid(f"messages[{i}].content", content, "at least one block")
        if not isinstance(content, list):
            found.append(checked(f"messages[{i}]", {"role": role, "content": content}))
            continue
        made = _of_blocks(f"messages[{i}].content", role, content)
        found += [checked(f"messages[{i}]", one) for one in made]
    return found


def _of_blocks(name: str, role: Any, content: Sequence[Any]) -> list[dict[str, Any]]:
    """Results of tools are messages of their own. Whether the model sees its former thoughts is
    the template's to say."""
    parts: list[dict[str, str]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for block in content:
        match block.get("type") if isinstance(block, dict) else None:
            case "text":
                parts.append(part_of(name, block))
            case "tool_use":
                given = block.get("input", {})
                check_nesting(f"{name}.input", given)
                arguments = orjson.dumps(given).decode()
                function = {"name": block.get("name"), "arguments": arguments}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "tool_result":
                said = text_of(name, block.get("content") or "")
                call = {"role": "tool", "tool_call_id": block.get("tool_use_id")}
                results.append({**call, "content": said})
            case "thinking":
                thoughts.append(text_of(f"{name}.thinking", block.get("thinking")))
            case "redacted_thinking":
                pass
            case "image":
                raise invalid(name, "image", "image input is not supported")
            case kind:
                raise invalid(name, kind, "must be text, tool_use or tool_result")
    if not parts and not calls and not thoughts:
        return results
    message: dict[str, Any] = {"role": role, "content": parts or ""}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [*results, message]


class MessagesAnswer(Answer):
    def __init__(self, service: Service, body: MessagesBody, turn: Turn) -> None:
        self._turn = turn
        self._reader = turn.reader()
        self._blocks = Blocks()
        self._stops = body.stop_sequences or ()
        self._counts: tuple[int, int] | None = None  # of its prompt, once the answer has begun
        self._head = {
            "id": f"msg_{uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": body.model or service.model_name,
        }

    def whole(self, results: Sequence[Result]) -> Any:
        (result,) = results
        blocks = blocks_of(self._turn, result)
        content = [_content(block) for block in blocks]
        usage = _usage(*prompt_usage([result]), result.n_generated)
        ended = _ended(result, blocks, self._stops)
        return {**self._head, "content": content, **ended, "usage": usage}

    def _start(self, n_prompt: int, n_cached: int) -> bytes:
        """The first event: it says how many tokens were cached."""
        if self._counts is not None:
            return b""
        self._counts = n_prompt, n_cached
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._head, **nothing, "usage": _usage(*self._counts, 0)}
        return _event("message_start", message=message)

    def chunk(self, i: int, stream: Stream, chunk: Chunk) -> bytes:
        return self._start(stream.n_prompt, stream.n_cached) + self._events(
            self._reader.feed(chunk.text)
        )

    def finish(self, i: int, result: Result) -> bytes:
        left = self._start(*prompt_usage([result]))
        left += self._events(rest_of(self._turn, self._reader, result))
        left += b"".join(map(_block_event, self._blocks.close()))
        ended = _ended(result, self._blocks.all, self._stops)
        usage = _usage(*(self._counts or (0, 0)), result.n_generated)
        return left + _event("message_delta", delta=ended, usage=usage)

    def end(self, results: Sequence[Result]) -> bytes:
        return _event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        return _event("error", error=error.error)

    def _events(self, delta: ChatDelta) -> bytes:
        return b"".join(map(_block_event, self._blocks.feed(delta)))


def _usage(n_prompt: int, n_cached: int, n_generated: int) -> dict[str, Any]:
    return {
        "input_tokens": n_prompt - n_cached,
        "cache_read_input_tokens": n_cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": n_generated,
    }


def _event(name: str, **values: Any) -> bytes:
    return named_event(name, {"type": name, **values})


def _block_event(event: BlockEvent) -> bytes:
    what, block, text = event
    if what == "open":
        return _event("content_block_start", index=block.index, content_block=_content(block))
    if what == "close":
        return _event("content_block_stop", index=block.index)
    delta = {
        "text": {"type": "text_delta", "text": text},
        "reasoning": {"type": "thinking_delta", "thinking": text},
        "tool": {"type": "input_json_delta", "partial_json": text},
    }[block.kind]
    return _event("content_block_delta", index=block.index, delta=delta)


def _content(block: Block) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text", "text": block.text}
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "tool":
            return {
                "type": "tool_use",
                "id": block.id,
                "name": block.name,
                "input": _input(block.text),
            }


def _input(arguments: str) -> Any:
    """{} where they are not complete: the answer was cut off, or they are still to come."""
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}


def _ended(result: Result, blocks: Sequence[Block], stops: Sequence[str]) -> dict[str, Any]:
    """A stop word of the template's own is an end like any other."""
    word = result.stop if isinstance(result.stop, str) and result.stop in stops else None
    if word is not None:
        reason = "stop_sequence"
    elif result.finish_reason != "stop":
        reason = "max_tokens"
    else:
        reason = "tool_use" if any(block.kind == "tool" for block in blocks) else "end_turn"
    return {"stop_reason": reason, "stop_sequence": word}
