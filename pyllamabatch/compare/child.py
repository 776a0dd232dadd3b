"""Processes of ours that are told what to do, line by line, and end with their parent."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, Queue
from typing import IO

from pyllamabatch.errors import PyllamabatchError

LAST_WORDS = 6  # lines of its standard error in a failure's message
STOP_S = 5.0  # for a child that was told to end, before it is killed


class ChildFailed(PyllamabatchError):
    """A process of ours ended by itself, or did not answer in time."""


class Child:
    """`python -m MODULE ARGUMENTS`, which reads lines from its standard input (`lines_of_parent`)
    and answers on its standard output. Use as a context manager, or `stop` it.

    It ends when its input does, so also when this process is killed. A terminal's Ctrl-C does not
    reach it: whoever started it ends it.
    """

    def __init__(self, module: str, arguments: Sequence[str] = (), *, loud: bool = False) -> None:
        """loud: its standard error is ours; else it is kept for the message of a failure."""
        self._errors = None if loud else tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
            start_new_session=True,
            # ggml would let a debugger, if there is one, write to the output that we read
            env={"GGML_NO_BACKTRACE": "1"} | os.environ,
        )
        self.pid = self._process.pid
        self._lines: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._read, name="reads a child", daemon=True)
        self._reader.start()

    def tell(self, line: str) -> None:
        with suppress(OSError):  # it has ended: `answer` says so
            self._stdin.write(line + "\n")
            self._stdin.flush()

    def answer(self, timeout: float) -> str:
        """Its next line. ChildFailed when it has ended, or after `timeout` seconds."""
        try:
            line = self._lines.get(timeout=timeout)
        except Empty:
            raise ChildFailed(f"no answer from process {self.pid} in {timeout:g} s") from None
        if line is None:
            self._lines.put(None)  # for whoever asks again
            raise ChildFailed(self.how_it_ended())
        return line

    def how_it_ended(self) -> str:
        """Its exit status and the last lines that it wrote about it; waits for its end."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        status = self._process.poll()
        words = f"process {self.pid} ended with {status}"
        if status is None:
            words = f"process {self.pid} closed its output"
        if self._errors is None:
            return words
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace").strip()
        return "\n".join([words, *text.splitlines()[-LAST_WORDS:]])

    def ended(self, within_s: float = 0.0) -> bool:
        """Whether it has ended, or does so soon."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Ends it at once and waits for that; stopping twice is fine."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)


@contextmanager
def interrupts_later() -> Iterator[None]:
    """SIGINT and SIGTERM wait for the end of the block: for starting processes and noting who ends
    them, which nothing must come between."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread only
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def lines_of_parent() -> Iterator[str]:
    """In a child: the lines that the parent tells. The process ends as soon as the parent closes
    its end or is gone, whatever it is doing."""
    lines: Queue[str] = Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line.rstrip("\n"))
        os._exit(0)

    threading.Thread(target=read, name="reads the parent", daemon=True).start()
    while True:
        yield lines.get()


def log_to_stderr() -> None:
    """In a child: what llama.cpp logs, on the standard error."""
    logging.basicConfig(level=logging.DEBUG, format="%(process)d %(name)s: %(message)s")


def tell_parent(line: str) -> None:
    """In a child: an answer."""
    print(line, flush=True)
