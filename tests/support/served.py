"""A server under test: an engine, uvicorn in a thread of this process, and a client."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from starlette.applications import Starlette

from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.server.app import create_app
from pyllamabatch.server.options import ServerOptions
from pyllamabatch.server.run import Server, listen
from tests.support.engines import EXACT

SUM = "What is 17 + 25?"
SUM_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": SUM}], "temperature": 0}
ANSWER = "42"
ENDLESS: dict[str, Any] = {"prompt": SUM, "ignore_eos": True, "temperature": 0, "max_tokens": 400}


@dataclass
class Served:
    engine: Engine
    server: Server
    url: str
    client: httpx.Client

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, **more)

    def ok(self, path: str, body: Any) -> Any:
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str, body: Any, status: int = 400) -> Any:
        """The error, in OpenAI's form."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert {"message", "type", "param", "code"} <= error.keys()
        return error

    def events(self, path: str, body: Any) -> list[Any]:
        """The data of its server-sent events; the last one of OpenAI's is "[DONE]"."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@contextmanager
def serving(
    model: Model, options: ServerOptions | None = None, **engine_options: Any
) -> Iterator[Served]:
    """A server on a free port, with an engine of its own."""
    given = {"n_seq_max": 4, "n_ctx": 4096, "max_waiting": 64, **EXACT, **engine_options}
    with (
        Engine(model, **given) as engine,
        running(create_app(engine, options)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield Served(engine, server, server.url, client)


@contextmanager
def running(app: Starlette) -> Iterator[Server]:
    """A server of this application, in a thread."""
    with listen("127.0.0.1", 0) as listening:
        ready = threading.Event()
        server = Server(app, listening, ready.set)
        thread = threading.Thread(target=server.run_until_signal, daemon=True)
        thread.start()
        assert ready.wait(30)
        yield server
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for it, but no longer than that."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
