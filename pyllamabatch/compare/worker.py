"""`python -m pyllamabatch.compare.worker`: one user's server, as ds4 runs one per user: its own
model (the file is mapped, so its pages are shared), its own context, its own folder for KV states.

The setup comes as a line of JSON on the standard input: `{"sampler", "case", "kv_folder",
"memory_limit", "verbose"}`; the answer is `{"port": P, "n_vocab": V}` or `{"error": "why"}`. Then
HTTP on loopback, one request at a time, the others wait in the socket's line:

    POST /completion {"prompt": [tokens], "n_predict": N, "seed": S}

answers a line of JSON per token, `{"token": T}`, as it is sampled, and at the end `{"done": true,
"n_computed": rows of the prompt}`, or `{"error": "why"}`. With `"keep": true` the sequence stays,
and a request with an empty prompt goes on with it. With `"cache_prompt": true` the prompt's state
is kept in the folder, and taken from there the next time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from pyllamabatch.compare.case import Case
from pyllamabatch.compare.child import lines_of_parent, log_to_stderr, tell_parent
from pyllamabatch.compare.loop import Loop, loop_of
from pyllamabatch.errors import UnsupportedOperation
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model

HOST = "127.0.0.1"


class Completion:
    """The one sequence of a worker."""

    def __init__(self, loop: Loop, kv_folder: Path) -> None:
        self._loop = loop
        self._folder = kv_folder

    def run(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of the answer."""
        n_computed = 0
        if prompt := body["prompt"]:
            n_computed = self._start(prompt, body["seed"], body.get("cache_prompt", False))
        for i in range(body["n_predict"]):
            while not (sampled := self._loop.step()):
                pass
            yield {"token": sampled[0]}
            if i == 0 and prompt and body.get("cache_prompt"):
                self._loop.context.state_seq_save(self._file(prompt), 0)
        if not body.get("keep"):
            self._loop.stop(0)
        yield {"done": True, "n_computed": n_computed}

    def _start(self, prompt: list[int], seed: int, cached: bool) -> int:
        """How many tokens of the prompt are to compute."""
        self._loop.stop(0)
        n_cached = self._from_cache(prompt) if cached else 0
        self._loop.start(0, prompt, seed, n_cached)
        return len(prompt) - n_cached

    def _from_cache(self, prompt: list[int]) -> int:
        """How many of its tokens were: all but the last one, whose row is what is sampled from."""
        path, context = self._file(prompt), self._loop.context
        if not path.exists():
            return 0
        context.state_seq_load(path, 0)
        try:
            context.memory.seq_rm(0, len(prompt) - 1)
        except UnsupportedOperation:  # a recurrent state can't go back
            self._loop.stop(0)
            return 0
        return len(prompt) - 1

    def _file(self, prompt: list[int]) -> Path:
        return self._folder / f"{hashlib.sha256(repr(prompt).encode()).hexdigest()[:16]}.kv"


class Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: the answer ends with the connection."""

    disable_nagle_algorithm = True  # a token goes out when it is written
    completion: Completion

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        try:
            for line in self.completion.run(body):
                self._write(line)
        except OSError:  # the client has gone
            pass
        except Exception as error:
            self._write({"error": f"{type(error).__name__}: {error}"})

    def _write(self, line: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing per request."""


class Server(HTTPServer):
    request_queue_size = 512  # requests that wait for their turn


def main() -> None:
    lines = lines_of_parent()
    setup: dict[str, Any] = json.loads(next(lines))
    if setup["verbose"]:
        log_to_stderr()
    try:
        if setup["memory_limit"]:
            limit_memory(setup["memory_limit"])
        case = Case.from_json(setup["case"])
        model = Model(case.model.path, n_gpu_layers=case.n_gpu_layers)
        context = Context(model, **case.context_params())
        loop = loop_of(setup["sampler"], context, case.sampling, case.n_threads)
        Handler.completion = Completion(loop, Path(setup["kv_folder"]))
        server = Server((HOST, 0), Handler)
    except Exception as error:
        tell_parent(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return
    tell_parent(json.dumps({"port": server.server_port, "n_vocab": model.n_vocab}))
    server.serve_forever()


def limit_memory(n_bytes: int) -> None:
    """Of this process from now on: heap and anonymous memory, so KV cells, compute buffers and
    copied weights, but not the mapped file (RLIMIT_DATA, Linux 4.7 and later)."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, hard))


if __name__ == "__main__":
    main()
