"""Replica: one engine and its HTTP application, as a Ray Serve deployment runs it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

from .call import Head, RoutedCall, answer

if TYPE_CHECKING:
    from ..server.service import Service

OpenApp = Callable[[], AbstractContextManager[Any]]
"""An application of `create_app` over an engine that is closed with it. It can be pickled."""


class Replica:
    """Every method is for one event loop."""

    def __init__(self, open_app: OpenApp) -> None:
        self._stack = ExitStack()
        self._app = self._stack.enter_context(open_app())
        self._service: Service = self._app.state.service

    async def __call__(self, call: RoutedCall) -> AsyncGenerator[Head | bytes, None]:
        """The head of the answer, then its bytes as they come."""
        async for part in answer(self._app, call):
            yield part

    def check_health(self) -> None:
        """RuntimeError where the engine has ended: Ray makes another replica."""
        if self._service.has_engine and self._service.engine.closed:
            raise RuntimeError("the engine is closed")

    def record_routing_stats(self) -> dict[str, float]:
        """For `router.Seen`."""
        if not self._service.has_engine:
            return {}
        stats = self._service.engine.stats()
        return {"wait_s": stats.wait_s, "row_s": stats.row_s}

    def metrics(self) -> bytes:
        """Its `/metrics`."""
        return self._service.metrics.text()

    def __del__(self) -> None:
        self._service.close()
        self._stack.close()
