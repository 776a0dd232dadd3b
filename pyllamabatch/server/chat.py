"""OpenAI's `/v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any
from uuid import uuid4

import orjson
from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from ..engine.stream import Chunk, Result, Stream, Token
from . import bodies, tokens
from .answer import DONE, Answer, event, respond
from .bodies import SamplingBody
from .errors import invalid
from .service import Prepared, Service

ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatBody(SamplingBody):
    """`logprobs`: of each token, with `top_logprobs` of the most likely ones beside it."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None


async def chat_completions(service: Service, request: Request) -> Response:
    body = await bodies.read(request, ChatBody)
    prompt = service.chat_prompt(messages_of(body.messages))
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", body.top_logprobs, "needs logprobs: true")
    n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    prepared = await service.submit(body, [prompt], n_logprobs)
    answer = ChatAnswer(service, body, prepared)
    return await respond(service, request, answer, prepared.streams, stream=body.stream)


def messages_of(given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Roles and texts; content parts of texts are joined."""
    messages = []
    for i, message in enumerate(given):
        role = message.get("role")
        if role not in ROLES:
            raise invalid(f"messages[{i}].role", role, f"must be one of {', '.join(ROLES)}")
        messages.append({"role": role, "content": text_of(f"messages[{i}].content", message)})
    return messages


def text_of(name: str, message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("role") == "assistant":
        return ""
    if not isinstance(content, list):
        raise invalid(name, content, "must be a text or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise invalid(name, kind, "only parts of type text are supported")
        if not isinstance(part.get("text"), str):
            raise invalid(name, part, 'a part of type text needs a "text"')
    return "".join(part["text"] for part in content)


class ChatAnswer(Answer):
    def __init__(self, service: Service, body: ChatBody, prepared: Prepared) -> None:
        self._service = service
        self._body = body
        self._prepared = prepared
        self._n = n = len(prepared.streams)
        self._head = {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": service.now(),
            "model": body.model or service.model_name,
            "system_fingerprint": service.fingerprint,
        }
        # A chunk is these bytes, its text, and the last ones.
        head = orjson.dumps(self._head)[:-1]
        before = b'data: %b,"choices":[{"index":%d,"delta":{"content":'
        self._before = [before % (head, i) for i in range(n)]
        self._null = {"usage": None} if body.stream_options.include_usage else {}
        usage = b',"usage":null' if self._null else b""
        self._after = b'},"logprobs":null,"finish_reason":null}]%b}\n\n' % usage

    def whole(self, results: Sequence[Result]) -> Any:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": self._logprobs(tokens.tokens_of(result)),
                "finish_reason": tokens.finish_reason(result),
            }
            for i, result in enumerate(results)
        ]
        return {
            **self._head,
            "choices": choices,
            "usage": tokens.usage(self._prepared.n_prompt, results),
            "timings": tokens.timings(results[0]),
        }

    def begin(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._event(i, delta) for i in range(self._n))

    def chunk(self, i: int, stream: Stream, chunk: Chunk) -> bytes:
        if not self._body.logprobs:
            return self._before[i] + orjson.dumps(chunk.text) + self._after
        logprobs = self._logprobs(stream.between(chunk.start, chunk.stop))
        return self._event(i, {"content": chunk.text}, logprobs=logprobs)

    def finish(self, i: int, result: Result) -> bytes:
        reason = tokens.finish_reason(result)
        return self._event(i, {}, reason, timings=tokens.timings(result))

    def end(self, results: Sequence[Result]) -> bytes:
        if not self._null:
            return DONE
        counts = tokens.usage(self._prepared.n_prompt, results)
        return event({**self._head, "choices": [], "usage": counts}) + DONE

    def _logprobs(self, of: Sequence[Token]) -> Any:
        if not self._body.logprobs:
            return None
        return {"content": tokens.chat_logprobs(of, self._service.piece)}

    def _event(
        self,
        i: int,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: Any = None,
        **more: Any,
    ) -> bytes:
        choice = {
            "index": i, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason,
        }  # fmt: skip
        return event({**self._head, "choices": [choice], **self._null, **more})
