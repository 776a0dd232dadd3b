"""OpenAI's `/v1/completions`."""

from functools import partial
from typing import Annotated, Any

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from ..engine.results import Chunk, Result
from ..engine.stream import Stream
from . import bodies, tokens
from .answer import respond
from .bodies import SamplingBody
from .errors import invalid
from .openai_answer import OpenAIAnswer
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


class TextAnswer(OpenAIAnswer):
    def __init__(self, service: Service, body: CompletionBody, prepared: Prepared) -> None:
        super().__init__(service, body, prepared, id="cmpl", kind="text_completion")
        self._plain = body.logprobs is None
        self._logprobs = None
        if not self._plain:
            self._logprobs = [tokens.TextLogprobs(service.piece) for _ in prepared.streams]

    def _choice(self, i: int, result: Result) -> dict[str, Any]:
        return {
            "text": result.text,
            "logprobs": self._logprobs and self._logprobs[i](tokens.tokens_of(result)),
            "finish_reason": tokens.finish_reason(result),
        }

    def chunk(self, i: int, stream: Stream, chunk: Chunk) -> bytes:
        choice = self._text_choice(chunk.text)
        if self._logprobs is not None:
            choice["logprobs"] = self._logprobs[i](stream.between(chunk.start, chunk.stop))
        return self._event(i, choice, chunk.stop, **self._timings(stream))

    def _no_choice(self) -> dict[str, Any]:
        return self._text_choice("")

    def _text_choice(self, text: str) -> dict[str, Any]:
        return {"text": text, "logprobs": None, "finish_reason": None}

    def finish(self, i: int, result: Result) -> bytes:
        choice = {"text": "", "logprobs": None, "finish_reason": tokens.finish_reason(result)}
        return self._event(i, choice, result.n_generated, timings=tokens.timings(result))
