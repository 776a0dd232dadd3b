"""Embeddings and reranking: OpenAI's and llama-server's forms."""

import asyncio
import base64
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from ..engine.embedder import Embedder, best_of, normalized
from ..engine.embedding_core import Vectors
from ..errors import ArgumentError, UnsupportedOperation
from ..llama.vocab import TokenArray
from . import bodies
from .answer import cancelled_on_leave
from .bodies import Body
from .errors import invalid, json_response
from .native import MixedPrompt, prompts_of
from .service import Service

N_REQUEST_MAX = 2048  # texts of one request


class EmbeddingsBody(Body):
    """`input` (OpenAI's) or `content`: a text, token ids, or a list of these."""

    input: MixedPrompt | None = None
    content: MixedPrompt | None = None
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    embd_normalize: int = 2
    user: str = ""


class RerankBody(Body):
    """The best `top_n` of `documents` for `query`, in Jina's form; where they are `texts`, in that
    of Text Embeddings Inference, whose clients may ask for scores of 0 to 1 (`raw_scores`)."""

    query: str
    documents: list[str] | None = None
    texts: list[str] | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    model: str = ""
    return_documents: bool = False
    return_text: bool = False
    raw_scores: bool = True


async def openai(service: Service, request: Request) -> Response:
    """A vector for each text, of length 1."""
    body = await bodies.read(request, EmbeddingsBody)
    tokens, vectors = await _vectors(service, request, body)
    n = sum(map(len, tokens))
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n, "total_tokens": n}
    model = body.model or service.model_name
    return json_response({"object": "list", "data": data, "model": model, "usage": usage})


async def native(service: Service, request: Request) -> Response:
    """llama-server's form: a list of a vector for each text."""
    body = await bodies.read(request, EmbeddingsBody)
    _, vectors = await _vectors(service, request, body)
    return json_response(
        [{"index": i, "embedding": [vector.tolist()]} for i, vector in enumerate(vectors)]
    )


async def rerank(service: Service, request: Request) -> Response:
    """Documents by relevance, the best first."""
    body = await bodies.read(request, RerankBody)
    embedder = need(service.embedder, ranks=True)
    name = "documents" if body.texts is None else "texts"
    documents: list[str] | None = getattr(body, name)
    if not documents:
        raise invalid(name, documents, "must be a list of at least one text")
    check_number(documents, name)
    pairs = await service.apart(lambda: embedder.pairs(body.query, documents, name))
    best = best_of(await _computed(service, embedder, request, pairs), body.top_n)
    with_text = body.return_documents or body.return_text
    if body.texts is not None:
        return json_response(
            [
                {"index": one.index, "score": one.score if body.raw_scores else _share(one.score)}
                | ({"text": documents[one.index]} if with_text else {})
                for one in best
            ]
        )
    results = [
        {"index": one.index, "relevance_score": one.score}
        | ({"document": {"text": documents[one.index]}} if with_text else {})
        for one in best
    ]
    n = sum(map(len, pairs))
    usage = {"prompt_tokens": n, "total_tokens": n}
    model = body.model or service.model_name
    return json_response({"object": "list", "model": model, "usage": usage, "results": results})


def _share(score: float) -> float:
    """The sigmoid."""
    return 0.5 + 0.5 * math.tanh(score / 2)


async def _vectors(
    service: Service, request: Request, body: EmbeddingsBody
) -> tuple[list[TokenArray], Vectors]:
    embedder = need(service.embedder, ranks=False)
    name = "content" if body.input is None else "input"
    given = getattr(body, name)
    if given is None:
        raise invalid("input", None, "missing")
    if body.dimensions not in (None, embedder.model.n_embd_out):
        limit = f"must be {embedder.model.n_embd_out}: the model's vectors can't be shortened"
        raise invalid("dimensions", body.dimensions, limit)
    if body.embd_normalize not in (-1, 2):
        raise invalid("embd_normalize", body.embd_normalize, "must be 2 (length 1) or -1 (as is)")
    prompts = prompts_of(given, name)
    check_number(prompts, name)
    tokens = await service.apart(lambda: [service.tokens(prompt, name=name) for prompt in prompts])
    embedder.check(tokens, name)
    vectors = await _computed(service, embedder, request, tokens)
    if body.embd_normalize == 2:
        vectors = normalized(vectors)
    return tokens, vectors


async def _computed(
    service: Service, embedder: Embedder, request: Request, texts: Sequence[TokenArray]
) -> Vectors:
    """The vectors of a request's texts, or their scores, as long as its client is there."""
    service.admit()
    embedding = embedder.submit(texts, ranks=embedder.ranks)
    with service.running(embedding):
        async with cancelled_on_leave(request.receive, [embedding]):
            return await asyncio.wrap_future(embedding.future)


def need(embedder: Embedder | None, *, ranks: bool) -> Embedder:
    """UnsupportedOperation for a server that was started without it."""
    flag = "--rerank" if ranks else "--embeddings"
    if embedder is None or embedder.ranks != ranks:
        raise UnsupportedOperation(f"this server does not support this: start it with {flag}")
    return embedder


def check_number(texts: Sequence[object], name: str) -> None:
    """ArgumentError for more texts than a request may have."""
    if len(texts) > N_REQUEST_MAX:
        raise ArgumentError(name, f"{len(texts)} texts", f"at most {N_REQUEST_MAX} of a request")


def _encoded(vector: Vectors, encoding: str) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
