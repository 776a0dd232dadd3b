"""Server processes on loopback: started on a free port, waited for, ended by their own pid."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.cache import REPOSITORY
from bench.case import Case
from bench.tools import ToolError, tool

START_S = 180.0  # a model of gigabytes from a cold disk
STOP_S = 10.0


class ServerProcess:
    """`command` plus the port is running and healthy when this returns.

    Its output goes to `log`.  Raises ToolError with the log's end when it ends by itself or is not
    healthy in time.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
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
                self._child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()

    def _wait_until_healthy(self) -> None:
        import httpx

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
    """A port of loopback that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def llama_server(case: Case, *, backend_sampling: bool) -> list[str]:
    """llama-server with a slot per client, without anything that keeps prompts for later."""
    command = [
        str(tool("llama-server", log=False)), "-m", str(case.model.path), "--host", "127.0.0.1",
        "-c", str(case.n_ctx), "-np", str(case.pl), "-kvu" if case.kv_unified else "-no-kvu",
        "-b", str(case.n_batch), "-ub", str(case.n_ubatch),
        "-t", str(case.n_threads), "-tb", str(case.n_threads),
        "--cache-ram", "0", "--ctx-checkpoints", "0", "--no-cache-prompt", "-fit", "off",
        "--offline",
    ]  # fmt: skip
    if case.n_gpu_layers >= 0:
        command += ["-ngl", str(case.n_gpu_layers)]
    return [*command, "--backend-sampling"] if backend_sampling else command


def endpoint(case: Case, kind: str, *, gpu: bool) -> list[str]:
    """`bench.endpoint`, which serves with the library `kind`; `gpu`: it must use one."""
    values = asdict(case) | {"model": str(case.model.path), "gpu": gpu}
    return [sys.executable, "-m", "bench.endpoint", kind, json.dumps(values)]
