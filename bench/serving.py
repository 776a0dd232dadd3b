"""Who serves N clients: opened once per number of clients, then run in turn with the others."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bench.case import I32, Case, Measured
from pyllamabatch.compare.case import sampling_params
from pyllamabatch.compare.clients import at_once

if TYPE_CHECKING:
    from bench.server import ServerProcess
    from pyllamabatch.llama.model import Model


class WrongAnswer(Exception):
    """An answer that is not the work asked for: its time would mean nothing."""


class Serving(Protocol):
    """One way to serve, ready for the clients of a case.  `pids`: of processes that it keeps."""

    pids: tuple[int, ...]

    def warm_up(self) -> None:
        """What the first run would else pay for: connections, buffers, graphs."""

    def run(self, repeat: int) -> Measured:
        """All clients at once: wall time of prompts and tokens as `t_tg`."""

    def close(self, *, now: bool = False) -> None:
        """Free everything; `now`: also when somebody still waits for an answer."""


class Clients(ABC):
    """Serving by something that can be asked: a thread per client, one request each."""

    pids: tuple[int, ...] = ()

    def __init__(self, case: Case, n_vocab: int) -> None:
        self.case = case
        self._n_vocab = n_vocab

    @abstractmethod
    def ask(self, prompt: I32, tokens: int, seed: int) -> None:
        """Have `tokens` tokens generated and wait for them.  Called by many threads at once.
        Raises WrongAnswer when it was another number of prompt or generated tokens."""

    @abstractmethod
    def close(self, *, now: bool = False) -> None: ...

    @abstractmethod
    def connect(self) -> None:
        """By each client, before the time starts."""

    def warm_up(self) -> None:
        self._fire(0, min(8, self.case.tg))

    def run(self, repeat: int) -> Measured:
        """From the start of the first client to the end of the last.  Prompts are new in every
        repeat, so that a cache of prompts has nothing to give."""
        wall, each = self._fire(1 + repeat, self.case.tg)
        return Measured(
            0.0, wall, detail={"e2el_p50_s": float(np.median(each)), "e2el_max_s": max(each)}
        )

    def _fire(self, which: int, tokens: int) -> tuple[float, list[float]]:
        """Seconds in all, and of each client."""
        case = self.case
        prompts = case.prompts(self._n_vocab, which)

        def client(i: int, began: float) -> float:
            self.ask(prompts[i], tokens, case.seed + i)
            return time.perf_counter()

        def close() -> None:
            self.close(now=True)  # or those who still wait would keep us here

        at_once(case.pl, lambda i, began: self.connect(), close)
        began, ends = at_once(case.pl, client, close)
        return max(ends) - began, [end - began for end in ends]


class EngineClients(Clients):
    """Our engine in this process."""

    def __init__(self, case: Case, model: Model, limit_s: float) -> None:
        from pyllamabatch.engine.engine import Engine

        super().__init__(case, model.n_vocab)
        self._limit_s = limit_s
        self._engine = Engine(model, **case.context_params())

    def connect(self) -> None: ...

    def ask(self, prompt: I32, tokens: int, seed: int) -> None:
        params = sampling_params(self.case.sampling, seed, tokens)
        result = self._engine.submit(prompt, params).result(timeout=self._limit_s)
        check((result.n_prompt, result.n_generated), (len(prompt), tokens))

    def close(self, *, now: bool = False) -> None:
        self._engine.close(wait=not now)


class HttpClients(Clients):
    """A process that answers llama-server's POST /completion on loopback; at most one connection
    per client, kept open."""

    def __init__(
        self, case: Case, n_vocab: int, server: ServerProcess, limit_s: float, **extra: Any
    ) -> None:
        import httpx

        super().__init__(case, n_vocab)
        self._server = server
        self.pids = (server.pid,)
        self._body = request_body(case.sampling) | extra
        self._http = httpx.Client(
            base_url=server.url,
            timeout=limit_s,
            limits=httpx.Limits(max_connections=case.pl, max_keepalive_connections=case.pl),
            trust_env=False,  # no proxy between us and loopback
        )

    def connect(self) -> None:
        """A server may have closed a connection while others ran, at the moment we use it."""
        import httpx

        try:
            self._http.get("/health")
        except httpx.TransportError:
            self._http.get("/health")

    def ask(self, prompt: I32, tokens: int, seed: int) -> None:
        own = {"prompt": prompt.tolist(), "n_predict": tokens, "seed": seed}
        answer = self._http.post("/completion", json=self._body | own)
        if answer.status_code != 200:
            raise WrongAnswer(f"status {answer.status_code}: {answer.text[:300]}")
        values = answer.json()
        check((values["tokens_evaluated"], values["tokens_predicted"]), (len(prompt), tokens))

    def close(self, *, now: bool = False) -> None:
        self._server.stop()
        self._http.close()


class Tool:
    """Serving by a tool of llama.cpp that has its own clients: a process per run, which times
    itself once it is warm."""

    pids: tuple[int, ...] = ()

    def __init__(self, case: Case, work: Callable[[Case], Measured]) -> None:
        self._case = case
        self._work = work

    def warm_up(self) -> None: ...

    def run(self, repeat: int) -> Measured:
        return self._work(self._case)

    def close(self, *, now: bool = False) -> None: ...


def request_body(sampling: str) -> dict[str, Any]:
    """What every request to /completion says: llama-server's default sampling, said aloud."""
    return {
        "temperature": 0.0 if sampling == "greedy" else 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": False,
    }


def check(got: tuple[int, int], asked: tuple[int, int]) -> None:
    if got != asked:
        raise WrongAnswer(f"(prompt, generated) tokens were {got}, asked were {asked}")
