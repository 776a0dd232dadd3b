"""OpenAI's `/v1/responses`, without a store: a conversation is sent whole each time."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from ..engine.results import Chunk, PromptProgress, Result, Token
from ..engine.stream import Stream
from ..errors import ArgumentError
from ..llama.chat import ChatOptions
from ..llama.chat_message import ChatDelta
from . import bodies, tokens
from .answer import Answer, named_event, respond
from .bodies import Body, JsonSchema, ResponseFormat, SamplingBody
from .conversation import (
    Block,
    BlockEvent,
    Blocks,
    Turn,
    blocks_of,
    checked,
    content_of,
    rest_of,
    set_effort,
    text_of,
    turn_of,
)
from .errors import ApiError, invalid, json_response
from .service import Service

LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    # of what there is not, or OpenAI's store has
    "reasoning.encrypted_content", "message.input_image.image_url", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
]  # fmt: skip


DETAILS = {"incomplete": {"reason": "max_output_tokens"}}


class TextFormat(JsonSchema):
    """`JsonSchema` is flat here."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesBody(SamplingBody):
    """`input`: a text, or the items of a conversation. `top_logprobs`: so many of the most likely
    tokens beside each, where `include` asks for log-probabilities."""

    NAMES: ClassVar = {"logprobs": "top_logprobs", "response_format": "text.format"}

    input: str | list[dict[str, Any]]
    n: Literal[1] = 1
    instructions: str = ""
    max_output_tokens: Annotated[int, Field(ge=0)] | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    include: list[Include] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: Literal[False] = False
    top_logprobs: Annotated[int, Field(ge=0)] = 0

    @property
    def n_logprobs(self) -> int | None:
        """Of the most likely tokens; None without log-probabilities."""
        return self.top_logprobs if LOGPROBS in (self.include or ()) else None

    def name_of(self, field: str) -> str:
        """Tools are flat here, and those that are left out have a place as well."""
        if (found := re.match(r"tools\[(\d+)\](\.function)?", field)) is None:
            return super().name_of(field)
        places = [i for i, tool in enumerate(self.tools or ()) if tool["type"] == "function"]
        return f"tools[{places[int(found[1])]}]{field[found.end() :]}"


async def responses(service: Service, request: Request) -> Response:
    """An answer as a list of output items."""
    body = await bodies.read(request, ResponsesBody)
    turn = await _read_turn(service, body)
    if body.max_output_tokens is not None:
        body.max_tokens = body.max_output_tokens
    if body.top_logprobs and body.n_logprobs is None:
        raise invalid("top_logprobs", body.top_logprobs, f'needs include: ["{LOGPROBS}"]')
    if body.n_logprobs is not None and not turn.plain:
        limit = "only of an answer without tools, by a template that can't think"
        raise invalid("include", LOGPROBS, limit)
    prepared = await service.submit(body, [turn.prompt], body.n_logprobs)
    make = partial(ResponsesAnswer, service, body, turn)
    return await respond(service, request, make, prepared.streams, stream=body.stream)


async def response_tokens(service: Service, request: Request) -> Response:
    """How many tokens the prompt of an input has."""
    turn = await _read_turn(service, await bodies.read(request, ResponsesBody))
    found = await service.apart(lambda: service.tokens(turn.prompt))
    return json_response({"object": "response.input_tokens", "input_tokens": len(found)})


async def _read_turn(service: Service, body: ResponsesBody) -> Turn:
    """Apart where that may take long."""
    format = body.text.format if body.text else None
    if format is not None and format.type != "text":
        schema = JsonSchema(name=format.name, schema=format.schema_)
        wrapped = schema if format.type == "json_schema" else None
        body.response_format = ResponseFormat(type=format.type, json_schema=wrapped)
    make_turn = partial(turn_of, service, messages_of(body), options_of(body))
    try:
        return await service.run(make_turn, long=body.makes_long_turn)
    except ArgumentError as error:
        raise body.named(error) from None


def options_of(body: ResponsesBody) -> ChatOptions:
    options: ChatOptions = {"tool_choice": _choice(body.tool_choice)}
    options["json_schema"] = body.schema_wanted()
    options["tools"] = _functions(body.tools or ())
    if body.parallel_tool_calls is not None:
        options["parallel_tool_calls"] = body.parallel_tool_calls
    if body.reasoning and body.reasoning.get("effort"):
        set_effort(options, body.reasoning["effort"])
    return options


def messages_of(body: ResponsesBody) -> list[dict[str, Any]]:
    """The conversation in the form of chat completions."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        match item.get("type", "message"):
            case "message":
                message = {"role": item.get("role"), "content": item.get("content")}
                message = checked(f"input[{i}]", message)
                begun = messages[-1] if messages else {}
                if begun.get("role") == message["role"] and begun["content"] is None:
                    begun["content"] = message["content"]
                else:
                    messages.append(message)
            case "reasoning":
                name = f"input[{i}].content"
                if thoughts := text_of(name, item.get("content") or ""):  # one may be encrypted
                    answer = _answer_at_end(messages)
                    answer["reasoning_content"] = answer.get("reasoning_content", "") + thoughts
            case "function_call":
                function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                _answer_at_end(messages).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                call = {"role": "tool", "tool_call_id": item.get("call_id")}
                said = content_of(f"input[{i}].output", item.get("output"))
                messages.append({**call, "content": said})
            case kind:
                raise invalid(f"input[{i}].type", kind, "is not supported")
    if not messages:
        raise invalid("input", body.input, "at least one message")
    return [checked("input", message) for message in messages]


def _answer_at_end(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """What the model thought, said and called is one message."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _functions(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools of other types run at OpenAI, or have no JSON schema. Codex always sends some: they are
    left out, as in llama-server."""
    found: list[dict[str, Any]] = []
    names = ("name", "description", "parameters", "strict")
    for i, tool in enumerate(tools):
        kind = tool.get("type")
        if not isinstance(kind, str):
            raise invalid(f"tools[{i}].type", kind, "must be a text, as function")
        if kind == "function":
            function = {name: tool[name] for name in names if tool.get(name) is not None}
            found.append({"type": "function", "function": function})
    return found


def _choice(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(choice, dict) and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


class ResponsesAnswer(Answer):
    def __init__(self, service: Service, body: ResponsesBody, turn: Turn) -> None:
        self._piece = service.piece
        self._turn = turn
        self._with_logprobs = body.n_logprobs is not None
        self._logprobs: list[dict[str, Any]] = []
        self._n_sent = 0  # of these
        self._timed = body.timings_per_token
        self._timings: dict[str, Any] = {}  # of an event with new text
        self.reports = body.return_progress
        self._reader = turn.reader()
        self._blocks = Blocks()
        self._ids: list[str] = []  # of the items
        self._n_events = 0
        self._status = "completed"  # of a block that is closed
        self._head = {
            "id": f"resp_{uuid4().hex}",
            "object": "response",
            "created_at": service.now(),
            "model": body.model or service.model_name,
            "instructions": body.instructions or None,
            "max_output_tokens": body.max_output_tokens,
            "parallel_tool_calls": body.parallel_tool_calls or False,
            "tool_choice": body.tool_choice,
            "tools": body.tools or [],
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_logprobs": body.top_logprobs,
            "metadata": {},
            "error": None,
            "incomplete_details": None,
        }

    def whole(self, results: Sequence[Result]) -> Any:
        if self._with_logprobs:
            self._look_at(tokens.tokens_of(results[0]))
        return self._complete(results[0], blocks_of(self._turn, results[0]))

    def begin(self) -> bytes:
        return self._event("created", response=self._begun()) + self._in_progress()

    def _begun(self) -> dict[str, Any]:
        return {**self._head, "status": "in_progress", "output": [], "usage": None}

    def _in_progress(self, **more: Any) -> bytes:
        return self._event("in_progress", response=self._begun(), **more)

    def progress(self, i: int, progress: PromptProgress) -> bytes:
        more = {"timings": tokens.prompt_timings(progress)} if self._timed else {}
        return self._in_progress(prompt_progress=tokens.prompt_progress(progress), **more)

    def chunk(self, i: int, stream: Stream, chunk: Chunk) -> bytes:
        if self._timed:
            self._timings = {"timings": tokens.timings(stream.times())}
        if self._with_logprobs:
            self._look_at(stream.between(chunk.start, chunk.stop))
        return self._events(self._reader.feed(chunk.text))

    def finish(self, i: int, result: Result) -> bytes:
        left = self._events(rest_of(self._turn, self._reader, result))
        self._status = status_of(result)
        return left + b"".join(self._block_event(event) for event in self._blocks.close())

    def end(self, results: Sequence[Result]) -> bytes:
        response = self._complete(results[0], self._blocks.all or [Block(0, "text")])
        timings = tokens.timings(results[0])
        return self._event(response["status"], response=response, timings=timings)

    def failed(self, error: ApiError) -> bytes:
        said = {"code": error.error["code"] or "server_error", "message": str(error)}
        response = {**self._head, "status": "failed", "error": said, "output": [], "usage": None}
        return self._event("failed", response=response)

    def _look_at(self, new: Sequence[Token]) -> None:
        self._logprobs += tokens.chat_logprobs(new, self._piece)

    def _events(self, delta: ChatDelta) -> bytes:
        return b"".join(self._block_event(event) for event in self._blocks.feed(delta))

    def _block_event(self, event: BlockEvent) -> bytes:
        what, block, text = event
        where: dict[str, Any] = {"output_index": block.index}
        if what == "open":
            item = self._item(block, "in_progress")
            opened = self._event("output_item.added", **where, item=_empty(item))
            if block.kind != "text":
                return opened
            where |= {"item_id": item["id"], "content_index": 0}
            return opened + self._event("content_part.added", **where, part=_text_part("", []))
        item = self._item(block, self._status)
        where["item_id"] = item["id"]
        if block.kind != "tool":
            where["content_index"] = 0
        name = {"text": "output_text", "reasoning": "reasoning_text"}.get(
            block.kind, "function_call_arguments"
        )
        more: dict[str, Any] = {"logprobs": self._logprobs} if block.kind == "text" else {}
        if what == "grow":
            if block.kind == "text":
                more["logprobs"] = self._logprobs[self._n_sent :]
                self._n_sent = len(self._logprobs)
            return self._event(f"{name}.delta", **where, delta=text, **more, **self._timings)
        if block.kind == "tool":
            done = self._event(f"{name}.done", **where, name=block.name, arguments=block.text)
        else:
            done = self._event(f"{name}.done", **where, text=block.text, **more)
        if block.kind == "text":
            part = _text_part(block.text, self._logprobs)
            done += self._event("content_part.done", **where, part=part)
        return done + self._event("output_item.done", output_index=block.index, item=item)

    def _event(self, what: str, /, **values: Any) -> bytes:
        kind, number = f"response.{what}", self._n_events
        self._n_events += 1
        return named_event(kind, {"type": kind, "sequence_number": number, **values})

    def _complete(self, result: Result, blocks: Sequence[Block]) -> dict[str, Any]:
        output = [self._item(block, "completed") for block in blocks]
        output[-1]["status"] = status = status_of(result)
        (n_prompt, n_cached), n = tokens.prompt_usage([result]), result.n_generated
        thoughts = [block.text for block in blocks if block.kind == "reasoning"]
        n_thoughts = sum(tokens.n_within(text, result.tokens, self._piece) for text in thoughts)
        return {
            **self._head,
            "status": status,
            "incomplete_details": DETAILS.get(status),
            "output": output,
            "usage": {
                "input_tokens": n_prompt,
                "input_tokens_details": {"cached_tokens": n_cached},
                "output_tokens": n,
                "output_tokens_details": {"reasoning_tokens": n_thoughts},
                "total_tokens": n_prompt + n,
            },
        }

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        while len(self._ids) <= block.index:
            self._ids.append(uuid4().hex)
        id = self._ids[block.index]
        match block.kind:
            case "text":
                part = _text_part(block.text, self._logprobs)
                item = {"id": f"msg_{id}", "type": "message", "role": "assistant"}
                return {**item, "status": status, "content": [part]}
            case "reasoning":
                thoughts = {"type": "reasoning_text", "text": block.text}
                return {
                    "id": f"rs_{id}",
                    "type": "reasoning",
                    "summary": [],
                    "content": [thoughts],
                    "status": status,
                }
            case "tool":
                return {
                    "id": f"fc_{id}",
                    "type": "function_call",
                    "call_id": block.id,
                    "name": block.name,
                    "arguments": block.text,
                    "status": status,
                }


def status_of(result: Result) -> str:
    """Of the answer, and of its last item."""
    return "completed" if result.finish_reason == "stop" else "incomplete"


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _empty(item: dict[str, Any]) -> dict[str, Any]:
    """As it opens."""
    empty: dict[str, Any] = (
        {"arguments": ""} if item["type"] == "function_call" else {"content": []}
    )
    return {**item, **empty}
