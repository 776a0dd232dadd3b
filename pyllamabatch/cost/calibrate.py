"""Calibration: step times of many shapes on this device, within a budget of seconds.

All shapes are measured in each round, so a disturbance hits few repeats of a shape; a shape's time
is the median. Within a round, equal steps follow each other in a block, so the graph is reused as
in decoding. The first steps of a block have a new graph; how much longer they take is stored, too.
Steps of few decoding rows may each have a kernel of their own. They are repeated within the first
round: on a slow device it may be the only one.

Where the CPU computes, steps beside other load on its cores are disturbed. They count for nothing,
and are repeated, as is a shape whose steps differ too much. A layout of which a kind of step
remains unknown makes no profile."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import numpy as np

from pyllamabatch.cost import where
from pyllamabatch.cost.kernels import Kernels, rows_to_measure
from pyllamabatch.cost.profile import KINDS, Profile, Sample, Shape
from pyllamabatch.cost.rig import Rig, Took
from pyllamabatch.cost.step_cost import SETTLED
from pyllamabatch.errors import ArgumentError, KvCacheFull, ProfileError
from pyllamabatch.llama.host import usable_cores
from pyllamabatch.llama.model import Model
from pyllamabatch.planner.residency import fitting_n_ctx
from pyllamabatch.report.disturbed import UNWATCHED
from pyllamabatch.report.meters import TICK_S, OtherCores, others_are_known

Progress = Callable[[float, str], None]
"""Called with the share of the budget that is spent, and what is being measured."""

LAYOUTS = {"unified": True, "streams": False}
"""One pool of cells; a stream of cells for each sequence."""

BASE_DEPTH = 128  # cells of every sequence, where depth is not what is measured
N_SEQ = {True: 65, False: 33}  # by `unified`, as in the tables below
N_CTX = 36864
STREAMS_SHARE = 0.3  # of the budget
_BLOCK_SECONDS = 0.2  # of one shape in one round
_LEAST = 3  # undisturbed shapes of a kind of step
_DIFFER = 0.25  # `Sample.spread` above which a shape's steps are disturbed


def calibrate(
    model: Model,
    *,
    budget: float = 120.0,
    layouts: Sequence[str] = tuple(LAYOUTS),
    progress: Progress | None = None,
    beside: Collection[int] = (),
    **context_params: Any,
) -> Profile:
    """Measure and return a profile. Its `about["complete"]` is False when it was interrupted, its
    `about["watched"]` where it is not known what else ran (without psutil).

    budget: seconds, without loading the model; the last round ends early. layouts: of `LAYOUTS`.
    beside: ids of processes that run all the while, and will beside the engine, with as many
    threads each as it has (n_threads): what they do to its steps is part of these.
    context_params: of `Context`, as the engine will use them (n_ubatch, n_threads, type_k, ...).

    KeyboardInterrupt ends it with the layouts that are known, and is raised where none is.
    Raises ProfileError when too little of a kind of step is known at the end of the budget."""
    if not layouts or not set(layouts) <= LAYOUTS.keys():
        raise ArgumentError("layouts", layouts, f"must be of {', '.join(LAYOUTS)}")
    if not budget > 0:
        raise ArgumentError("budget", budget, "must be seconds")
    for name in context_params.keys() & {"n_ctx", "kv_unified"}:
        raise ArgumentError(name, context_params[name], "calibration sets it itself: see layouts")
    began = time.monotonic()
    profile: Profile | None = None
    complete = True
    ordered = [name for name in LAYOUTS if name in layouts]
    for name in ordered:
        unified, share = LAYOUTS[name], 1.0 if name == ordered[-1] else 1.0 - STREAMS_SHARE
        with open_rig(model, unified, context_params) as rig:
            profile = profile or where.unmeasured(rig.context)
            shapes = plan_shapes(profile.kernels, profile.n_ubatch, unified)
            clock = Clock(began, budget, share, progress)
            samples, complete = measure(rig, shapes, unified, clock, beside)
        faults = faults_of(samples)
        if faults and complete:
            raise ProfileError(
                f"calibration within {budget:g} s",
                f"{' and '.join(faults)} ({name}): give it a larger budget, or measure when "
                "nothing else uses the device" + ("" if others_are_known() else f". {UNWATCHED}"),
            )
        if not faults:
            profile = replace(profile, samples=(*profile.samples, *samples))
        if not complete:
            break
    if profile is None or not profile.samples:
        raise KeyboardInterrupt
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "source": "pyllamabatch calibrate",
        "seconds": round(time.monotonic() - began, 1),
        "complete": complete,
        "watched": others_are_known(),
    }
    return replace(profile, about={**profile.about, **about})


def faults_of(samples: Sequence[Sample]) -> list[str]:
    """Why the samples of a layout make no profile: of each kind of step there must be `_LEAST` at
    least that are undisturbed, and no fewer than are disturbed."""
    faults = []
    for kind, of_kind in KINDS.items():
        steady = [s.n > 0 and s.spread <= _DIFFER for s in samples if of_kind(s)]
        if not steady:
            faults.append(f"no {kind}")
        elif 2 * sum(steady) < len(steady):
            n_disturbed = len(steady) - sum(steady)
            faults.append(f"{n_disturbed} of {len(steady)} {kind} disturbed")
        elif sum(steady) < _LEAST:
            faults.append(f"only {sum(steady)} {kind}")
    return faults


def open_rig(model: Model, unified: bool, context_params: dict[str, Any]) -> Rig:
    """A rig as large as the memory allows."""
    n_seq_max = N_SEQ[unified]
    n_ctx = N_CTX if unified else -(-N_CTX // (256 * n_seq_max)) * 256 * n_seq_max
    params = {"n_seq_max": n_seq_max, "kv_unified": unified, **context_params}
    n_ctx = fitting_n_ctx(model, n_ctx, shrink=True, **params)
    return Rig(model, n_ctx=n_ctx, **params)


# Sequences that decode, and prompt rows beside them.
_MIXED = {True: ((1, 4, 8, 16, 32), (8, 32, 128)), False: ((1, 8), (32, 128))}
# Rows of one prompt.
_MANY = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048)
_PROMPTS = {True: (*_MANY, 16, 24, 48, 96), False: _MANY}
# Depth, and how many sequences decode at it.
_DEEP = {
    True: ((512, (1, 4, 8, 16, 32, 64)), (1024, (1, 4, 8, 16, 32)), (4096, (1, 2, 4, 8))),
    False: ((512, (1, 4, 16)), (1024, (1, 8, 32))),
}


def plan_shapes(kernels: Kernels, n_ubatch: int, unified: bool) -> list[Shape]:
    """What to measure, the most important first and shapes of one depth together."""
    full = min(n_ubatch, 512)
    rows = rows_to_measure(kernels) if unified else (*range(1, 13), 16, 24, 32)
    shapes = [Shape(n, depth=BASE_DEPTH) for n in rows]
    decode, chunks = _MIXED[unified]
    mixed = [(n, c) for n in decode for c in sorted({*chunks, full - n}) if c > 0]
    shapes += [Shape(n + c, c, 1, BASE_DEPTH) for n, c in mixed]
    prompts = [(n, 1) for n in _PROMPTS[unified]] + [(128, 2), (512, 4)]
    shapes += [Shape(n, n, n_chunks) for n, n_chunks in prompts if n <= n_ubatch]
    if 2 * n_ubatch <= 2048:
        shapes.append(Shape(2 * n_ubatch, 2 * n_ubatch, 1))
    for depth, n_seqs in _DEEP[unified]:
        shapes += [Shape(n, depth=depth) for n in n_seqs]
        shapes += [Shape(n, n, 1, depth) for n in (64, full)]
        if unified:
            shapes.append(Shape(8 + 120, 120, 1, depth))
    return shapes


class OtherLoad:
    """What other processes do to `n_threads` of this one's."""

    def __init__(self, n_threads: int, beside: Collection[int] = ()) -> None:
        """`beside`: processes that are none of these, with as many threads each."""
        self._n_threads = n_threads
        self._beside = beside
        self._watch = OtherCores(beside)

    def disturbs(self) -> bool:
        """Since it was asked last, others used more than a fifth of what the threads need, and
        hardly a core was idle. False where no CPU computes, and without psutil."""
        watch, self._watch = self._watch, OtherCores(self._beside)
        others = watch.used(doubt=2 * TICK_S)
        room = 0.9 * usable_cores() - self._n_threads * len(self._beside)
        return others > 0.2 * self._n_threads > 0 and others + self._n_threads > room


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

    def wait_for_quiet(self, load: OtherLoad) -> None:
        """Wait while other load disturbs: a quarter of the budget at most, in all."""
        load.disturbs()
        while self._patience > 0 and self.left > 0:
            time.sleep(_LOOK)
            if not load.disturbs():
                return
            self._patience -= _LOOK
            self.show("waiting: other processes use the processor")

    def show(self, text: str) -> None:
        if self._progress is not None:
            spent = (time.monotonic() - self._began) / self._budget
            self._progress(min(spent, 1.0), text)


_LOOK = 0.1  # s


def measure(
    rig: Rig,
    shapes: Sequence[Shape],
    unified: bool,
    clock: Clock,
    beside: Collection[int] = (),
) -> tuple[list[Sample], bool]:
    """Samples of the shapes, and whether it was not interrupted."""
    taken: dict[Shape, ShapeTimings] = {}
    load, disturbed, whole = OtherLoad(rig.n_threads, beside), True, True
    try:
        for n_round, shape, wanted in schedule([s for s in shapes if _fits(s, rig, unified)]):
            timings = taken.setdefault(shape, ShapeTimings())
            if clock.left <= 0 or timings.too_large or timings.enough(wanted):
                continue
            layout, decode = "unified" if unified else "streams", shape.rows - shape.prefill
            rows = f"{decode} decoding, {shape.prefill} prompt rows, depth {shape.depth}"
            clock.show(f"{layout}, round {n_round}: {rows}")
            share = 1.0 if wanted < inf else _AGAIN_SHARE
            if timings.steps and 2 * min(timings.steps).seconds > share * clock.left:
                continue
            if rig.seconds_to_hold(shape.depth) > 0.15 * clock.left:
                continue
            if disturbed:
                clock.wait_for_quiet(load)
            load.disturbs()
            try:
                begin, steady = _block(rig, shape)
            except KvCacheFull:  # a memory that needs more cells than the step has rows
                rig.clear()
                timings.too_large = True
                continue
            disturbed = load.disturbs()
            timings.add(begin, steady, disturbed)
    except KeyboardInterrupt:
        whole = False
    return [timings.sample(s, unified) for s, timings in taken.items() if timings.steps], whole


# Undisturbed steps of a shape, by round. The last rounds repeat what was disturbed until then.
_WANTED = (1, 3, 6, 9, 12, 16, 20, 25, 30, 40, *[1] * 30)
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


@dataclass
class ShapeTimings:
    """Steps of a shape. begins: the first ones of each block, with a new graph; steps: the
    others."""

    steps: list[Took] = field(default_factory=list)
    begins: list[tuple[Took, ...]] = field(default_factory=list)
    too_large: bool = False

    def add(self, begin: tuple[Took, ...], steady: list[Took], disturbed: bool) -> None:
        """A block; disturbed: all of it."""
        if disturbed:
            begin = tuple(t._replace(disturbed=True) for t in begin)
            steady = [t._replace(disturbed=True) for t in steady]
        self.begins.append(begin)
        self.steps += steady

    def enough(self, wanted: float) -> bool:
        """There are as many undisturbed steps, and they do not differ much."""
        n = sum(not t.disturbed for t in self.steps)
        return n >= wanted and self._quartiles()[1] <= _DIFFER

    def sample(self, shape: Shape, unified: bool) -> Sample:
        """The median of the undisturbed steps; without any, the fastest step. How much longer new
        graphs took comes from undisturbed begins, without the very first, which may have loaded a
        kernel, if there are more."""
        middle, spread, n = self._quartiles()
        fresh = [
            [t.seconds - middle for t in begin]
            for begin in self.begins[1:] or self.begins
            if n and begin[0].new and not any(t.disturbed for t in begin)
        ]
        new = [extra[0] for extra in fresh]
        settle = [sum(extra[1:]) for extra in fresh if len(extra) > 1]
        return Sample(
            rows=shape.rows,
            prefill=shape.prefill,
            kv=shape.kv,
            n_seqs=shape.n_seqs,
            unified=unified,
            seconds=float(f"{middle:.6g}"),
            spread=round(spread, 4),
            n=n,
            new=float(f"{np.median(new):.4g}") if new else None,
            settle=float(f"{np.median(settle):.4g}") if settle else None,
        )

    def _quartiles(self) -> tuple[float, float, int]:
        """`seconds`, `spread` and `n` of `Sample`."""
        calm = [t.seconds for t in self.steps if not t.disturbed]
        if not calm:
            return min(self.steps).seconds, 0.5, 0
        low, middle, high = np.percentile(calm, (25, 50, 75)).tolist()
        return middle, (high - low) / (2 * middle), len(calm)


def _block(rig: Rig, shape: Shape) -> tuple[tuple[Took, ...], list[Took]]:
    """Consecutive steps: the first ones, with a new graph, and those that reuse it."""
    first = rig.time(shape, 1)
    n = int(min(max(_BLOCK_SECONDS / first[0].seconds, 1), 12))
    taken = first + rig.time(shape, n + (SETTLED - 1 if n > 4 else 0))
    n_begin = SETTLED if n > 4 else 1
    return tuple(taken[:n_begin]), taken[n_begin:]


def _fits(shape: Shape, rig: Rig, unified: bool) -> bool:
    context = rig.context
    longest = shape.depth + max(shape.chunks(), default=1)
    return (
        shape.n_seqs <= context.n_seq_max
        and shape.rows <= context.n_batch
        and longest <= min(context.n_ctx_seq, rig.stepper.n_pos_max)
        and (not unified or shape.kv + shape.rows <= context.n_ctx)
    )
