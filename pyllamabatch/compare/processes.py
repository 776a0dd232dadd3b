"""The arm of N processes: workers behind a router, and their clients in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from pyllamabatch.compare.case import Case
from pyllamabatch.compare.child import ArmError, Child
from pyllamabatch.compare.clients import ask_all, at_once, note
from pyllamabatch.compare.hosted import START_S, for_a_child
from pyllamabatch.compare.loop import Loop, loop_of
from pyllamabatch.compare.server import Json, RoundRobin, Server, ThreadingServer, completion
from pyllamabatch.compare.workload import BURST, Timings, Workload
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model

GONE_S = 0.2  # a worker whose connections have ended may need so long to end, too


class Processes:
    """A worker for each sequence, and a router. `case`: with the threads of one worker;
    memory_limit: of each worker, in bytes; 0: none."""

    def __init__(self, case: Case, sampler: str, memory_limit: int, verbose: bool) -> None:
        self._case = case
        self._sampler = sampler
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
        self.port = 0  # the router's
        self._n_vocab = 0

    def load(self) -> None:
        one = for_a_child(replace(self._case, pl=1))
        for worker in self._workers:
            worker.do(serve, one, self._sampler, self._memory_limit)
        ports = []
        for i, worker in enumerate(self._workers):
            try:
                port, self._n_vocab = worker.receive(START_S)
            except ArmError as error:
                raise ArmError(f"{error}\n{self._not_started(i)}") from None
            ports.append(port)
        self._router.do(route, ports)
        self.port = self._router.receive(START_S)

    def _not_started(self, i: int) -> str:
        words = f"worker {i} of {len(self._workers)} did not start"
        if limit := self._memory_limit:
            words += f" with {limit / 2**20:.0f} MiB of heap and anonymous memory at most"
        return words

    def run(self, workload: Workload, limit_s: float) -> Timings:
        """In a burst each worker gets two requests: one for the prompt and the first token, and
        when all have that, one to go on. The router's turns bring each to every worker once."""
        burst = workload.protocol == BURST
        prompts = workload.prompts(self._case, self._n_vocab).tolist()

        def begin(i: int) -> Iterator[Json]:
            n_first = 1 if burst else workload.tokens
            body = {"prompt": prompts[i], "n_predict": n_first, "seed": self._case.seed + i}
            return tokens(completion(self.port, body | {"keep": burst}, limit_s))

        def go_on(i: int, began: float) -> None:
            body = {"prompt": [], "n_predict": workload.tokens - 1}
            note(timings.requests[i], tokens(completion(self.port, body, limit_s)))

        timings = ask_all(workload, begin, self.close)
        if burst and not any(one.error for one in timings.requests):
            timings.begin, _ = at_once(len(prompts), go_on, self.close)
        lost = [one for one in timings.requests if one.error]
        ended = [w.how_it_ended() for w in self._workers if w.ended(GONE_S)] if lost else []
        for one in lost:
            one.error = "; ".join([one.error, *ended])
        return timings

    def close(self) -> None:
        self._stack.close()


def tokens(lines: Iterable[Json]) -> Iterator[Json]:
    return (line for line in lines if "token" in line)


def serve(pipe: Connection[Any, Any], case: Case, sampler: str, memory_limit: int) -> None:
    """A worker: its own model (the file is mapped, its pages are shared) and its own context, for
    one request at a time. Sends its port and the size of the vocabulary."""
    if memory_limit:
        limit_memory(memory_limit)
    model = Model(case.model.path, n_gpu_layers=case.n_gpu_layers)
    context = Context(model, **case.context_params())
    loop = loop_of(sampler, context, case.sampling, case.n_threads)
    server = Server(lambda body: complete(loop, body))
    pipe.send((server.server_port, model.n_vocab))
    server.serve_forever()


def complete(loop: Loop, body: Json) -> Iterator[Json]:
    """`n_predict` tokens after the prompt. With "keep" the sequence stays, and a request with an
    empty prompt goes on with it."""
    if body["prompt"]:
        loop.stop(0)
        loop.start(0, body["prompt"], body["seed"])
    for _ in range(body["n_predict"]):
        while not (sampled := loop.step()):
            pass
        yield {"token": sampled[0]}
    if not body.get("keep"):
        loop.stop(0)
    yield {"done": True}


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
