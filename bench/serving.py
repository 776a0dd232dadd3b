"""What serves N clients: opened once for a number of clients, then run in turn with the others."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.cache import REPOSITORY
from bench.case import I32, Case, Measured
from bench.tools import ToolError
from pyllamabatch.compare.case import request_body, sampling_params
from pyllamabatch.compare.clients import at_once
from pyllamabatch.compare.completion import HOST
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model

START_S = 180.0  # a model of gigabytes from a cold disk
STOP_S = 10.0


def events_of(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The data of its server-sent events, as they come."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


class WrongAnswer(Exception):
    """An answer that is not the work asked for: its time would mean nothing."""


class Clients(ABC):
    """Something that serves, and a thread for each client of a case, one request each."""

    pids: tuple[int, ...] = ()  # processes that it has started

    def __init__(self, case: Case, n_vocab: int) -> None:
        self.case = case
        self._n_vocab = n_vocab

    @abstractmethod
    def ask(self, prompt: I32, tokens: int, seed: int) -> None:
        """Have `tokens` tokens generated and wait for them. Called by many threads at once.
        Raises WrongAnswer when it was another number of prompt or generated tokens."""

    @abstractmethod
    def close(self, *, now: bool = False) -> None:
        """Free everything; `now`: also when a client still waits for an answer."""

    def connect(self) -> None:
        """By each client, before the time starts."""
        return

    def warm_up(self) -> None:
        """What the first run would else pay for: connections, buffers, graphs."""
        self._fire(0, min(8, self.case.tg))

    def run(self, repeat: int) -> Measured:
        """From the start of the first client to the end of the last, as `t_tg`. Prompts are new in
        every repeat, so that a cache of prompts has nothing to give."""
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
            self.close(now=True)  # or the clients that still wait would hold this thread

        at_once(case.pl, lambda i, began: self.connect(), close)
        began, ends = at_once(case.pl, client, close)
        return max(ends) - began, [end - began for end in ends]


class EngineClients(Clients):
    """Our engine in this process."""

    def __init__(self, case: Case, model: Model, limit_s: float) -> None:
        super().__init__(case, model.n_vocab)
        self._limit_s = limit_s
        self._engine = Engine(model, speculate=None, **case.context_params())

    def ask(self, prompt: I32, tokens: int, seed: int) -> None:
        params = sampling_params(self.case.sampling, seed, tokens)
        result = self._engine.submit(prompt, params).result(timeout=self._limit_s)
        check((result.n_prompt, result.n_generated), (len(prompt), tokens))

    def close(self, *, now: bool = False) -> None:
        self._engine.close(wait=not now)


class HttpClients(Clients):
    """A process that answers llama-server's POST /completion on loopback; at most one connection
    for each client, which stays open."""

    def __init__(
        self, case: Case, n_vocab: int, server: ServerProcess, limit_s: float, **extra: Any
    ) -> None:
        super().__init__(case, n_vocab)
        self._server = server
        self.pids = (server.pid,)
        self._body = request_body(case.sampling) | {"cache_prompt": False} | extra
        self._http = httpx.Client(
            base_url=server.url,
            timeout=limit_s,
            limits=httpx.Limits(
                max_connections=case.pl,
                max_keepalive_connections=case.pl,
                keepalive_expiry=1.0,  # well before llama-server closes it: it does so after 5 s
            ),
            trust_env=False,  # no proxy on the way to loopback
        )

    def connect(self) -> None:
        """A server may have closed a connection while others ran, at the moment of its use."""
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
    """What times itself and begins anew with each run, as a tool of llama.cpp that is a process."""

    pids: tuple[int, ...] = ()

    def __init__(self, case: Case, work: Callable[[Case], Measured]) -> None:
        self._case = case
        self._work = work

    def warm_up(self) -> None: ...

    def run(self, repeat: int) -> Measured:
        return self._work(self._case)

    def close(self) -> None: ...


Serving = Clients | Tool
"""Opened once for a number of clients, then run in turn with the others."""


def check(got: tuple[int, int], asked: tuple[int, int]) -> None:
    if got != asked:
        raise WrongAnswer(f"(prompt, generated) tokens were {got}, asked were {asked}")


class ServerProcess:
    """`command` plus the port is running and healthy when this returns.

    Its output goes to `log`. Raises ToolError with the log's end when it ends by itself or is not
    healthy in time. `stop_s`: what it may take to end.
    """

    def __init__(self, command: list[str], log: Path, stop_s: float = STOP_S) -> None:
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        self._log = log
        self._stop_s = stop_s
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [*command, "--port", str(port)],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._child.pid
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the process and waits for it; stopping twice is fine."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(self._stop_s)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()

    def _wait_until_healthy(self) -> None:
        end = time.monotonic() + START_S
        with httpx.Client(base_url=self.url, timeout=5.0, trust_env=False) as http:
            while time.monotonic() < end:
                if self._child.poll() is not None:
                    raise ToolError(f"ended with {self._child.returncode}: {self._last_words()}")
                try:
                    if http.get("/health").status_code == 200:
                        return
                except httpx.TransportError:  # not listening yet
                    pass
                time.sleep(0.05)
        raise ToolError(f"not healthy after {START_S:g} s: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return "\n".join([*lines[-6:], f"({self._log})"])


def free_port() -> int:
    """A port of loopback that no process listens on at this moment."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def spread(generator: np.random.Generator, n: int, low: int, high: int) -> I32:
    """`n` sizes from low to high, evenly spread, in any order."""
    sizes = np.rint(np.linspace(low, high, n)).astype(np.int32)
    return generator.permutation(sizes if n > 1 else np.array([(low + high) // 2], np.int32))


def seen(answers: Iterable[tuple[float, Sequence[float]]]) -> dict[str, float]:
    """What readers have seen of answers: seconds to the first token and between two, at the median
    and the 99th percentile. An answer: when it was asked for, and when each token came."""
    first, between = [], []
    for asked, came in answers:
        first.append(came[0] - asked)
        between.append(np.diff(came))
    times = {"ttft": np.array(first), "itl": np.concatenate(between)}
    return {
        f"{name}_p{q}_s": float(np.percentile(values, q))
        for name, values in times.items()
        for q in (50, 99)
    }


@contextmanager
def busy(n: int) -> Iterator[None]:
    """`n` processes that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
