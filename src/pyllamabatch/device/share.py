"""What processes that map one GGUF file share, as the kernel counts it (Linux).

`measure` starts N processes that load the same file and make a context each, reads
/proc/PID/smaps_rollup of all of them while they are idle and while they decode, and ends them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import IO

from pyllamabatch._model_params import PathLike
from pyllamabatch.device.residency import Projector
from pyllamabatch.errors import PyllamabatchError, UnsupportedOperation

SECONDS = 120  # a child ends itself after that, whatever happens
_FIELDS = {"rss": ("Rss",), "pss": ("Pss",), "shared": ("Shared_Clean", "Shared_Dirty")}


@dataclass(frozen=True, slots=True)
class Shared:
    """Bytes of n processes in one state ("idle": loaded; "active": decoding), summed.

    rss: pages in memory, shared ones counted for each; pss: shared ones divided by their sharers,
    so that the sum is what is really taken; shared: the pages of rss that another process has, too.
    base: pss before loading. planned: base, the mapped file once, and n times what is private.
    """

    n: int
    state: str
    rss: int
    pss: int
    shared: int
    base: int
    planned: int


def measure(path: PathLike, n: int, n_ctx: int, n_gpu_layers: int = -1) -> list[Shared]:
    """n processes on the model at `path`, idle and then active. Raises UnsupportedOperation where
    the kernel does not say (other systems than Linux), PyllamabatchError for a child that fails."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise UnsupportedOperation("this system has no /proc/PID/smaps_rollup")
    with Projector(path, n_gpu_layers=n_gpu_layers) as projector:
        host = projector.footprint(n_ctx=n_ctx, **_CONTEXT).host
    command = [sys.executable, "-m", "pyllamabatch.device.share", str(path)]
    command += [str(n_ctx), str(n_gpu_layers)]
    found = []
    with ExitStack() as stack:
        children = [stack.enter_context(_Child(command)) for _ in range(n)]
        for child in children:
            child.wait_for("ready")
        base = _sum(children)["pss"]
        for state in ("idle", "active"):
            for child in children:
                child.tell(state)
            for child in children:
                child.wait_for(state)
            sizes = _sum(children)
            planned = base + host.mapped + n * host.private
            found.append(Shared(n, state, **sizes, base=base, planned=planned))
    return found


_CONTEXT = {"n_batch": 64, "n_ubatch": 64}


class _Child:
    """A process of ours: it ends with the block, or by itself after `SECONDS`."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self._process.pid
        self._lines: Queue[str] = Queue()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[str] = self._process.stdin
        self._reader = Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._lines.put(line.strip())
        self._lines.put("")

    def tell(self, word: str) -> None:
        with suppress(OSError):  # it has ended: `wait_for` says so
            self._stdin.write(word + "\n")
            self._stdin.flush()

    def wait_for(self, word: str) -> None:
        try:
            line = self._lines.get(timeout=SECONDS)
        except Empty:
            line = "no answer"
        if line != word:
            raise PyllamabatchError(f"a measured process failed: {line or 'it ended'}")

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        with suppress(OSError):
            self._stdin.close()
        if self._process.stdout is not None:
            self._process.stdout.close()


def rollup(pid: int, proc: Path = Path("/proc")) -> dict[str, int]:
    """Bytes of one process by the names of `Shared`'s sizes: rss, pss, shared. Raises OSError where
    the kernel does not say, or when there is no such process (any more)."""
    text = (proc / str(pid) / "smaps_rollup").read_text()
    lines = (line.split(":") for line in text.splitlines()[1:])
    kib = {name: int(rest[0].split()[0]) for name, *rest in lines}
    return {name: 1024 * sum(kib[field] for field in fields) for name, fields in _FIELDS.items()}


def _sum(children: list[_Child]) -> dict[str, int]:
    each = [rollup(child.pid) for child in children]
    return {name: sum(sizes[name] for sizes in each) for name in _FIELDS}


def _serve(path: str, n_ctx: int, n_gpu_layers: int) -> None:
    """A child: load when told "idle", compute when told "active" until the parent ends it."""
    from pyllamabatch.model import Model

    signal.alarm(SECONDS)
    words = iter(sys.stdin.readline, "")

    def answer(word: str) -> None:
        print(word, flush=True)

    answer("ready")
    next(words)
    with (
        Model(path, n_gpu_layers=n_gpu_layers) as model,
        model.context(n_ctx=n_ctx, n_threads=1, **_CONTEXT) as context,
    ):
        answer("idle")
        next(words)
        batch = context.batch()
        batch.extend([1] * min(32, context.n_ctx_seq // 2), 0, 0)
        said = False
        while True:
            context.memory.clear(data=False)
            context.decode(batch)
            if not said:
                answer("active")
                said = True


if __name__ == "__main__":
    with suppress(StopIteration, KeyboardInterrupt):
        _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
