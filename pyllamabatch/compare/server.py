"""A completion server on loopback, a router and a client, of the standard library.

`compare` puts a worker behind each process of its arm and the router before them; the benches serve
other libraries with it. Only what these need is there: GET /health, and POST /completion, whose
answer is one JSON object or a line of JSON for each token.
"""

from __future__ import annotations

import http.client
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any

from pyllamabatch.compare.child import ArmError

HOST = "127.0.0.1"
Json = dict[str, Any]
Answer = Callable[[Json], "Json | Iterable[bytes]"]
"""From the body of a request to its whole answer, or to the bytes of it as they come."""


class Server(HTTPServer):
    """Answers one request after the other. `port` 0: a free one, `server_port`."""

    request_queue_size = 512  # clients that wait for their turn

    def __init__(self, answer: Answer, port: int = 0) -> None:
        super().__init__((HOST, port), Handler)
        self.answer = answer


class ThreadingServer(ThreadingMixIn, Server):
    """A thread for each connection."""

    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"  # connections stay open after a whole answer
    disable_nagle_algorithm = True  # a line goes out when it is written
    wbufsize = -1  # head and body go out together

    def do_GET(self) -> None:
        self._whole(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/completion":
            self._whole(404, {})
            return
        try:
            answer = self.server.answer(body)
        except Exception as error:
            self._whole(500, {"error": in_words(error)})
            return
        if isinstance(answer, dict):
            self._whole(200, answer)
        else:
            self._as_it_comes(answer)

    def _whole(self, status: int, values: Json) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _as_it_comes(self, parts: Iterable[bytes]) -> None:
        """The answer ends with the connection."""
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for part in parts:
                self.wfile.write(part)
                self.wfile.flush()
        except ConnectionError:  # the client has gone
            pass
        except Exception as error:
            self.wfile.write(line(error=in_words(error)))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing per request."""


def line(**values: Any) -> bytes:
    """Of an answer that comes line by line."""
    return json.dumps(values).encode() + b"\n"


def in_words(error: Exception) -> str:
    return str(error) if isinstance(error, ArmError) else f"{type(error).__name__}: {error}"


def completion(port: int, body: Json, limit_s: float | None = None) -> Iterator[Json]:
    """The lines of an answer as they come; the last one has "done". ArmError for an answer that
    says "error" or ends early, and after `limit_s`."""
    end = None if limit_s is None else time.monotonic() + limit_s
    try:
        with posted(port, body, limit_s) as answer:
            for text in answer:
                values: Json = json.loads(text)
                if "error" in values:
                    raise ArmError(values["error"])
                yield values
                if "done" in values:
                    return
                if end is not None and time.monotonic() > end:
                    raise ArmError(f"not done after {limit_s:g} s")
    except (OSError, http.client.HTTPException) as error:
        raise ArmError(in_words(error)) from None
    raise ArmError("the answer ended early")


@contextmanager
def posted(port: int, body: Json, limit_s: float | None) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request, which is read in the block."""
    with closing(http.client.HTTPConnection(HOST, port, timeout=limit_s)) as connection:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(body).encode(), headers)
        yield connection.getresponse()


class RoundRobin:
    """An `Answer` that is given by the servers at these ports in turn, and passed on as it is."""

    def __init__(self, ports: list[int]) -> None:
        self._turns = itertools.cycle(enumerate(ports))

    def __call__(self, body: Json) -> Iterator[bytes]:
        i, port = next(self._turns)
        try:
            with posted(port, body, None) as answer:
                while part := answer.read1():
                    yield part
        except (OSError, http.client.HTTPException) as error:
            raise ArmError(f"worker {i}: {in_words(error)}") from None
