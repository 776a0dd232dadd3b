"""The application: `create_app(engine)` gives an ASGI application over a running engine."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route

from ..engine.engine import Engine
from ..llama.model import Model
from . import embeddings, errors, native, steps
from .bodies import NAME_MAX
from .chat import ChatBody, chat_completions, input_tokens
from .completions import CompletionBody, completions
from .errors import ApiError, json_response
from .messages import MessagesBody, count_tokens, messages
from .metrics import Metrics
from .options import ServerOptions
from .responses import ResponsesBody, response_tokens, responses
from .schemas import Described
from .security import ApiKeys, Cors
from .service import Service

Endpoint = Callable[[Service, Request], Awaitable[Response]]
ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}


def create_app(engine: Engine | Model, options: ServerOptions | None = None) -> Starlette:
    """An application that serves `engine`, which stays its caller's to close. A `Model` in its
    place: embeddings only."""
    model, running = (engine, None) if isinstance(engine, Model) else (engine.model, engine)
    service = Service(model, running, options or ServerOptions(), Metrics(running))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            service.close()

    described = Described(title="pyllamabatch", version=version("pyllamabatch"))
    app = Starlette(routes=_routes(described, service), lifespan=lifespan)
    app.state.service = service
    for one in (app, described):
        errors.install(one)
    if service.options.api_keys:
        app.add_middleware(ApiKeys, keys=service.options.api_keys)
    if service.options.cors_origins:
        app.add_middleware(Cors, origins=service.options.cors_origins)
    return app


class Answers:
    """An endpoint as an ASGI application."""

    def __init__(self, service: Service, to: Endpoint) -> None:
        self._service = service
        self._to = to

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        response = await self._to(self._service, Request(scope, receive, send))
        await response(scope, receive, send)


def _routes(described: Described, service: Service) -> list[BaseRoute]:
    """Starlette's, which answer, before FastAPI's of the same paths, which are there for the
    description alone: an endpoint needs nothing of what FastAPI does for one."""
    routes: list[BaseRoute] = []

    def route(method: str, *paths: str, to: Endpoint, body: type[BaseModel] | None = None) -> None:
        async def endpoint() -> None: ...

        endpoint.__doc__ = to.__doc__
        extra = {} if body is None else described.body(body)
        for path in paths:
            if "{" in path:
                extra = {"parameters": [ID]}
            name = f"{to.__name__}:{path}"
            routes.append(Route(path, Answers(service, to), methods=[method], name=name))
            described.add_api_route(
                path, endpoint, methods=[method], name=name, openapi_extra=extra,
                response_model=None,
            )  # fmt: skip

    route("POST", "/v1/completions", to=completions, body=CompletionBody)
    route("POST", "/v1/chat/completions", "/chat/completions", to=chat_completions, body=ChatBody)
    route("GET", "/", to=steps.index)
    route("GET", "/steps", to=steps.steps)
    route("GET", "/health", "/v1/health", to=health)
    route("GET", "/v1/models", "/models", to=models)
    route("GET", "/v1/models/{id:path}", "/models/{id:path}", to=model)
    counts = [f"{chats}/input_tokens" for chats in ("/v1/chat/completions", "/chat/completions")]
    route("POST", *counts, to=input_tokens, body=ChatBody)
    route("POST", "/v1/responses", "/responses", to=responses, body=ResponsesBody)
    counts = ["/v1/responses/input_tokens", "/responses/input_tokens"]
    route("POST", *counts, to=response_tokens, body=ResponsesBody)
    route("POST", "/v1/messages", to=messages, body=MessagesBody)
    route("POST", "/v1/messages/count_tokens", to=count_tokens, body=MessagesBody)
    completion, body = native.completion, native.NativeBody
    route("POST", "/completion", "/completions", to=completion, body=body)
    route("POST", "/tokenize", to=native.tokenize, body=native.TokenizeBody)
    route("POST", "/detokenize", to=native.detokenize, body=native.DetokenizeBody)
    route("POST", "/apply-template", to=native.apply_template, body=ChatBody)
    route("GET", "/props", to=native.props)
    route("GET", "/slots", to=native.slots)
    route("GET", "/lora-adapters", to=native.lora_adapters)
    route("POST", "/lora-adapters", to=native.lora_adapters)
    route("GET", "/metrics", to=native.metrics)
    vectors = embeddings.EmbeddingsBody
    route("POST", "/v1/embeddings", to=embeddings.openai, body=vectors)
    route("POST", "/embedding", "/embeddings", to=embeddings.native, body=vectors)
    rerank = "/rerank", "/v1/rerank", "/reranking", "/v1/reranking"
    route("POST", *rerank, to=embeddings.rerank, body=embeddings.RerankBody)
    return [*routes, Mount("/", described)]


async def health(service: Service, request: Request) -> Response:
    """200 while requests are taken; 503 while the server ends."""
    if service.has_engine and service.engine.closed:
        raise ApiError(503, "the engine is closed", "unavailable_error", code="closed")
    if service.draining or (service.has_engine and service.engine.draining):
        raise ApiError(503, "the server is draining", "unavailable_error", code="draining")
    return json_response({"status": "ok"})


async def models(service: Service, request: Request) -> Response:
    """The model, and its adapters."""
    return json_response({"object": "list", "data": _models(service)})


async def model(service: Service, request: Request) -> Response:
    """One of them."""
    id = request.path_params["id"]
    if not id:
        return await models(service, request)
    for one in _models(service):
        if one["id"] == id:
            return json_response(one)
    message = f"there is no model {id[:NAME_MAX]!r}"
    raise ApiError(404, message, param="model", code="model_not_found")


def _models(service: Service) -> list[dict[str, Any]]:
    """On a profile machine there is no model: the vocabulary alone is there."""
    model = service.model
    weights = {
        "n_ctx_train": model.n_ctx_train,
        "n_embd": model.n_embd,
        "n_params": model.n_params,
        "size": model.size_bytes,
    }
    if service.machine:
        weights = dict.fromkeys(weights, 0)
    meta = {
        "vocab_type": model.vocab.type,
        "n_vocab": model.n_vocab,
        "n_ctx": service.n_ctx_slot,
        **weights,
    }
    about = {"object": "model", "created": service.created, "owned_by": "pyllamabatch"}
    loras = service.engine.loras if service.has_engine else ()
    return [
        {"id": service.model_name, **about, "meta": meta},
        *({"id": name, **about, "parent": service.model_name} for name in loras),
    ]
