"""The arms over HTTP: a server of `pyllamabatch serve` for each sequence, and clients in this
process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from pyllamabatch.compare.case import Case, request_body
from pyllamabatch.compare.child import START_S, ArmError, Child
from pyllamabatch.compare.clients import ask_all
from pyllamabatch.compare.completion import HOST, Client
from pyllamabatch.compare.round_robin import route
from pyllamabatch.compare.workload import BURST, Timings, Workload
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model

GONE_S = 0.2  # a worker whose connections have ended may need so long to end, too


class OverHttp(ABC):
    """N servers behind one port. `case`: with the threads of one server."""

    pids: list[int]
    port: int

    def __init__(self, case: Case) -> None:
        self._case = case
        self._n_vocab = 0
        self._stack = ExitStack()

    @abstractmethod
    def load(self) -> None:
        """Sets `port`. ArmError where a server did not start."""

    def ended(self) -> list[str]:
        """Of each server that has ended, how."""
        return []

    def run(self, workload: Workload, limit_s: float) -> Timings:
        """In a burst each client asks twice over its connection: for the first token, and when all
        have that, for the rest. The server has the cells of the prompt from the first time."""
        prompts = workload.prompts(self._case, self._n_vocab).tolist()
        settings = request_body(self._case.sampling)

        def ask(k: int, i: int) -> Iterator[object]:
            body = settings | {"prompt": prompts[i], "seed": self._case.seed + i}
            n = workload.tokens
            with closing(Client(self.port, limit_s)) as client:
                if workload.protocol == BURST:
                    first = client.whole(body | {"n_predict": 1, "return_tokens": True})
                    yield first
                    body["prompt"] += first["tokens"]
                    n -= 1
                yield from client.streamed(body | {"n_predict": n})

        timings = ask_all(workload, self._case.pl, ask, give_up=self.close)
        lost = [one for one in timings.requests if one.error]
        ended = self.ended() if lost else []
        for one in lost:
            one.error = "; ".join([one.error, *ended])
        return timings

    def close(self) -> None:
        self._stack.close()


class Processes(OverHttp):
    """A process for each sequence behind a router in turns. memory_limit: of each, in bytes; 0:
    none."""

    def __init__(self, case: Case, memory_limit: int, verbose: bool) -> None:
        super().__init__(case)
        self._memory_limit = memory_limit
        try:
            *self._workers, self._router = (
                self._stack.enter_context(Child(loud=verbose)) for _ in range(case.pl + 1)
            )
        except BaseException:
            self.close()
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
        self.port = self._router.receive(START_S)

    def ended(self) -> list[str]:
        return [end for worker in self._workers if (end := worker.end(GONE_S))]


def serve(pipe: Connection[Any, Any], case: Case, memory_limit: int) -> None:
    """A worker. Sends its port and the size of the vocabulary."""
    if memory_limit:
        limit_memory(memory_limit)
    from pyllamabatch.server.run import Server, listen

    with open_app(case) as app, listen(HOST, 0) as listening:
        found = listening.getsockname()[1], app.state.service.model.n_vocab
        Server(app, listening, lambda: pipe.send(found)).run_until_signal()


@contextmanager
def open_app(case: Case) -> Iterator[Any]:
    """What `pyllamabatch serve` serves: an application over an engine of its own. The file is
    mapped, its pages are shared. One pool: there a prefix goes on without a copy."""
    from pyllamabatch.server.app import create_app

    params = case.context_params() | {"kv_unified": True, "speculate": None}
    with (
        Model(case.model.path, n_gpu_layers=case.n_gpu_layers) as model,
        Engine(model, prefix_cache=True, machine=case.machine or None, **params) as engine,
    ):
        yield create_app(engine)


def limit_memory(n_bytes: int) -> None:
    """Of this process from now on: heap and anonymous memory, so KV cells, compute buffers and
    copied weights, but not the mapped file (RLIMIT_DATA, Linux 4.7 and later)."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, hard))
