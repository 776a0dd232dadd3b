"""OpenAI's `/v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any
from uuid import uuid4

import orjson
from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from ..engine.stream import Chunk, Result, Stream
from . import bodies, tokens
from .answer import DONE, Answer, event, respond
from .bodies import SamplingBody
from .errors import invalid
from .service import Prepared, Service


class CompletionBody(SamplingBody):
    """`prompt`: a text, token ids, or a list of these. `logprobs`: so many of the most likely
    tokens beside each."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0)] | None = None


async def completions(service: Service, request: Request) -> Response:
    body = await bodies.read(request, CompletionBody)
    given: Any = body.prompt
    prompts = (
        given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    )
    if not prompts[0] and len(prompts) == 1:
        raise invalid("prompt", given, "must not be empty")
    prepared = await service.submit(body, prompts, body.logprobs)
    make = partial(TextAnswer, service, body, prepared)
    return await respond(service, request, make, prepared.streams, stream=body.stream)


class TextAnswer(Answer):
    def __init__(self, service: Service, body: CompletionBody, prepared: Prepared) -> None:
        self._body = body
        self._prepared = prepared
        n = len(prepared.streams)
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": service.now(),
            "model": body.model or service.model_name,
            "system_fingerprint": service.fingerprint,
        }
        self._logprobs = None
        if body.logprobs is not None:
            self._logprobs = [tokens.TextLogprobs(service.piece) for _ in range(n)]
        self._plain = self._logprobs is None and not body.stream_options.continuous_usage_stats
        # A chunk is these bytes, its text, and the last ones.
        head = orjson.dumps(self._head)[:-1]
        self._before = [b'data: %b,"choices":[{"index":%d,"text":' % (head, i) for i in range(n)]
        usage = b',"usage":null' if body.stream_options.include_usage else b""
        self._after = b',"logprobs":null,"finish_reason":null}]%b}\n\n' % usage

    def whole(self, results: Sequence[Result]) -> Any:
        choices = [
            {
                "index": i,
                "text": result.text,
                "logprobs": self._logprobs and self._logprobs[i](tokens.tokens_of(result)),
                "finish_reason": tokens.finish_reason(result),
            }
            for i, result in enumerate(results)
        ]
        return {
            **self._head,
            "choices": choices,
            "usage": tokens.usage(self._prepared.n_prompt, results, self._body.n),
            "timings": tokens.timings(results[0]),
        }

    def begin(self) -> bytes:
        return b""

    def chunk(self, i: int, stream: Stream, chunk: Chunk) -> bytes:
        if self._plain:
            return self._before[i] + orjson.dumps(chunk.text) + self._after
        columns = None
        if self._logprobs is not None:
            columns = self._logprobs[i](stream.between(chunk.start, chunk.stop))
        choice = {"text": chunk.text, "logprobs": columns, "finish_reason": None}
        return self._event(i, choice, chunk.stop)

    def finish(self, i: int, result: Result) -> bytes:
        choice = {"text": "", "logprobs": None, "finish_reason": tokens.finish_reason(result)}
        return self._event(i, choice, result.n_generated, timings=tokens.timings(result))

    def end(self, results: Sequence[Result]) -> bytes:
        if not self._body.stream_options.include_usage:
            return DONE
        counts = tokens.usage(self._prepared.n_prompt, results, self._body.n)
        return event({**self._head, "choices": [], "usage": counts}) + DONE

    def _event(self, i: int, choice: dict[str, Any], n_generated: int, **more: Any) -> bytes:
        options, n_prompt = self._body.stream_options, self._prepared.n_prompt
        usage = tokens.stream_usage(options, n_prompt, n_generated)
        return event({**self._head, "choices": [{"index": i, **choice}], **usage, **more})
