"""Who may ask: API keys, as ASGI middleware that costs nothing per token."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers

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
        await error.response()(scope, receive, send)

    def _allowed(self, scope: Any) -> bool:
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        headers = Headers(scope=scope)
        given = headers.get("x-api-key") or ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = token.strip()
        asked = given.encode("utf-8", "surrogateescape")
        return sum(hmac.compare_digest(asked, key) for key in self._keys) > 0  # no early end
