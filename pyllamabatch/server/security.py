"""Who may ask: API keys and pages of other origins, as ASGI middleware."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response

from .errors import ApiError

OPEN_PATHS = frozenset({"/", "/health", "/v1/health"})


class ApiKeys:
    """Answers 401 to a request without one of the keys, given as `Authorization: Bearer KEY` or
    `X-Api-Key: KEY`."""

    def __init__(self, app: Any, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(401, "Invalid API Key", "authentication_error", code="invalid_api_key")
        await error.response(scope["path"])(scope, receive, send)

    def _allowed(self, scope: Any) -> bool:
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        headers = Headers(scope=scope)
        given = headers.get("x-api-key") or ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip(" \t")
        asked = given.encode("latin-1")  # the bytes that were sent
        return sum(hmac.compare_digest(asked, key) for key in self._keys) > 0  # no early end


LOCALHOST = frozenset({"localhost", "127.0.0.1", "::1"})


class Cors:
    """Pages of these origins may ask. "*": of all; "localhost": of this machine, at any port."""

    def __init__(self, app: Any, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin is None:
            await self._app(scope, receive, send)
            return
        allowed = self._allowed(origin)
        headers = [
            (b"Vary", b"Origin"),
            *([(b"Access-Control-Allow-Origin", origin.encode("latin-1"))] if allowed else []),
            (b"Access-Control-Allow-Credentials", b"true"),
        ]
        if scope["method"] == "OPTIONS":
            wanted = Headers(scope=scope).get("access-control-request-headers", "*")
            response = Response(status_code=200)
            response.raw_headers += [
                *headers,
                (b"Access-Control-Allow-Methods", b"GET, POST, DELETE, OPTIONS"),
                (b"Access-Control-Allow-Headers", wanted.encode("latin-1")),
            ]
            await response(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _allowed(self, origin: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        try:
            host = urlsplit(origin).hostname
        except ValueError:
            return False
        return "localhost" in self._origins and host in LOCALHOST
