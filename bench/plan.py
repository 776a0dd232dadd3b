"""What `pyllamabatch plan` projects, beside what a real load then allocates.

Each layout is loaded by a process of its own, which tells what libllama says of its buffers
(`llama_get_memory_breakdown` of the real context), and on a GPU how much less memory the device has
free (`ggml_backend_dev_memory`). What the driver and the kernels of a process take is measured
apart, with the embedded model, and is in neither side. On a CPU the kernel gives pages as they are
touched: `pyllamabatch plan --measure` shows them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench import schema
from bench.models import BenchModel, resolve
from bench.options import Budget, add_model, add_run, out_file
from bench.targets import Figure, Target

if TYPE_CHECKING:
    from pyllamabatch.llama.context import Context
    from pyllamabatch.llama.model import Model
    from pyllamabatch.planner.residency import Footprint

QUICK: dict[str, Any] = {}
SECONDS = 300  # of one load at most
MIB = 2**20


@dataclass(frozen=True)
class Layout:
    """A context to plan for."""

    n_seq: int
    n_ctx: int
    kv: str = "unified"
    n_ubatch: int = 512
    type_kv: str = "f16"

    def params(self) -> dict[str, Any]:
        """Of `Context`; an output for each sequence, as the engine has it."""
        return {
            "n_ctx": self.n_ctx,
            "n_seq_max": self.n_seq,
            "kv_unified": self.kv == "unified",
            "n_ubatch": self.n_ubatch,
            "type_k": self.type_kv,
            "type_v": self.type_kv,
        }

    def __str__(self) -> str:
        return f"{self.n_seq} x {self.n_ctx // self.n_seq} cells, {self.kv}, " + (
            f"n_ubatch {self.n_ubatch}, {self.type_kv}"
        )


LAYOUTS = (
    Layout(1, 4096),
    Layout(16, 32768),
    Layout(16, 32768, "streams"),
    Layout(64, 65536),
    Layout(64, 65536, "streams"),
    Layout(16, 32768, n_ubatch=2048),
    Layout(16, 32768, type_kv="q8_0"),
)
QUICK_LAYOUTS = (Layout(1, 2048), Layout(8, 8192), Layout(8, 8192, "streams"))


def error_of(name: str) -> Figure:
    def figure(rows: Sequence[schema.Row]) -> float | None:
        found = [abs(row.detail[name]) for row in rows if name in row.detail]
        return max(found) if found else None

    return figure


TARGETS = (
    Target("buffers: |allocated / projected - 1|, worst layout", error_of("buffers"), at_most=0.02),
    Target("device: the same, by what is free", error_of("free"), at_most=0.02),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    model = resolve(options.model)
    out, rows = None, []
    for row in measure(options, model):
        out = out or out_file(options, "plan", options.model.split("/")[-1], row.gpu_info)
        schema.append(out, [row])
        rows.append(row)
    print(view(rows))
    print(f"rows: {out}")
    return 1 if any(row.error for row in rows) else 0


def measure(options: argparse.Namespace, model: BenchModel) -> Iterator[schema.Row]:
    run_id = uuid.uuid4().hex[:12]
    budget = Budget(options.budget)
    for layout in QUICK_LAYOUTS if options.quick else LAYOUTS:
        if budget.spent():
            return
        moment = schema.now()
        found = load(model, layout, options.gpu_layers)
        yield schema.Row(
            bench="plan",
            arm=str(layout),
            includes="model, context, a prompt of n_ubatch tokens and a step",
            run_id=run_id,
            repeat=0,
            sampling="none",
            **schema.machine(),
            **found["facts"],
            **moment,
            model_filename=model.path.name,
            model_seed=model.seed,
            seed=options.seed,
            n_kv_max=layout.n_ctx,
            n_batch=2048,
            n_ubatch=layout.n_ubatch,
            flash_attn=-1,
            kv_unified=layout.kv == "unified",
            type_k=layout.type_kv,
            type_v=layout.type_kv,
            n_gpu_layers=options.gpu_layers,
            n_threads=options.threads,
            n_threads_batch=options.threads,
            pp=layout.n_ubatch,
            tg=1,
            pl=layout.n_seq,
            n_kv=layout.n_ubatch + 1,
            detail=found["detail"],
            error=found["error"],
            **schema.speeds(pp=0, tg=0, pl=0, t_pp=0.0, t_tg=0.0),
        )


def load(model: BenchModel, layout: Layout, n_gpu_layers: int) -> dict[str, Any]:
    """What a child has to say of it."""
    command = [sys.executable, "-m", "bench.plan", str(model.path), str(n_gpu_layers)]
    done = subprocess.run(
        [*command, json.dumps(asdict(layout))],
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        from pyllamabatch.llama.model import Model

        with Model(model.path, vocab_only=True) as shapes:
            facts = _facts(shapes)
        return {"facts": facts, "detail": {}, "error": done.stderr[-600:] or str(done.returncode)}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "error": ""}


def _facts(model: Model) -> dict[str, Any]:
    from pyllamabatch.report import facts

    return schema.build() | facts.about(model)


def child(path: str, n_gpu_layers: int, layout: Layout) -> dict[str, Any]:
    """Project, load, compute, and compare; bytes in `detail`, and relative differences."""
    from pyllamabatch.llama.context import Context
    from pyllamabatch.llama.model import Model
    from pyllamabatch.models import default_model_path
    from pyllamabatch.planner.residency import Projector, footprint_of

    params = layout.params()
    start = free()
    with Projector(path, n_gpu_layers=n_gpu_layers) as projector:
        planned = projector.footprint(**params)
    small = Layout(layout.n_seq, 256 * layout.n_seq, layout.kv, layout.n_ubatch, layout.type_kv)
    with Model(default_model_path(), n_gpu_layers=n_gpu_layers) as model:
        compute(model, small)
    before = free()
    with Model(path, n_gpu_layers=n_gpu_layers) as model:
        weights = before - free()
        with Context(model, n_outputs_max=layout.n_seq, **params) as context:
            decode(context)
            after = free()
            real = footprint_of(context, layout.n_seq, mmap=planned.host.mapped > 0)
        facts = _facts(model)
    detail: dict[str, float] = {
        "planned_device": planned.device.total,
        "planned_host": planned.host.total,
        "real_device": real.device.total,
        "real_host": real.host.total,
        "fixed": start - before,
        "taken": before - after,
        "taken_by_weights": weights,
        "buffers": in_buffers(real) / in_buffers(planned) - 1,
        "context_buffers": in_contexts(real) / in_contexts(planned) - 1,
    }
    if planned.device.total:
        detail["free"] = (before - after) / planned.device.total - 1
    return {"facts": facts, "detail": detail}


def in_buffers(found: Footprint) -> int:
    """Bytes that libllama tells of; the buffer of the logits it doesn't."""
    return found.total - found.host.logits


def in_contexts(found: Footprint) -> int:
    """The same, of the context alone."""
    return found.device.context + found.host.context - found.host.logits


def free() -> int:
    """Bytes that the GPUs have free, for all processes; 0 without one."""
    from pyllamabatch.llama import runtime

    return sum(d.free for d in runtime.devices().values() if d.kind != "cpu" and d.total)


def compute(model: Model, layout: Layout) -> None:
    from pyllamabatch.llama.context import Context

    with Context(model, n_outputs_max=layout.n_seq, **layout.params()) as context:
        decode(context)


def decode(context: Context) -> None:
    """A prompt of n_ubatch tokens, or what a sequence has room for, and a step of all sequences."""
    batch = context.batch()
    n = min(context.n_ubatch, context.n_ctx_seq - 1)
    batch.extend([1] * n, 0, 0, logits=False)
    context.decode(batch)
    batch.clear()
    for seq in range(context.n_seq_max):
        batch.add(1, n if seq == 0 else 0, seq, logits=True)
    context.decode(batch)


def view(rows: Sequence[schema.Row]) -> str:
    """MiB of each layout, projected and real, and how far they are apart."""
    lines = [
        "| layout | device: planned | in buffers | by what is free | error | host: planned "
        "| in buffers | error of all buffers |",
        "|---|" + "---:|" * 7,
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.arm} | {row.error.splitlines()[-1]} |" + " |" * 6)
            continue
        d = row.detail
        columns = ["planned_device", "real_device", "taken", "free"]
        columns += ["planned_host", "real_host", "buffers"]
        cells = [
            "" if name not in d else f"{d[name]:+.2%}" if name in ("free", "buffers")
            else f"{d[name] / MIB:,.1f}"
            for name in columns
        ]  # fmt: skip
        lines.append(f"| {row.arm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]), Layout(**json.loads(sys.argv[3])))))
