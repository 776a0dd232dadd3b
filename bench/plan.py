"""What `pyllamabatch plan` projects, beside what a real load then allocates.

Each layout is loaded by a process of its own, which tells what libllama says of its buffers
(`llama_get_memory_breakdown` of the real context), and on a GPU how much less memory the device has
free (`ggml_backend_dev_memory`). What the driver and the kernels of a process take is measured
apart, with the embedded model, and is in neither side. On a CPU the kernel gives pages as they are
touched: `pyllamabatch plan --measure` shows them.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import harness
from bench.case import Arm, Case, Measured, ModelFile
from bench.models import resolve
from bench.options import add_model, add_run
from bench.targets import Target, worst_detail
from bench.views import Column, by_arm
from pyllamabatch.llama import runtime
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.models import default_model_path
from pyllamabatch.planner.residency import Footprint, Projector, footprint_of
from pyllamabatch.report.records import Record

QUICK: dict[str, Any] = {}
SECONDS = 300  # of one load at most
MIB = 2**20


@dataclass(frozen=True)
class Layout:
    """A context to plan for, an arm of the bench."""

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

    @property
    def name(self) -> str:
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


TARGETS = (
    Target(
        "buffers: |allocated / projected - 1|, worst layout", worst_detail("buffers"), at_most=0.02
    ),
    Target("device: the same, by what is free", worst_detail("free"), at_most=0.02),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    layouts = QUICK_LAYOUTS if options.quick else LAYOUTS
    return harness.show(options, measure(layouts, options), len(layouts), "MiB, projected and real")


def measure(
    layouts: Sequence[Layout], options: argparse.Namespace
) -> Generator[Record, None, None]:
    model = resolve(options.model)
    recorder = harness.Recorder("plan", {}, options)
    for layout in layouts:
        if recorder.budget.spent():
            return
        case = Case(
            model, layout.n_ubatch, 1, layout.n_seq, options.threads, "none", options.seed,
            layout.kv == "unified", n_ubatch=layout.n_ubatch, n_gpu_layers=options.gpu_layers,
        )  # fmt: skip
        settings = {"n_kv_max": layout.n_ctx, "type_k": layout.type_kv, "type_v": layout.type_kv}
        found = load(model, layout, options.gpu_layers)
        measured = Measured(0.0, 0.0, settings, found["detail"], found["error"])
        includes = "model, context, a prompt of n_ubatch tokens and a step"
        arm = Arm(layout.name, includes, load, sampling=False)
        yield recorder.record(arm, case, 0, measured, **found["facts"])


def load(model: ModelFile, layout: Layout, n_gpu_layers: int) -> dict[str, Any]:
    """What a child has to say of it."""
    command = [sys.executable, "-m", "bench.plan", str(model.path), str(n_gpu_layers)]
    done = subprocess.run(
        [*command, json.dumps(asdict(layout))],
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        with Model(model.path, vocab_only=True) as shapes:
            facts = harness.facts_of(shapes)
        why = [str(done.returncode), *done.stderr.strip().splitlines()][-1]
        return {"facts": facts, "detail": {}, "error": why}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "error": ""}


def child(path: str, n_gpu_layers: int, layout: Layout) -> dict[str, Any]:
    """Project, load, compute, and compare; bytes in `detail`, and relative differences."""
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
        facts = harness.facts_of(model)
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
    return sum(d.free for d in runtime.devices().values() if d.kind != "cpu" and d.total)


def compute(model: Model, layout: Layout) -> None:
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


def view(records: Sequence[Record]) -> str:
    """MiB of each layout, projected and real, and how far they are apart."""
    columns = (
        Column("device: planned", "planned_device", ",.1f", 1 / MIB),
        Column("in buffers", "real_device", ",.1f", 1 / MIB),
        Column("by what is free", "taken", ",.1f", 1 / MIB),
        Column("error", "free", "+.2%"),
        Column("host: planned", "planned_host", ",.1f", 1 / MIB),
        Column("in buffers", "real_host", ",.1f", 1 / MIB),
        Column("error of all buffers", "buffers", "+.2%"),
    )
    return by_arm(records, columns, "layout")


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]), Layout(**json.loads(sys.argv[3])))))
