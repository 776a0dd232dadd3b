"""`python -m pyllamabatch.compare.router`: hands requests on loopback to workers, each in turn.

A line of JSON on the standard input names the workers, `{"ports": [P, ...]}`; the answer is
`{"port": P}`. Request i goes to worker i modulo their number, and the answer comes back as it
comes, with the worker's number in the header X-Worker.
"""

from __future__ import annotations

import http.client
import itertools
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pyllamabatch.compare.child import lines_of_parent, tell_parent
from pyllamabatch.compare.worker import HOST


class Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    ports: list[int]
    turns: itertools.count[int]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        worker = next(self.turns) % len(self.ports)
        connection = http.client.HTTPConnection(HOST, self.ports[worker])
        try:
            connection.request("POST", self.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            why = f"worker {worker} does not answer: {type(error).__name__}: {error}"
            self._answer(502, worker, json.dumps({"error": why}).encode() + b"\n")
            return
        try:
            self._answer(answer.status, worker)
            while part := answer.read1():
                self.wfile.write(part)
        except OSError:  # one of the two has gone: the answer ends early, which its reader sees
            pass
        finally:
            connection.close()

    def _answer(self, status: int, worker: int, content: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("X-Worker", str(worker))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing per request."""


class Server(ThreadingHTTPServer):
    request_queue_size = 512
    daemon_threads = True


def main() -> None:
    Handler.ports = json.loads(next(lines_of_parent()))["ports"]
    Handler.turns = itertools.count()
    server = Server((HOST, 0), Handler)
    tell_parent(json.dumps({"port": server.server_port}))
    server.serve_forever()


if __name__ == "__main__":
    main()
