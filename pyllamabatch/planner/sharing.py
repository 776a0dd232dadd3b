"""What processes that map one GGUF file share, as the kernel counts it (Linux).

`measure` starts N processes that load the same file and make a context each. It reads
/proc/PID/smaps_rollup of all of them when they have loaded, and when each has decoded a batch.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamabatch.errors import PyllamabatchError, UnsupportedOperation
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.host import PathLike
from pyllamabatch.llama.model import Model
from pyllamabatch.planner.residency import Projector

_FIELDS = {"rss": ("Rss",), "pss": ("Pss",), "shared": ("Shared_Clean", "Shared_Dirty")}
_CONTEXT: dict[str, Any] = {"n_batch": 64, "n_ubatch": 64}


@dataclass(frozen=True, slots=True)
class Shared:
    """Bytes of n processes in one state ("idle": loaded; "active": a batch is decoded), summed.

    rss: pages in memory; a shared page counts once for each process. pss: a shared page is divided
    by its sharers, so the sum is what is really taken. shared: the pages of rss that another
    process has, too. base: pss before loading. planned: base, the mapped file once, and n times
    what is private.
    """

    n: int
    state: str
    rss: int
    pss: int
    shared: int
    base: int
    planned: int


def measure(path: PathLike, n: int, n_ctx: int, n_gpu_layers: int = -1) -> list[Shared]:
    """n processes on the model at `path`, idle and then active.

    Raises UnsupportedOperation where the kernel does not say (systems other than Linux), and
    PyllamabatchError for a process that fails.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        raise UnsupportedOperation("this system has no /proc/PID/smaps_rollup")
    with Projector(path, n_gpu_layers=n_gpu_layers) as projector:
        host = projector.footprint(n_ctx=n_ctx, **_CONTEXT).host
    command = [sys.executable, "-m", __name__, str(path), str(n_ctx), str(n_gpu_layers)]
    pipe = subprocess.PIPE
    with ExitStack() as stack:
        children = []
        for _ in range(n):
            child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
            children.append(stack.enter_context(child))
            stack.callback(child.kill)
        base = _reached("ready", children)["pss"]
        planned = base + host.mapped + n * host.private
        return [
            Shared(n, state, **_reached(state, children), base=base, planned=planned)
            for state in ("idle", "active")
        ]


def _reached(state: str, children: list[subprocess.Popen[str]]) -> dict[str, int]:
    """Bytes by the names of `_FIELDS`, summed, once all children have reached the state."""
    for child in children if state != "ready" else ():
        assert child.stdin is not None
        print(state, file=child.stdin, flush=True)
    for child in children:
        assert child.stdout is not None
        if child.stdout.readline().strip() != state:
            raise PyllamabatchError(f"process {child.pid} failed before it was {state}")
    each = [rollup(child.pid) for child in children]
    return {name: sum(sizes[name] for sizes in each) for name in _FIELDS}


def rollup(pid: int, proc: Path = Path("/proc")) -> dict[str, int]:
    """Bytes of one process: rss, pss and shared, as in `Shared`.

    Raises OSError where the kernel does not say, and when there is no such process.
    """
    text = (proc / str(pid) / "smaps_rollup").read_text()
    lines = (line.split(":") for line in text.splitlines()[1:])
    kib = {name: int(rest[0].split()[0]) for name, *rest in lines}
    return {name: 1024 * sum(kib[field] for field in fields) for name, fields in _FIELDS.items()}


def _serve(path: str, n_ctx: int, n_gpu_layers: int) -> None:
    """A child: reach the states as the parent names them; end when the parent does."""
    print("ready", flush=True)
    sys.stdin.readline()
    with (
        Model(path, n_gpu_layers=n_gpu_layers) as model,
        Context(model, n_ctx=n_ctx, n_threads=1, **_CONTEXT) as context,
    ):
        print("idle", flush=True)
        sys.stdin.readline()
        batch = context.batch()
        batch.extend([1] * min(32, context.n_ctx_seq // 2), 0, 0)
        context.decode(batch)
        print("active", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
