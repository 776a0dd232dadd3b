"""A server from its socket to its last answer: uvicorn, and what a signal does.

SIGTERM or SIGINT: new requests get 503, open ones end by themselves, or are cut off after
`drain_timeout` seconds or at a second signal. Clients that neither send nor read then hold nothing
up for long."""

import asyncio
import signal
import socket
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import uvicorn

from ..errors import ArgumentError
from .protocol import HttpProtocol

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
CLOSE_SECONDS = 5  # that open connections get once the engine is done
MAC_OPEN_MAX = 10240  # open files that a process may ask for where the limit is "unlimited"


class Drainable(Protocol):
    """`draining`: new requests get 503."""

    draining: bool

    @abstractmethod
    async def drain(self) -> None:
        """Returns when what is open has ended, or was cut off after a while."""

    @abstractmethod
    async def stop(self) -> None:
        """End what is open at once."""


class Server(uvicorn.Server):
    """Serves an application of `create_app` on a bound socket until a signal, or `end`."""

    def __init__(
        self,
        app: Any,
        listening: socket.socket,
        ready: Callable[[], None] = lambda: None,
        service: Drainable | None = None,
    ) -> None:
        """`ready()` is called once the application answers. `service`: what is drained at the end;
        default: that of `create_app`."""
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            log_level="warning",
            access_log=False,
            lifespan="on",
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            ws="none",
        )
        super().__init__(config)
        self._service: Drainable = service or app.state.service
        self._listening = listening
        self._ready = ready
        self._draining: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        host, port = self._listening.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run_until_signal(self) -> None:
        """Returns when all is answered or cut off. The process may have as many open files as the
        system lets it: each connection is one."""
        raise_open_files()
        self.run(sockets=[self._listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave the lifespan to be cancelled, and log that
            await self.lifespan.shutdown()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's would be raised again at the end, and would know no draining."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def heard(*_: Any) -> None:  # loops of Windows have no handlers of their own
            loop.call_soon_threadsafe(self.end)

        before = {
            number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def end(self) -> None:
        """Drain and end; the second call ends at once. In the event loop."""
        if self._draining is None:
            self._service.draining = True
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.force_exit = True
            self._draining.cancel()
            for connection in list(self.server_state.connections):
                connection.transport.abort()

    async def _drain(self) -> None:
        try:
            await self._service.drain()
        except asyncio.CancelledError:
            await self._service.stop()
        finally:
            self.should_exit = True


def raise_open_files() -> None:
    """The soft limit up to the hard one. A Mac's is 256 else."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAC_OPEN_MAX if hard == resource.RLIM_INFINITY else hard
    if 0 <= soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `port` 0 takes a free one. OSError, which names them. ArgumentError
    without a host, which would be all addresses."""
    if not host:
        raise ArgumentError("host", host, "an address; 0.0.0.0 is all of this machine's")
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    return found
