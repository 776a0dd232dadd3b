"""A fleet of engines under test: its processes, and requests that run in threads."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.support.served import SUM

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
        found = []
        for one in self.process.children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                if "ServeReplica" in "".join(one.cmdline()):
                    found.append(one)
        return found

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def started(
    command: list[str], said: str = "http://", env: Mapping[str, str] | None = None
) -> Iterator[tuple[int, str]]:
    """The process, and its first line that has `said`. It is told to end, and leaves no process."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        children: list[psutil.Process] = []
        try:
            line = next(line for line in process.stdout if said in line)
            threading.Thread(target=process.stdout.read, daemon=True).start()
            children = psutil.Process(process.pid).children(recursive=True)
            yield process.pid, line
            process.send_signal(signal.SIGTERM)
            assert process.wait(90) == 0
        finally:
            process.kill()
    _, alive = psutil.wait_procs(children, 30)
    assert not alive


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
