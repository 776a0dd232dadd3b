"""Two replicas of the embedded model on Ray Serve, on this machine: pytest -m ray tests/cluster."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest

from tests.support.served import ANSWER, SUM, SUM_CHAT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SERVE = [sys.executable, "-m", "pyllamabatch", "serve", "--port", "0", "-t", "1", "-np", "4",
         "--kv-unified"]  # fmt: skip


@dataclass
class Fleet:
    url: str
    process: psutil.Process
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def replicas(self) -> list[psutil.Process]:
        of_all = self.process.children(recursive=True)
        return [one for one in of_all if "ServeReplica" in "".join(one.cmdline())]

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def started(command: list[str], said: str = "http://") -> Iterator[tuple[int, str]]:
    """The process, and its first line that has `said`. It is told to end, and leaves no process."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        threading.Thread(target=process.stdout.read, daemon=True).start()
        children = psutil.Process(process.pid).children(recursive=True)
        yield process.pid, line
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    _, alive = psutil.wait_procs(children, 30)
    assert not alive


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with started([*SERVE, "--replicas", "2"]) as (pid, line):
        yield Fleet(line.split()[1].rstrip(","), psutil.Process(pid))


@dataclass
class Asked:
    """A streamed request in a thread of its own."""

    fleet: Fleet
    body: dict[str, Any]
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        with self.fleet.client.stream("POST", TEXT, json={**self.body, "stream": True}) as response:
            for line in response.iter_lines():
                if line:
                    self.events.append(line.removeprefix("data: "))

    @property
    def end(self) -> str:
        self.thread.join(120)
        assert not self.thread.is_alive()
        return self.events[-1]


def endless(i: int, n: int = 400) -> dict[str, Any]:
    return {"prompt": f"{i} zebras are {SUM}", "ignore_eos": True, "max_tokens": n, "seed": i}


def test_answers_are_those_of_a_server(fleet: Fleet) -> None:
    answer = fleet.client.post(CHAT, json=SUM_CHAT).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    with fleet.client.stream("POST", CHAT, json={**SUM_CHAT, "stream": True}) as response:
        *events, done = [line[6:] for line in response.iter_lines() if line]
    assert done == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") for event in events]
    assert "".join(delta or "" for delta in deltas) == ANSWER
    refused = fleet.client.post(TEXT, json={"promt": SUM})
    assert refused.status_code == 400
    assert "prompt" in refused.json()["error"]["message"]
    assert fleet.client.get("/health").json() == {"status": "ok"}
    assert fleet.client.get("/v1/models").json()["data"][0]["id"] == "default.gguf"


def test_requests_are_spread_and_their_prefixes_found(fleet: Fleet) -> None:
    """Eight at once on two engines of four slots: none waits. Then each conversation goes on."""
    asked = [Asked(fleet, endless(i, 200)) for i in range(8)]
    until(lambda: fleet.metric("vllm:num_requests_running") == 8)
    assert [one.end for one in asked] == ["[DONE]"] * 8
    systems = [f"Animal {i} is fond of giraffes. " * 12 for i in range(4)]
    for turn in ("zebras", "lions", "giraffes"):
        before = fleet.metric("vllm:prefix_cache_hits_total")
        for system in systems:
            body = {"prompt": system + turn, "max_tokens": 2}
            assert fleet.client.post(TEXT, json=body).status_code == 200
        found = fleet.metric("vllm:prefix_cache_hits_total") - before
        assert turn == "zebras" or found > 4 * 50


def test_who_leaves_is_cancelled(fleet: Fleet) -> None:
    ended = 'vllm:request_success_total{finished_reason="cancelled"}'
    before = fleet.metric(ended)
    with fleet.client.stream("POST", TEXT, json={**endless(1), "stream": True}) as response:
        next(response.iter_lines())
    until(lambda: fleet.metric(ended) == before + 1)
    assert fleet.metric("vllm:num_requests_running") == 0


def test_a_replica_that_is_killed(fleet: Fleet) -> None:
    """Its streams end with an error that says so, those of the other one go on, a new one takes its
    place; what had no token yet is computed by another one."""
    asked = [Asked(fleet, endless(i)) for i in range(6)]
    until(lambda: all(len(one.events) > 3 for one in asked))
    late = [Asked(fleet, endless(100 + i, 20)) for i in range(4)]
    victim = fleet.replicas()[0]
    victim.kill()
    ends = [one.end for one in asked]
    lost = [json.loads(end)["error"]["code"] for end in ends if end != "[DONE]"]
    assert 0 < len(lost) < 6
    assert set(lost) == {"replica_lost"}
    assert [one.end for one in late] == ["[DONE]"] * 4
    until(lambda: len(fleet.replicas()) == 2 and victim not in fleet.replicas(), 120)
    until(lambda: fleet.client.get("/health").status_code == 200, 120)
    assert fleet.metric("vllm:num_requests_running") == 0


def test_a_body_that_is_too_large(fleet: Fleet) -> None:
    big = {"prompt": "a" * 40 * 2**20}
    assert fleet.client.post(TEXT, json=big).status_code == 413


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
