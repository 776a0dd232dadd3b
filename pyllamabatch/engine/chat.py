"""Chat: from messages to the answer's message, by an engine and its model's own template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

from ..errors import ArgumentError, ChatParseError, unknown_keyword
from ..llama.chat import ChatOptions, ChatPrompt, ChatTemplate, Message
from ..llama.chat_message import ChatDelta, ChatMessage, MessageReader
from ..llama.grammar import Grammar
from ..step.json_schema import schema_text
from ..step.sampling_params import SamplingParams
from .options import Options
from .results import FinishReason, Result
from .stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .engine import Engine


FORMAT = "response-format"
"""The name of a schema's rule begins so, in the grammars of all of llama.cpp's chat parsers."""


class ChatRequest(ChatOptions, Options, total=False):
    """`ChatOptions`, `Options`, and `template`: a chat template instead of the model's."""

    template: str | None


@dataclass(frozen=True, slots=True)
class ChatResult:
    """A finished answer.

    - message: what it says. Its `to_dict()` belongs to the messages of the next turn.
    - finish_reason: a `Result`'s, or "tool_calls" where it ended with some.
    - result: its text, tokens and times."""

    message: ChatMessage
    finish_reason: FinishReason | Literal["tool_calls"]
    result: Result


class Chat:
    """Conversations on an engine: each call is one request.

        answer = engine.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=99))
        print(answer.message.content)
        for delta in engine.chat.submit(messages, tools=tools): ...
        async for delta in engine.chat.stream(messages): ...
        answer = await engine.chat.agenerate(messages)

    The prompt is llama-server's for the same messages (`pyllamabatch.llama.chat`). The grammar that
    tools or a schema need is applied, and what the model's format marks as thoughts or as tool
    calls is read into `reasoning_content` and `tool_calls`. Raises what `Engine.submit` and
    `ChatTemplate.render` raise; ArgumentError for a grammar beside tools, and for a schema beside
    tools, or of an answer that goes on, where the model's format has no place for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        **options: Unpack[ChatRequest],
    ) -> ChatResult:
        """The answer, once it is whole. Raises the request's error."""
        stream = self.submit(messages, params, **options)
        try:
            return stream.result()
        except BaseException:
            stream.cancel()
            raise

    def submit(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        **options: Unpack[ChatRequest],
    ) -> ChatStream:
        """Return at once: an answer to be read as it comes, and as often as one likes."""
        prompt, params, rest = self.prepare(messages, params, options)
        stream = self._engine.submit(prompt, params, **rest)
        return ChatStream(stream, prompt)

    async def stream(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        **options: Unpack[ChatRequest],
    ) -> AsyncGenerator[ChatDelta, None]:
        """For asyncio. Leaving the loop, or cancelling its task, cancels the request."""
        prompt, params, rest = self.prepare(messages, params, options)
        stream = await self._engine.asubmit(prompt, params, **rest)
        reader = prompt.reader()
        async with aclosing(self._engine.chunks(stream)) as chunks:
            async for chunk in chunks:
                if delta := reader.feed(chunk.text):
                    yield delta
        if delta := end(reader, prompt, stream.result()):
            yield delta

    async def agenerate(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        **options: Unpack[ChatRequest],
    ) -> ChatResult:
        """The answer, once it is whole, for asyncio. Cancelling the task cancels the request."""
        prompt, params, rest = self.prepare(messages, params, options)
        (result,) = await self._engine.agenerate([prompt], params, **rest)
        if result.error is not None:
            raise result.error
        return _answer(prompt, result)

    def prepare(
        self, messages: Iterable[Message], params: SamplingParams | None, options: ChatRequest
    ) -> tuple[ChatPrompt, SamplingParams, Options]:
        """What `Engine.submit` takes for such a chat: the prompt, the parameters with the grammar,
        stops and tokens that its answer needs, and the options that are not the template's."""
        chat: dict[str, Any] = {}
        rest: dict[str, Any] = {**options}
        for name in ChatOptions.__annotations__.keys() & rest.keys():
            chat[name] = rest.pop(name)
        template = rest.pop("template", None)
        for name in rest.keys() - Options.__annotations__.keys():
            if name not in SamplingParams.__dataclass_fields__:
                raise unknown_keyword(name, rest[name], ChatRequest.__annotations__)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ArgumentError("params", params, "must be SamplingParams")
        if chat.get("json_schema") is not None:
            params = replace(params, json_schema=chat["json_schema"])
        chat["json_schema"] = params.json_schema
        source = self._engine.model.vocab.chat_template(template)
        prompt, _ = rendered(source, messages, cast("ChatOptions", chat))
        return prompt, with_prompt(params, prompt), cast("Options", rest)


class ChatStream:
    """An answer as it comes: iterating gives `ChatDelta`s, from the first one on each time.

    `stream`: the request's tokens and text. `prompt`: what it answers."""

    def __init__(self, stream: Stream, prompt: ChatPrompt) -> None:
        self.stream = stream
        self.prompt = prompt

    def __iter__(self) -> Iterator[ChatDelta]:
        reader = self.prompt.reader()
        for text in self.stream.text_stream():
            if delta := reader.feed(text):
                yield delta
        if delta := end(reader, self.prompt, self.stream.result()):
            yield delta

    def result(self, timeout: float | None = None) -> ChatResult:
        """The whole answer. Raises the request's error; TimeoutError after `timeout` seconds."""
        return _answer(self.prompt, self.stream.result(timeout))

    def cancel(self) -> bool:
        """As `Stream.cancel`."""
        return self.stream.cancel()


def rendered(
    template: ChatTemplate, messages: Iterable[Message], options: ChatOptions
) -> tuple[ChatPrompt, bool]:
    """The prompt, and whether an answer to it is all content: without tools and thoughts. A schema
    is the whole answer's then, which is for `SamplingParams`, unless the prompt has some of it.
    Raises as `ChatTemplate.render`, and ArgumentError for tools that the template has no place for,
    and for a schema beside tools, or of an answer that goes on, where its grammar has none."""
    tools = options.get("tools") if options.get("tool_choice") != "none" else None
    plain = not tools and not template.supports_thinking
    going_on = options.get("continue_final_message", False)
    schema = None if plain and not going_on else options.get("json_schema")
    options = {**options, "json_schema": None if schema is None else schema_text(schema)}
    prompt = template.render(messages, **options)
    if tools and not template.capabilities["supports_tools"]:
        limit = "the chat template has no place for tools"
        raise ArgumentError("tools", f"{len(tools)} of them", limit)
    if schema is not None:
        grammar = prompt.grammar or Grammar("")
        if tools and options.get("tool_choice", "auto") == "auto" and FORMAT not in grammar.text:
            limit = "not beside this JSON schema: the template's grammar leaves it out then"
            raise ArgumentError("tools", f"{len(tools)} of them", limit)
        if going_on and not grammar.prefill:
            limit = "not with this JSON schema: the template's grammar leaves out what has begun"
            raise ArgumentError("continue_final_message", going_on, limit)
    return prompt, plain


def with_prompt(params: SamplingParams, prompt: ChatPrompt) -> SamplingParams:
    """The parameters of an answer to `prompt`. ArgumentError where both have a grammar."""
    if prompt.grammar is not None and params.grammar is not None:
        raise ArgumentError("grammar", params.grammar, "tools have a grammar of their own")
    return replace(
        params,
        grammar=prompt.grammar or params.grammar,
        json_schema=None if prompt.grammar is not None else params.json_schema,
        stop=tuple(dict.fromkeys((*params.stop, *prompt.stops))),
        preserved_tokens=tuple(dict.fromkeys((*params.preserved_tokens, *prompt.preserved_tokens))),
    )


def end(reader: MessageReader, prompt: ChatPrompt, result: Result) -> ChatDelta:
    """The last delta of an answer whose text `reader` has. Raises `ChatParseError` for one that the
    model ended, and that is not of its format."""
    special = prompt.preserved_tokens.get(result.stop) if isinstance(result.stop, int) else None
    delta = reader.feed(special or "", now=True)
    try:
        last = reader.feed("", last=True)
    except ChatParseError:
        if result.finish_reason == "stop":
            raise
        return delta  # it was cut off: what there is of it
    return ChatDelta(
        delta.content + last.content,
        delta.reasoning_content + last.reasoning_content,
        delta.tool_calls + last.tool_calls,
    )


def _answer(prompt: ChatPrompt, result: Result) -> ChatResult:
    reader = prompt.reader()
    reader.feed(result.text)
    end(reader, prompt, result)
    message = reader.message
    reason: FinishReason | Literal["tool_calls"] = result.finish_reason
    if message.tool_calls and reason == "stop":
        reason = "tool_calls"
    return ChatResult(message, reason, result)
