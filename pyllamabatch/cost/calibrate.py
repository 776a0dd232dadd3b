"""Calibration: step times of many shapes on this device, within a budget of seconds.

All shapes are measured in each round, so a disturbance hits few repeats of a shape; a shape's time
is the median. Within a round, equal steps follow each other in a block, so the graph is reused as
in decoding. The first steps of a block have a new graph; how much longer they take is stored, too.
Steps of few decoding rows may each have a kernel of their own. They are repeated within the first
round: on a slow device it may be the only one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from pyllamabatch.cost import where
from pyllamabatch.cost.kernels import Kernels, rows_to_measure
from pyllamabatch.cost.profile import Profile, Sample, Shape
from pyllamabatch.cost.rig import Rig, Took
from pyllamabatch.cost.step_cost import SETTLED
from pyllamabatch.errors import ArgumentError, KvCacheFull, ProfileError
from pyllamabatch.llama.model import Model
from pyllamabatch.planner.residency import fitting_n_ctx

Progress = Callable[[float, str], None]
"""Called with the share of the budget that is spent, and what is being measured."""

BASE_DEPTH = 128  # cells of every sequence, where depth is not what is measured
N_SEQ_UNIFIED, N_SEQ_STREAMS = 65, 33
N_CTX = 36864
STREAMS_SHARE = 0.3  # of the budget
_BLOCK_SECONDS = 0.2  # of one shape in one round
_BUSY_CORES = 0.4  # by others, above which a measurement would be disturbed
_LEAST = 12  # shapes: with fewer there is nothing to fit


def calibrate(
    model: Model,
    *,
    budget: float = 120.0,
    layouts: Sequence[str] = ("unified", "streams"),
    progress: Progress | None = None,
    **context_params: Any,
) -> Profile:
    """Measure and return a profile; its `about["complete"]` is False when it was interrupted.

    budget: seconds, without loading the model; the last round ends early. layouts: "unified" (one
    pool of cells), "streams" (a stream of cells for each sequence). context_params: of `Context`,
    as the engine will use them (n_ubatch, n_threads, type_k, ...).

    KeyboardInterrupt ends it with what is measured, and is raised where that is too little.
    Raises ProfileError when the budget ends before each kind of step was measured.
    """
    unknown = [name for name in layouts if name not in ("unified", "streams")]
    if unknown or not layouts:
        raise ArgumentError("layouts", layouts, "must be of unified, streams")
    if not budget > 0:
        raise ArgumentError("budget", budget, "must be seconds")
    began = time.monotonic()
    weights = where.weigh(model)
    found: dict[str, Any] = {}
    samples: list[Sample] = []
    complete = True
    ordered = [name for name in ("unified", "streams") if name in layouts]
    for name in ordered:
        unified = name == "unified"
        share = 1.0 if name == ordered[-1] else 1.0 - STREAMS_SHARE
        with open_rig(model, unified, context_params) as rig:
            if not found:
                key = where.key_of(rig.context)
                kernels = where.kernels_of(key.backend, weights)
                found = {"key": key, "kernels": kernels, "n_ubatch": rig.context.n_ubatch}
                found["about"] = where.about(model, rig.context)
            shapes = plan_shapes(found["kernels"], rig.context.n_ubatch, unified)
            clock = Clock(began, budget, share, progress)
            measured, whole = measure(rig, shapes, unified, clock)
        samples += measured
        complete = complete and whole
        if not whole and len(samples) < _LEAST:
            raise KeyboardInterrupt
        if not whole:
            break
    found["about"] |= {
        "date": time.strftime("%Y-%m-%d"),
        "source": "pyllamabatch calibrate",
        "seconds": round(time.monotonic() - began, 1),
        "complete": complete,
    }
    profile = Profile(
        samples=tuple(samples),
        output_share=weights.output_share,
        n_expert=weights.n_expert,
        n_expert_used=weights.n_expert_used,
        n_swa=model.n_swa,
        **found,
    )
    for name in ordered if complete else ():
        if lacking := profile.lacks(unified=name == "unified"):
            raise ProfileError(
                f"calibration within {budget:g} s",
                f"no {' and no '.join(lacking)} ({name}): give it a larger budget, or measure when "
                "nothing else uses the processor",
            )
    return profile


def open_rig(model: Model, unified: bool, context_params: dict[str, Any]) -> Rig:
    """A rig as large as the memory allows."""
    n_seq_max = N_SEQ_UNIFIED if unified else N_SEQ_STREAMS
    n_ctx = N_CTX if unified else -(-N_CTX // (256 * n_seq_max)) * 256 * n_seq_max
    params = {"n_seq_max": n_seq_max, "kv_unified": unified, **context_params}
    n_ctx = fitting_n_ctx(model, n_ctx, shrink=True, **params)
    return Rig(model, n_ctx=n_ctx, **params)


def plan_shapes(kernels: Kernels, n_ubatch: int, unified: bool) -> list[Shape]:
    """What to measure, the most important first and shapes of one depth together."""
    full = min(n_ubatch, 512)
    decode = rows_to_measure(kernels) if unified else (*range(1, 13), 16, 24, 32)
    shapes = [Shape(rows=n, depth=BASE_DEPTH) for n in decode]
    mixed_decode, mixed_chunks = (
        ((1, 4, 8, 16, 32), (8, 32, 128)) if unified else ((1, 8), (32, 128))
    )
    for n in mixed_decode:
        shapes += [Shape(n + c, c, 1, BASE_DEPTH) for c in (*mixed_chunks, full - n)]
    chunks = [32, 64, 128, 192, 256, 384, 512]
    if unified:
        chunks += [16, 24, 48, 96]
    shapes += [Shape(n, n, 1) for n in chunks if n <= n_ubatch]
    if n_ubatch > 512:
        shapes += [Shape(n, n, 1) for n in (768, 1024, 2048) if n <= n_ubatch]
    shapes += [Shape(n, n, k) for n, k in ((128, 2), (512, 4)) if n <= n_ubatch]
    if 2 * n_ubatch <= 2048:
        shapes.append(Shape(2 * n_ubatch, 2 * n_ubatch, 1))
    for depth, n_seqs in _DEEP if unified else _DEEP_STREAMS:
        shapes += [Shape(rows=n, depth=depth) for n in n_seqs]
        shapes += [Shape(n, n, 1, depth) for n in (64, full)]
        if unified:
            shapes.append(Shape(8 + 120, 120, 1, depth))
    return shapes


# depth, and how many sequences decode at it
_DEEP = ((512, (1, 4, 8, 16, 32, 64)), (1024, (1, 4, 8, 16, 32)), (4096, (1, 2, 4, 8)))
_DEEP_STREAMS = ((512, (1, 4, 16)), (1024, (1, 8, 32)))


def busy_cores(seconds: float = 0.03) -> float:
    """Cores in use by all processes during so many seconds, in which this thread sleeps; 0 where
    the system does not say (/proc/stat, in hundredths of a second)."""
    try:
        before = _busy_ticks()
        time.sleep(seconds)
        return (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds
    except OSError:
        return 0.0


def _busy_ticks() -> int:
    words = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[1:9]
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, words)
    return user + nice + system + irq + softirq + steal


class Clock:
    """What is left of the budget, of which this layout may use `share`."""

    def __init__(
        self, began: float, budget: float, share: float, progress: Progress | None
    ) -> None:
        self._began, self._budget = began, budget
        self._end = began + budget * share
        self._progress = progress
        self._patience = 0.25 * self.left

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def wait_for_quiet(self, on_cpu: bool) -> None:
        """Wait while other processes use the CPU: a quarter of the budget at most, in all."""
        began = time.monotonic()
        while on_cpu and self._patience > 0 and self.left > 0 and busy_cores() > _BUSY_CORES:
            self.show("waiting: other processes use the processor")
            time.sleep(0.05)
            self._patience -= time.monotonic() - began
            began = time.monotonic()

    def show(self, text: str) -> None:
        if self._progress is not None:
            spent = (time.monotonic() - self._began) / self._budget
            self._progress(min(spent, 1.0), text)


def measure(
    rig: Rig, shapes: Sequence[Shape], unified: bool, clock: Clock
) -> tuple[list[Sample], bool]:
    """Samples of the shapes, and whether it was not interrupted."""
    times: dict[Shape, list[Took]] = {}
    begins: dict[Shape, list[tuple[Took, ...]]] = {}
    whole = True
    try:
        too_large: set[Shape] = set()
        for n_round, shape, wanted in schedule([s for s in shapes if _fits(s, rig, unified)]):
            taken = times.setdefault(shape, [])
            if clock.left <= 0 or shape in too_large:
                continue
            if sum(not t.disturbed for t in taken) >= wanted:
                continue
            clock.show(_words(shape, unified, n_round))
            share = 1.0 if wanted < inf else _AGAIN_SHARE
            if taken and 2 * min(taken).seconds > share * clock.left:
                continue
            if not rig.ready(shape) and rig.seconds_to_hold(shape.depth) > 0.15 * clock.left:
                continue
            clock.wait_for_quiet(rig.on_cpu)
            try:
                begin, steady = _block(rig, shape)
                taken += steady
                begins.setdefault(shape, []).append(begin)
            except KvCacheFull:  # a memory that needs more cells than the step has rows
                rig.clear()
                too_large.add(shape)
    except KeyboardInterrupt:
        whole = False
    found = [
        _sample(shape, taken, unified, begins[shape]) for shape, taken in times.items() if taken
    ]
    return found, whole


_WANTED = (1, 3, 6, 9, 12, 16, 20, 25, 30, 40)  # undisturbed steps of a shape, by round
_FEW = 8  # decoding rows of the steps that are repeated
_AGAIN = 4  # repeats within the first round
_AGAIN_SHARE = 0.005  # of the remaining budget, that a repeat may take


def schedule(shapes: Sequence[Shape]) -> Iterator[tuple[int, Shape, float]]:
    """(round, shape, number of undisturbed steps that are enough); inf: a repeat within the first
    round."""
    few = [s for s in shapes if s.rows <= _FEW and not s.prefill and s.depth == BASE_DEPTH]
    part = -(-len(shapes) // _AGAIN)
    for i, shape in enumerate(shapes, 1):
        yield 1, shape, _WANTED[0]
        if i % part == 0 or i == len(shapes):
            yield from ((1, again, inf) for again in few)
    for n_round, wanted in enumerate(_WANTED[1:], 2):
        yield from ((n_round, shape, wanted) for shape in shapes)


def _block(rig: Rig, shape: Shape) -> tuple[tuple[Took, ...], list[Took]]:
    """Consecutive steps: the first ones, with a new graph, and those that reuse it."""
    first = rig.time(shape, 1)
    n = int(min(max(_BLOCK_SECONDS / first[0].seconds, 1), 12))
    taken = first + rig.time(shape, n + (SETTLED - 1 if n > 4 else 0))
    n_begin = SETTLED if n > 4 else 1
    return tuple(taken[:n_begin]), taken[n_begin:]


def _fits(shape: Shape, rig: Rig, unified: bool) -> bool:
    context = rig.context
    cells = shape.kv + shape.rows
    longest = shape.depth + max(shape.chunks(), default=1)
    if shape.n_seqs > context.n_seq_max or shape.rows > context.n_batch:
        return False
    longest_held = min(context.n_ctx_seq, rig.stepper.n_pos_max)
    return longest <= longest_held and (not unified or cells <= context.n_ctx)


def _words(shape: Shape, unified: bool, n_round: int) -> str:
    layout = "unified" if unified else "streams"
    decode = shape.rows - shape.prefill
    rows = f"{decode} decoding, {shape.prefill} prompt rows, depth {shape.depth}"
    return f"{layout}, round {n_round}: {rows}"


def _sample(
    shape: Shape, taken: list[Took], unified: bool, begins: Sequence[tuple[Took, ...]] = ()
) -> Sample:
    """The median of the undisturbed steps; without any, the fastest step.

    `begins`: the first steps of blocks. How much longer they took comes from undisturbed ones with
    a new graph, without the very first block, which may have loaded a kernel, if there are more."""
    calm = [t.seconds for t in taken if not t.disturbed]
    low, middle, high = np.percentile(calm or [min(taken).seconds], (25, 50, 75))
    fresh = [
        [t.seconds - middle for t in begin]
        for begin in begins[1:] or begins
        if begin[0].new and not any(t.disturbed for t in begin)
    ]
    new = [extra[0] for extra in fresh if calm]
    settle = [sum(extra[1:]) for extra in fresh if calm and len(extra) > 1]
    return Sample(
        rows=shape.rows,
        prefill=shape.prefill,
        kv=shape.kv,
        n_seqs=shape.n_seqs,
        unified=unified,
        seconds=float(f"{middle:.6g}"),
        spread=round(float((high - low) / (2 * middle)), 4) if calm else 0.5,
        n=len(calm),
        new=float(f"{np.median(new):.4g}") if new else None,
        settle=float(f"{np.median(settle):.4g}") if settle else None,
    )
