"""What a context takes up, before anything is allocated, and how many of them a machine holds.

`Projector` loads a model without its weights and makes contexts without their buffers; libllama
then says what they would be (`plb_memory_breakdown`). The buffer of the logits is added (n_outputs
x n_vocab x 4 bytes, src/llama-context.cpp: `output_reserve`), and what a device takes to sample.

A machine is two limits: what its device may hold (a GPU's memory; on a Mac the working set that
Metal recommends, or `iogpu.wired_limit_mb`), and its memory. Weights that are mapped from the file
are in memory once for all processes. But an active Metal process wires all that its graphs touch,
mapped pages too, so each active process counts whole against the working set. A CUDA process has a
copy of its own."""

from __future__ import annotations

import logging
from bisect import bisect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import astuple, dataclass, replace
from typing import Any, NamedTuple

from pyllamabatch.errors import NotEnoughMemory, integer
from pyllamabatch.llama import runtime
from pyllamabatch.llama.context import Context, device_computes_all
from pyllamabatch.llama.handle import Owner
from pyllamabatch.llama.host import PathLike, host_available
from pyllamabatch.llama.limits import MAX_CTX, memory_parts
from pyllamabatch.llama.model import Model
from pyllamabatch.planner.machines import Machine

log = logging.getLogger(__name__)

_CELLS = 2**20  # of the largest context that is projected
_SPARE = 1 / 16  # of what is free, where n_ctx is chosen: for what is not projected


@dataclass(frozen=True, slots=True)
class MemoryPool:
    """Bytes in one place. mapped: weights that are pages of the file; copied: weights in memory of
    the process's own; kv: cells and states; compute: graphs; logits: the output buffer; decode:
    graphs of decoding, which get their memory with the first step."""

    mapped: int = 0
    copied: int = 0
    kv: int = 0
    compute: int = 0
    logits: int = 0
    decode: int = 0

    @property
    def context(self) -> int:
        """What each further context adds."""
        return self.kv + self.compute + self.logits + self.decode

    @property
    def private(self) -> int:
        """What each further process adds, where mapped pages are shared."""
        return self.copied + self.context

    @property
    def total(self) -> int:
        return self.mapped + self.private

    def plus(self, other: MemoryPool, times: float = 1) -> MemoryPool:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return MemoryPool(*(round(a + times * b) for a, b in pairs))


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model and one context of it: on the device, and in the host's memory. Without a device
    everything is the host's."""

    device: MemoryPool = MemoryPool()
    host: MemoryPool = MemoryPool()

    @property
    def total(self) -> int:
        return self.device.total + self.host.total

    def plus(self, other: Footprint, times: float = 1) -> Footprint:
        return Footprint(self.device.plus(other.device, times), self.host.plus(other.host, times))

    def check(self, machine: Machine, n_processes: int = 1, n_contexts: int = 1) -> bool:
        """Do so many processes, with so many of these contexts each, fit while all are active?"""
        return all(used <= limit for used, limit in self.use(machine, n_processes, n_contexts))

    def use(
        self, machine: Machine, n_processes: int = 1, n_contexts: int = 1
    ) -> list[tuple[int, int]]:
        """(bytes in use, limit): of the device, and of the host's memory."""
        more = n_contexts - 1
        device = self.device.total + more * self.device.context + machine.process_overhead
        host = self.host.private + more * self.host.context
        if machine.kind == "metal":  # one memory: its wired part, and all of it
            shared = self.device.mapped + self.host.mapped
            private = device - self.device.mapped + host
            return [
                (n_processes * device, machine.device_limit),
                (shared + n_processes * private, machine.memory),
            ]
        in_host = self.host.mapped + n_processes * host, machine.memory
        if machine.kind == "cpu":
            return [in_host]
        return [(n_processes * device, machine.device_limit), in_host]


class Projector(Owner):
    """Footprints of a model's contexts. Loads the vocabulary and the shapes, no weights."""

    def __init__(self, path: PathLike, *, mmap: bool = True, **model_params: Any) -> None:
        """mmap: the model will be mapped, as is libllama's default. model_params: as for `Model`
        (devices, n_gpu_layers, splits, ...)."""
        self.model = Model(path, no_alloc=True, **model_params)
        self._mmap = mmap and runtime.mmap_works()

    @classmethod
    def of(cls, model: Model) -> Projector:
        """Of a model that is loaded."""
        load: dict[str, Any] = model._load
        return cls(model.path, mmap=model._load_mode in ("auto", "mmap"), **load)

    @property
    def ptr(self) -> Any:
        return self.model.ptr

    def close(self) -> None:
        self.model.close()

    def footprint(
        self, *, n_ctx: int = 0, n_seq_max: int = 1, n_outputs: int = 0, **context_params: Any
    ) -> Footprint:
        """Of one context with these parameters. n_outputs: rows with output in one step (0:
        n_seq_max). Raises what `Context` raises for the parameters.

        libllama keeps notes on every cell even so (about 50 bytes): contexts of more than 2**20
        cells follow from two smaller ones; sizes are linear by then."""
        n_outputs = n_outputs or n_seq_max
        if n_ctx > _CELLS:
            given = {"n_seq_max": n_seq_max, "n_outputs": n_outputs, **context_params}
            half = self.footprint(n_ctx=_CELLS // 2, **given)
            full = self.footprint(n_ctx=_CELLS, **given)
            return full.plus(full.plus(half, -1), 2 * (n_ctx / _CELLS - 1))
        params = {"n_outputs_max": n_outputs, **context_params}
        with Context(self.model, n_ctx=n_ctx, n_seq_max=n_seq_max, **params) as context:
            found = footprint_of(context, n_outputs, mmap=self._mmap)
            n_ctx, decodes = context.n_ctx, context.capabilities.has_memory
            least = max(n_seq_max, context.n_rs_seq + 2)
            few = {"n_batch": least, "n_ubatch": least, "n_outputs_max": n_seq_max}
            if not decodes or params.get("embeddings") or context.n_ubatch <= least:
                return found
        # vendor/patches/graph-of-decoding.patch: a scheduler with buffers of its own.
        with Context(self.model, n_ctx=n_ctx, n_seq_max=n_seq_max, **params | few) as context:
            graphs = footprint_of(context, n_seq_max, mmap=self._mmap)
        return Footprint(
            replace(found.device, decode=graphs.device.compute),
            replace(found.host, decode=graphs.host.compute),
        )


def footprint_of(context: Context, n_outputs: int, *, mmap: bool) -> Footprint:
    """Of a context of a no_alloc model."""
    devices = runtime.devices()
    n_outputs = max(n_outputs, context.n_seq_max)
    found = Footprint(host=MemoryPool(logits=4 * n_outputs * context.model.n_vocab))
    if context.model.offloaded:
        found = found.plus(device_sampling(context.model, n_outputs))
    for part in memory_parts(context):
        known = devices.get(part.device)
        on_cpu = known is None or known.kind == "cpu" or part.host
        # Metal's buffers are mapped too; other devices, and repacked weights, are copies.
        mapped = mmap and (part.host if on_cpu else part.buffer_type.startswith("MTL"))
        weights = MemoryPool(mapped=part.model) if mapped else MemoryPool(copied=part.model)
        new = replace(weights, kv=part.context, compute=part.compute)
        found = found.plus(Footprint(host=new) if on_cpu else Footprint(device=new))
    if mmap and found.device == MemoryPool() and found.host.mapped:
        # One mapping from the first to the last tensor, those that are copied from it included.
        found = Footprint(host=replace(found.host, mapped=context.model.size_bytes))
    return found


def device_sampling(model: Model, n_outputs: int) -> Footprint:
    """What a context takes beside, once its device chooses the candidates of each row: a copy of
    the rows of logits and of one more. Metal sorts in two more rows of each (ggml-metal.cpp:
    `ggml_backend_metal_buffer_type_get_alloc_size`)."""
    on_mac = all(device.on_mac for device in model.devices())
    copies = (n_outputs + 1) * 4 * model.n_vocab
    return Footprint(MemoryPool(compute=(3 if on_mac else 1) * copies))


def by_size(weights: int, n_ctx: int, kv_per_cell: int, graphs: int, machine: Machine) -> Footprint:
    """Without a file: weights, cells and graphs by their bytes."""
    pool = MemoryPool(kv=n_ctx * kv_per_cell, compute=graphs)
    copies = machine.kind == "cuda"
    pool = replace(pool, copied=weights) if copies else replace(pool, mapped=weights)
    return Footprint(host=pool) if machine.kind == "cpu" else Footprint(device=pool)


def most(fits: Callable[[int], bool], limit: int = 2**20) -> int:
    """The largest n in 0..limit for which `fits(n)`, where it holds up to there."""
    high = 1
    while high <= limit and fits(high):  # a small answer is found without large questions
        high *= 2
    within = range(high // 2 + 1, min(high, limit + 1))
    return high // 2 + bisect(within, False, key=lambda n: not fits(n))


def why_not_back(model: Model) -> str:
    """Why no context of this model, which keeps a recurrent state, can take the last tokens of a
    sequence back; "" where one can."""
    with (
        Projector.of(model) as projector,
        Context(projector.model, n_ctx=256, n_rs_seq=1) as context,
    ):
        if context.capabilities.max_rollback:
            return ""
        return f"libllama {'copies no' if context.n_rs_seq else 'keeps no'} snapshots of it"


def device_free(*models: Model) -> int:
    """Bytes that are free now on the devices that these models have layers on; 0 without any. A
    Mac's GPU has the host's memory, and Metal counts what this process took of it: no more than
    the host has free."""
    devices = {d.name: d for model in models if model.offloaded for d in model.devices()}
    free = sum(device.free for device in devices.values() if device.total)
    if any(device.on_mac for device in devices.values()):
        return min(free, host_available())
    return free


class Beside(NamedTuple):
    """A context of a model that is loaded. cells: how many it is to have, by those of another
    context. params: its other parameters."""

    model: Model
    cells: Callable[[int], int]
    params: dict[str, Any]


def fitting_n_ctx(
    model: Model, n_ctx: int, *, shrink: bool, beside: Beside | None = None, **params: Any
) -> int:
    """`n_ctx` if a context with these parameters, and the one that is to come beside it, fit what
    is free now; with `shrink` the largest below it with which they do, a part of that stays free,
    and mapped weights stay in memory. Their models are loaded. Raises `NotEnoughMemory`.

    Where even a generous guess fits twice, nothing is projected."""
    both = [Beside(model, int, params), *([beside] if beside else ())]
    devices, host = device_free(*(one.model for one in both)), host_available()
    if shrink:
        devices, host = (size - int(_SPARE * size) for size in (devices, host))
    generous = sum(_generous(one.model, one.cells(n_ctx), one.params) for one in both)
    whole = all(device_computes_all(one.model, one.params) for one in both)
    if 2 * generous <= (devices or host) and (whole or 2 * generous <= host):
        return n_ctx
    with ExitStack() as stack:
        projectors = [stack.enter_context(Projector.of(one.model)) for one in both]

        def short(cells: int, *, stay: bool) -> tuple[int, int] | None:
            """(needed, available) of the place that is too small. stay: so do mapped weights."""
            found, pages = Footprint(), dict[Model, int]()
            for one, projector in zip(both, projectors, strict=True):
                own = projector.footprint(n_ctx=one.cells(cells), **one.params)
                pages[one.model] = max(0, own.host.mapped - own.host.copied)
                found = found.plus(own)
            # Those count as free, and would be read from the file in every step.
            left_in = min(sum(pages.values()), host // 2) if stay else 0
            needed = found.device.context, found.host.context + left_in
            each = zip(needed, (devices, host), strict=True)
            return next(((size, free) for size, free in each if size > free), None)

        first = short(n_ctx, stay=shrink)
        if first is None:
            return n_ctx
        step = 256 * (1 if params.get("kv_unified", True) else int(params["n_seq_max"]))

        def largest(*, stay: bool) -> int:
            return step * most(lambda n: short(step * n, stay=stay) is None, n_ctx // step)

        found = largest(stay=shrink)
        if shrink and not found:  # slow is better than not at all
            found = largest(stay=False)
    if not shrink or found == 0:
        lower = ", or fewer snapshots of its states (n_rs_seq)" if params.get("n_rs_seq") else ""
        raise NotEnoughMemory(*first, f"n_ctx={found} would fit{lower}")
    gib = [size / 2**30 for size in first]
    log.warning("n_ctx is %d, not %d: %.1f GiB would be needed, %.1f are free", found, n_ctx, *gib)
    return found


def _generous(model: Model, n_ctx: int, params: Mapping[str, Any]) -> int:
    """More bytes than the context will need: full layers of F32 cells, masks and scores of every
    head, states of every sequence, and graphs; and pages of the file, where the CPU reads them."""
    n_seq_max = int(params.get("n_seq_max", 1))
    n_ubatch = integer("n_ubatch", params.get("n_ubatch", 512), 0, 2**31 - 1)
    n_ubatch = min(n_ubatch or 2048, integer("n_ctx", n_ctx, 0, MAX_CTX))
    flash = params.get("flash_attn_type", "auto") not in ("disabled", 0)
    cell = 40 + 4 * model.n_layer * model.n_head_kv * sum(model.head_dims) + 4 * n_ubatch
    if not flash:
        cell += 4 * model.n_head * n_ubatch
    n_states = n_seq_max * (1 + int(params.get("n_rs_seq", 0)))
    states = n_states * (model.n_layer + 2) * model.n_embd * 2048  # and what a layer computes
    stateful = model.is_recurrent or model.is_hybrid
    n_outputs = int(params.get("n_outputs") or n_seq_max)
    graphs = 256 * n_ubatch * model.n_embd + 24 * n_outputs * model.n_vocab
    pages = 0 if model.offloaded == 1 else model.size_bytes
    return n_ctx * cell + graphs + (states if stateful else 0) + pages
