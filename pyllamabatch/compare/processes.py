"""The arm of N processes: workers behind a router, and their clients in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from pyllamabatch.compare.case import Case
from pyllamabatch.compare.child import ArmError, Child
from pyllamabatch.compare.clients import ask_all
from pyllamabatch.compare.hosted import START_S
from pyllamabatch.compare.loop import Loop
from pyllamabatch.compare.machine_loop import open_loop
from pyllamabatch.compare.server import Json, RoundRobin, Server, ThreadingServer, completion, line
from pyllamabatch.compare.workload import BURST, Timings, Workload
from pyllamabatch.llama.model import Model

GONE_S = 0.2  # a worker whose connections have ended may need so long to end, too


class Processes:
    """A worker for each sequence, and a router. `case`: with the threads of one worker;
    memory_limit: of each worker, in bytes; 0: none."""

    def __init__(self, case: Case, memory_limit: int, verbose: bool) -> None:
        self._case = case
        self._memory_limit = memory_limit
        self._stack = ExitStack()
        try:
            *self._workers, self._router = (
                self._stack.enter_context(Child(loud=verbose)) for _ in range(case.pl + 1)
            )
        except BaseException:
            self._stack.close()
            raise
        self.pids = [child.pid for child in (*self._workers, self._router)]

    def load(self) -> None:
        for worker in self._workers:
            worker.send((serve, replace(self._case, pl=1), self._memory_limit))
        ports = []
        for i, worker in enumerate(self._workers):
            try:
                port, self._n_vocab = worker.receive(START_S)
            except ArmError as error:
                words = f"worker {i} of {len(self._workers)} did not start"
                if limit := self._memory_limit:
                    words += f" with {limit / 2**20:.0f} MiB of heap and anonymous memory at most"
                raise ArmError(f"{error}\n{words}") from None
            ports.append(port)
        self._router.send((route, ports))
        self.port: int = self._router.receive(START_S)

    def run(self, workload: Workload, limit_s: float) -> Timings:
        """In a burst each client asks twice: for the prompt and the first token, and when all have
        that, for the rest. The router's turns bring each of both to every worker once."""
        n_first = 1 if workload.protocol == BURST else workload.tokens
        prompts = workload.prompts(self._case, self._n_vocab).tolist()

        def ask(k: int, i: int) -> Iterator[Json]:
            first = {"prompt": prompts[i], "n_predict": n_first, "seed": self._case.seed + i}
            rest = workload.tokens - n_first
            yield from self.tokens(first | {"keep": rest > 0}, limit_s)
            if rest:
                yield from self.tokens({"prompt": [], "n_predict": rest}, limit_s)

        timings = ask_all(workload, self._case.pl, ask, give_up=self.close)
        lost = [one for one in timings.requests if one.error]
        ended = [end for w in self._workers if (end := w.end(GONE_S))] if lost else []
        for one in lost:
            one.error = "; ".join([one.error, *ended])
        return timings

    def tokens(self, body: Json, limit_s: float) -> Iterator[Json]:
        return (one for one in completion(self.port, body, limit_s) if "token" in one)

    def close(self) -> None:
        self._stack.close()


def serve(pipe: Connection[Any, Any], case: Case, memory_limit: int) -> None:
    """A worker: its own model (the file is mapped, its pages are shared) and its own context, for
    one request at a time. Sends its port and the size of the vocabulary."""
    if memory_limit:
        limit_memory(memory_limit)
    model = Model(case.model.path, n_gpu_layers=case.n_gpu_layers)
    loop = open_loop(model, case)
    server = Server(partial(complete, loop))
    pipe.send((server.server_port, model.n_vocab))
    server.serve_forever()


def complete(loop: Loop, body: Json) -> Iterator[bytes]:
    """`n_predict` tokens after the prompt. With "keep" the sequence stays, and a request with an
    empty prompt goes on with it."""
    if body["prompt"]:
        loop.stop(0)
        loop.start(0, body["prompt"], body["seed"])
    for token in loop.generate(body["n_predict"]):
        yield line(token=token)
    if not body.get("keep"):
        loop.stop(0)
    yield line(done=True)


def route(pipe: Connection[Any, Any], ports: list[int]) -> None:
    """The router. Sends its port."""
    server = ThreadingServer(RoundRobin(ports))
    pipe.send(server.server_port)
    server.serve_forever()


def limit_memory(n_bytes: int) -> None:
    """Of this process from now on: heap and anonymous memory, so KV cells, compute buffers and
    copied weights, but not the mapped file (RLIMIT_DATA, Linux 4.7 and later)."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, hard))
