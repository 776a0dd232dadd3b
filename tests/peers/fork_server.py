"""A server for each test of a suite, forked from a process that has imported everything: a start
costs milliseconds instead of seconds.

`main` is that process. `run` stands in the place of the server's binary: it passes arguments,
folder and output on, and ends with the server. Each ends when the other one does.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 120.0


def main(address: str, serve: Callable[[list[str]], int]) -> None:
    """Fork `serve(arguments)` for each connection, until this process is ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os._exit(_served(connection, serve))
            connection.close()


def _served(connection: socket.socket, serve: Callable[[list[str]], int]) -> int:
    message, files, _, _ = socket.recv_fds(connection, 2**16, 2)
    for file, standard in zip(files, (1, 2), strict=False):
        os.dup2(file, standard)

    def end_with_client() -> None:
        while connection.recv(1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        os._exit(1)

    threading.Thread(target=end_with_client, daemon=True).start()
    status = 1
    try:
        folder, arguments = json.loads(message)
        os.chdir(folder)
        status = serve(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(b"%d" % status)
    return status


def run(address: str, arguments: list[str]) -> int:
    """The server's exit status; 1 where it ended without one."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps([os.getcwd(), arguments]).encode()], [1, 2])
        signal.signal(signal.SIGTERM, lambda *_: connection.shutdown(socket.SHUT_WR))
        status = connection.recv(8)
        return int(status or b"1")


@contextmanager
def started(command: list[str], address: Path) -> Iterator[None]:
    """`command` runs `main` at `address`."""
    with subprocess.Popen(command) as process:
        try:
            end = time.monotonic() + START_SECONDS
            while not address.exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"no fork server after {START_SECONDS:g} s: {command}")
                time.sleep(0.1)
            yield
        finally:
            process.kill()


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1], sys.argv[2:]))
