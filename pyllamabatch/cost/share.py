"""What processes that map one GGUF file share, as the kernel counts it (Linux).

`measure` starts N processes that load the same file and make a context each, reads
/proc/PID/smaps_rollup of all of them while they are idle and while they decode, and ends them.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamabatch.compare.child import Child, lines_of_parent, tell_parent
from pyllamabatch.errors import PyllamabatchError, UnsupportedOperation
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.host import PathLike
from pyllamabatch.planner.residency import Projector

MODULE = "pyllamabatch.cost.share"
SECONDS = 120  # to wait for a child's answer
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
    arguments = [str(path), str(n_ctx), str(n_gpu_layers)]
    found = []
    with ExitStack() as stack:
        children = [stack.enter_context(Child(MODULE, arguments)) for _ in range(n)]
        for child in children:
            _wait_for(child, "ready")
        base = _sum(children)["pss"]
        for state in ("idle", "active"):
            for child in children:
                child.tell(state)
            for child in children:
                _wait_for(child, state)
            sizes = _sum(children)
            planned = base + host.mapped + n * host.private
            found.append(Shared(n, state, **sizes, base=base, planned=planned))
    return found


_CONTEXT: dict[str, Any] = {"n_batch": 64, "n_ubatch": 64}


def _wait_for(child: Child, word: str) -> None:
    line = child.answer(SECONDS)
    if line != word:
        raise PyllamabatchError(f"a measured process failed: {line}")


def rollup(pid: int, proc: Path = Path("/proc")) -> dict[str, int]:
    """Bytes of one process by the names of `Shared`'s sizes: rss, pss, shared. Raises OSError where
    the kernel does not say, or when there is no such process (any more)."""
    text = (proc / str(pid) / "smaps_rollup").read_text()
    lines = (line.split(":") for line in text.splitlines()[1:])
    kib = {name: int(rest[0].split()[0]) for name, *rest in lines}
    return {name: 1024 * sum(kib[field] for field in fields) for name, fields in _FIELDS.items()}


def _sum(children: list[Child]) -> dict[str, int]:
    each = [rollup(child.pid) for child in children]
    return {name: sum(sizes[name] for sizes in each) for name in _FIELDS}


def _serve(path: str, n_ctx: int, n_gpu_layers: int) -> None:
    """A child: load when told "idle", compute when told "active" until the parent ends it."""
    from pyllamabatch.llama.model import Model

    words = lines_of_parent()
    tell_parent("ready")
    next(words)
    with (
        Model(path, n_gpu_layers=n_gpu_layers) as model,
        Context(model, n_ctx=n_ctx, n_threads=1, **_CONTEXT) as context,
    ):
        tell_parent("idle")
        next(words)
        batch = context.batch()
        batch.extend([1] * min(32, context.n_ctx_seq // 2), 0, 0)
        said = False
        while True:
            context.memory.clear(data=False)
            context.decode(batch)
            if not said:
                tell_parent("active")
                said = True


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
