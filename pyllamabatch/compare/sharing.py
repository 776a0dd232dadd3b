"""What processes that map one GGUF file share, as the kernel counts it (Linux)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pyllamabatch.compare.child import START_S, Child
from pyllamabatch.errors import UnsupportedOperation
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.planner.residency import Projector

try:
    import psutil
except ImportError:
    psutil = None

_CONTEXT: dict[str, Any] = {"n_batch": 64, "n_ubatch": 64}


@dataclass(frozen=True, slots=True)
class Shared:
    """Bytes of n processes in one state ("idle": loaded; "active": a batch is decoded), summed.

    rss: pages in memory; a shared page counts once for each process. pss: a shared page is divided
    by its sharers, so the sum is what is really taken. shared: the pages of rss that another
    process has, too. base: pss before loading. planned: base, the mapped file once, and n times
    what is private."""

    n: int
    state: str
    rss: int
    pss: int
    shared: int
    base: int
    planned: int


def measure(path: Path, n: int, n_ctx: int, n_gpu_layers: int = -1) -> list[Shared]:
    """n processes on the model at `path`, idle and then active.

    Raises UnsupportedOperation where the kernel does not say (systems other than Linux) and without
    psutil, and ArmError for a process that fails."""
    if psutil is None or not Path("/proc/self/smaps").exists():
        raise UnsupportedOperation("this takes Linux and psutil: pip install 'pyllamabatch[cli]'")
    with Projector(path, n_gpu_layers=n_gpu_layers) as projector:
        host = projector.footprint(n_ctx=n_ctx, **_CONTEXT).host
    with ExitStack() as stack:
        children = [stack.enter_context(Child()) for _ in range(n)]
        for child in children:
            child.send((_serve, path, n_ctx, n_gpu_layers))
        base = _reached(children)["pss"]
        planned = base + host.mapped + n * host.private
        return [
            Shared(n, state, **_reached(children, state), base=base, planned=planned)
            for state in ("idle", "active")
        ]


def _reached(children: Sequence[Child], state: str = "") -> dict[str, int]:
    """Bytes of all children, once they have reached the state."""
    for child in children if state else ():
        child.send(state)
    for child in children:
        child.receive(START_S)
    each = [psutil.Process(child.pid).memory_full_info() for child in children]
    return {
        "rss": sum(sizes.rss for sizes in each),
        "pss": sum(sizes.pss for sizes in each),
        "shared": sum(max(0, sizes.rss - sizes.uss) for sizes in each),
    }


def _serve(pipe: Connection[Any, Any], path: Path, n_ctx: int, n_gpu_layers: int) -> None:
    """A child: each state once it is asked for."""
    pipe.send("ready")
    pipe.recv()
    with (
        Model(path, n_gpu_layers=n_gpu_layers) as model,
        Context(model, n_ctx=n_ctx, n_threads=1, **_CONTEXT) as context,
    ):
        pipe.send("idle")
        pipe.recv()
        batch = context.batch()
        batch.extend([1] * min(32, context.n_ctx_seq // 2), 0, 0)
        context.decode(batch)
        pipe.send("active")
        pipe.recv()
