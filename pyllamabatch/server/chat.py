"""OpenAI's `/v1/chat/completions`."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, cast

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from ..engine.results import Chunk, Result, Token
from ..engine.stream import Stream
from ..errors import ArgumentError
from ..llama.chat import ChatOptions
from ..llama.chat_message import ChatDelta, ToolCallDelta
from . import bodies, tokens
from .answer import respond
from .bodies import SamplingBody
from .conversation import Turn, blocks_of, checked, rest_of, set_effort, turn_of
from .errors import invalid, json_response
from .openai_answer import OpenAIAnswer
from .service import Prepared, Service


class ChatBody(SamplingBody):
    """`logprobs`: of each token, with `top_logprobs` of the most likely ones beside it."""

    NAMES: ClassVar = {"logprobs": "top_logprobs", "template_kwargs": "chat_template_kwargs"}

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    reasoning_format: Literal["none", "auto", "deepseek", "deepseek-legacy"] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | Literal["content", "reasoning_content"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None


async def chat_completions(service: Service, request: Request) -> Response:
    body = await bodies.read(request, ChatBody)
    turn = await read_turn(service, body)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", body.top_logprobs, "needs logprobs: true")
    n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    prepared = await service.submit(body, [turn.prompt], n_logprobs)
    make = partial(ChatAnswer, service, body, prepared, turn)
    return await respond(service, request, make, prepared.streams, stream=body.stream)


async def input_tokens(service: Service, request: Request) -> Response:
    """How many tokens the prompt of a chat has."""
    turn = await read_turn(service, await bodies.read(request, ChatBody))
    tokens = await service.apart(lambda: service.tokens(turn.prompt))
    return json_response({"object": "response.input_tokens", "input_tokens": len(tokens)})


async def read_turn(service: Service, body: ChatBody) -> Turn:
    """As `chat_turn`, apart where that may take long."""
    return await service.run(lambda: chat_turn(service, body), long=body.makes_long_turn)


def chat_turn(service: Service, body: ChatBody) -> Turn:
    """The prompt of its messages and tools."""
    names = (
        "tools", "tool_choice", "parallel_tool_calls", "reasoning_format",
        "continue_final_message", "add_generation_prompt",
    )  # fmt: skip
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    options = cast("ChatOptions", given)
    kwargs = dict(body.chat_template_kwargs)
    if "enable_thinking" in kwargs:
        options["enable_thinking"] = kwargs.pop("enable_thinking")
    options["template_kwargs"] = kwargs
    if body.reasoning_effort:
        set_effort(options, body.reasoning_effort)
    options["json_schema"] = body.schema_wanted()
    messages = [checked(f"messages[{i}]", message) for i, message in enumerate(body.messages)]
    try:
        return turn_of(service, messages, options)
    except ArgumentError as error:
        raise body.named(error) from None


class ChatAnswer(OpenAIAnswer):
    def __init__(self, service: Service, body: ChatBody, prepared: Prepared, turn: Turn) -> None:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        super().__init__(service, body, prepared, id="chatcmpl", kind=kind)
        self._turn = turn
        self._n = n = len(prepared.streams)
        self._readers = [turn.reader() for _ in range(n)]
        self._called = [False] * n
        self._with_logprobs = body.logprobs
        self._plain = turn.plain and not body.logprobs

    def _choice(self, i: int, result: Result) -> dict[str, Any]:
        message, reason = message_of(self._turn, result), tokens.finish_reason(result)
        if "tool_calls" in message and reason == "stop":
            reason = "tool_calls"
        logprobs = self._logprobs(tokens.tokens_of(result))
        return {"message": message, "logprobs": logprobs, "finish_reason": reason}

    def begin(self) -> bytes:
        delta = {"role": "assistant", "content": None}
        return b"".join(self._event(i, choice_of(delta), 0) for i in range(self._n))

    def chunk(self, i: int, stream: Stream, chunk: Chunk) -> bytes:
        delta = self._delta(i, self._readers[i].feed(chunk.text))
        logprobs = self._logprobs(stream.between(chunk.start, chunk.stop))
        if not delta and not logprobs:
            return b""
        choice = choice_of(delta, logprobs=logprobs)
        return self._event(i, choice, chunk.stop, **self._timings(stream))

    def _no_choice(self) -> dict[str, Any]:
        return choice_of({"role": "assistant", "content": None})

    def _text_choice(self, text: str) -> dict[str, Any]:
        return choice_of({"content": text})

    def finish(self, i: int, result: Result) -> bytes:
        delta = self._delta(i, rest_of(self._turn, self._readers[i], result))
        reason = tokens.finish_reason(result)
        if self._called[i] and reason == "stop":
            reason = "tool_calls"
        n = result.n_generated
        left = self._event(i, choice_of(delta), n) if delta else b""
        return left + self._event(i, choice_of({}, reason), n, timings=tokens.timings(result))

    def _delta(self, i: int, new: ChatDelta) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if new.reasoning_content:
            delta["reasoning_content"] = new.reasoning_content
        if new.content:
            delta["content"] = new.content
        if new.tool_calls:
            self._called[i] = True
            delta["tool_calls"] = [_call_delta(call) for call in new.tool_calls]
        return delta

    def _logprobs(self, of: Sequence[Token]) -> Any:
        if not self._with_logprobs:
            return None
        return {"content": tokens.chat_logprobs(of, self._service.piece)}


def choice_of(
    delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    """A choice of an event, without its index."""
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def message_of(turn: Turn, result: Result) -> dict[str, Any]:
    """A whole answer as OpenAI's message."""
    blocks = blocks_of(turn, result)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "".join(block.text for block in blocks if block.kind == "text"),
        "refusal": None,
    }
    if thoughts := "".join(block.text for block in blocks if block.kind == "reasoning"):
        message["reasoning_content"] = thoughts
    calls = [block for block in blocks if block.kind == "tool"]
    if calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.text},
            }
            for call in calls
        ]
    return message


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
