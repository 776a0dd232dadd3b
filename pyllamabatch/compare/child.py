"""Functions of ours in processes of their own, at the other end of a pipe."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from pyllamabatch.errors import PyllamabatchError

START_S = 300.0  # until a process has loaded a model of many gigabytes from a cold disk
LAST_WORDS = 6  # lines of a process's standard error in the message about its end
STOP_S = 5.0  # for a process that closed its pipe, before its end is no longer waited for


class ArmError(PyllamabatchError):
    """A process of an arm failed, ended, or did not answer in time."""


class Child:
    """A process that does `work(pipe, *arguments)` when told to.

        with Child() as child:
            child.send((host, case))    # a function of a module: host(pipe, case)
            ready = child.receive(60.0)

    It ends when it is stopped or forgotten, and when this process ends, also by a kill. A
    terminal's Ctrl-C does not reach it. POSIX."""

    def __init__(self, *, loud: bool = False) -> None:
        """loud: what it logs goes to our standard error, else into the message about its end."""
        self._pipe, theirs = Pipe()
        self._errors = None if loud else tempfile.TemporaryFile()  # noqa: SIM115
        output = self._errors or sys.stderr.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import run; run({theirs.fileno()}, {loud})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,  # nothing comes through it but its end
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={"GGML_NO_BACKTRACE": "1"} | os.environ,  # a debugger would hold its end up
        )
        theirs.close()
        self.pid = self._process.pid

    def send(self, value: Any) -> None:
        """First the work and its arguments, then what the work receives."""
        with suppress(OSError):  # it has ended: `receive` says so
            self._pipe.send(value)

    def receive(self, timeout: float) -> Any:
        """What it sends next. ArmError when it failed or has ended, or after `timeout` seconds."""
        try:
            if not self._pipe.poll(timeout):
                raise ArmError(f"no answer from process {self.pid} in {timeout:g} s")
            value = self._pipe.recv()
        except (EOFError, OSError):
            raise ArmError(self.end(STOP_S) or f"process {self.pid} closed its pipe") from None
        if isinstance(value, ArmError):
            raise value
        return value

    def end(self, within_s: float) -> str:
        """Its exit status and the last lines that it wrote; "" while it goes on."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return ""
        lines: list[str] = []
        if self._errors is not None:
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        ended = f"process {self.pid} ended with {self._process.returncode}"
        return "\n".join([ended, *lines[-LAST_WORDS:]])

    def stop(self) -> None:
        """End it at once and wait for that. Stopping twice is fine."""
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._pipe, self._errors):
            if file is not None:
                file.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def run(descriptor: int, loud: bool) -> None:
    """In the process: do what the parent says, and tell it why that failed."""

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if loud:
        logging.basicConfig(level=logging.DEBUG, format="%(process)d %(name)s: %(message)s")
    pipe: Connection[Any, Any] = Connection(descriptor)
    work, *arguments = pipe.recv()
    try:
        work(pipe, *arguments)
    except Exception as error:
        pipe.send(ArmError(f"{type(error).__name__}: {error}"))
