"""How the terms of the cost model are fitted to a profile's samples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyllamabatch.cost.profile import Profile, Sample
from pyllamabatch.cost.step_cost import NewGraph
from pyllamabatch.cost.terms import ATTENTION, Terms
from pyllamabatch.errors import ArgumentError

F64 = npt.NDArray[np.float64]

LEAST_SAMPLES = 4
OTHER_LAYOUT = ", other layout"  # end of the names of its terms
_OTHER_LAYOUT = 0.5  # times the residuals of samples of the other cache layout
_MASKED = 0.25  # of what a cell of its own costs a row: a masked one, where kernels compute both
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the output matrix's share, that a fit tries for h
_WINDOW_SHARES = (0.0, 0.5, 0.75, 0.875)  # that it tries for w


class Fitted(NamedTuple):
    """coefficients: seconds per unit of each term that a sample has. error: median and 95th
    percentile of the relative error on the samples."""

    terms: Terms
    coefficients: dict[str, float]
    error: tuple[float, float]
    new_graph: NewGraph


def fit_terms(profile: Profile, *, unified: bool, swa_full: bool) -> Fitted:
    """See `CostModel.fit`.

    Weights cost the same in both layouts, so the other layout's samples count for them, as if they
    were half as exact; their attention has coefficients of its own, which are dropped. Where only
    streams were measured, and kernels compute masked cells, a pool is charged `_MASKED` for them.
    """
    if unified and profile.kernels.computes_masked and not profile.has(unified=True):
        streams = fit_terms(profile, unified=False, swa_full=swa_full)
        return streams._replace(
            terms=replace(streams.terms, unified=True),
            coefficients=_with_masked(streams.coefficients),
        )
    profile = _at_one_speed(profile, unified)
    chosen = profile.only(unified=unified).samples
    known = set(chosen)
    mine = _calm(chosen)
    others = [s for s in profile.samples if s.n > 0 and s not in known and s.unified != unified]
    n, n_ubatch = len(mine), profile.n_ubatch
    if n < LEAST_SAMPLES:
        raise ArgumentError("profile", f"{n} samples", f"must have {LEAST_SAMPLES} at least")
    my_seconds, new_graph = _reused(mine, n_ubatch)
    seconds = np.array(my_seconds + _reused(others, n_ubatch)[0])
    weight = np.array([1.0] * n + [_OTHER_LAYOUT] * len(others))
    weight /= 0.02 + np.array([s.spread for s in (*mine, *others)])
    weight /= weight.mean()

    plain = Terms(
        profile.kernels, 0.0, unified, profile.n_expert, profile.n_expert_used, profile.n_swa
    )
    plain = replace(plain, gaps=_gaps(plain, (*mine, *others), n_ubatch))
    # The values are linear in h and w.
    shared = replace(plain, output_share=1.0)
    windowed = replace(plain, window_share=1.0 if plain.window else 0.0)
    tables = [_values(terms, mine, others, n_ubatch) for terms in (plain, shared, windowed)]
    # Of terms that no sample tells apart the fit takes the first one: the weights', as attention is
    # the smaller part of a step.
    names = list(dict.fromkeys(name for table in tables for row in table for name in row))
    names.sort(key=lambda name: name.removesuffix(OTHER_LAYOUT) in ATTENTION)
    base, of_share, of_window = (
        np.array([[row.get(name, 0.0) for name in names] for row in table]) for table in tables
    )
    of_share, of_window = of_share - base, of_window - base

    def attempt(h: float, w: float, n_rounds: int) -> tuple[F64, F64]:
        """Coefficients, and relative errors on this layout's samples."""
        found, errors = robust_nnls(base + h * of_share + w * of_window, seconds, weight, n_rounds)
        return found, np.abs(errors[:n])

    def best(tried: Sequence[tuple[float, float]]) -> tuple[float, float]:
        if len(tried) == 1:
            return tried[0]
        means = [attempt(h, w, 2)[1].clip(0, 0.2).mean() for h, w in tried]
        return tried[int(np.argmin(means))]

    h, _ = best([(h, 0.0) for h in sorted({profile.output_share * part for part in _SHARES})])
    h, w = best([(h, w) for w in (_WINDOW_SHARES if of_window.any() else (0.0,))])
    coefficients, errors = attempt(h, w, 6)
    if swa_full and profile.kernels.computes_masked:  # they are charged for every cell
        w = 0.0
    return Fitted(
        replace(plain, output_share=h, window_share=w),
        dict(zip(names, coefficients.tolist(), strict=True)),
        (float(np.median(errors)), float(np.percentile(errors, 95))),
        new_graph,
    )


def _with_masked(streams: Mapping[str, float]) -> dict[str, float]:
    """The coefficients of a pool by those of streams. There every row looks at the cells of its own
    sequence alone, and what they cost stands in "cells" as well as in "own"."""
    own = streams.get("own", 0.0) + streams.get("cells", 0.0)
    found = {**streams, "own": own, "cells": 0.0}
    for kind in ("", " many", " prompt"):
        own = found.get(f"own{kind}", 0.0)
        found |= {f"all{kind}": _MASKED * own, f"own{kind}": (1 - _MASKED) * own}
    return found


def _at_one_speed(profile: Profile, unified: bool) -> Profile:
    """The other layout's samples as if the device had been as fast as when this one's were taken:
    one sequence alone takes the same in both."""
    alone = [s for s in profile.samples if s.n_seqs == 1 and s.n > 0]
    here = {s.shape: s.seconds for s in alone if s.unified == unified}
    ratios = [here[s.shape] / s.seconds for s in alone if s.unified != unified and s.shape in here]
    if not ratios:
        return profile
    speed = float(np.median(ratios))

    def scaled(s: Sample) -> Sample:
        new, settle = (None if t is None else speed * t for t in (s.new, s.settle))
        return replace(s, seconds=speed * s.seconds, new=new, settle=settle)

    samples = (s if s.unified == unified else scaled(s) for s in profile.samples)
    return replace(profile, samples=tuple(samples))


def _calm(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples with an undisturbed step, where they are enough; all samples of a kind (with
    prompt rows or without) that has none."""
    calm = [s for s in samples if s.n > 0]
    if len(calm) < max(LEAST_SAMPLES, len(samples) // 2):
        return samples
    kinds = {s.prefill > 0 for s in calm}
    return calm + [s for s in samples if (s.prefill > 0) not in kinds]


def _reused(samples: Sequence[Sample], n_ubatch: int) -> tuple[list[float], NewGraph]:
    """Seconds of the samples without the graphs that are new at every step, and what one takes:
    medians, as it hardly depends on the rows."""
    one = [s for s in samples if not s.new_graphs(n_ubatch)]
    new, settle = (
        max(0.0, float(np.median([t for t in times if t is not None] or 0.0)))
        for times in ([s.new for s in one], [s.settle for s in one])
    )
    return [
        s.seconds - min(s.new_graphs(n_ubatch) * new, 0.5 * s.seconds) for s in samples
    ], NewGraph(new, settle)


def _gaps(terms: Terms, samples: Sequence[Sample], n_ubatch: int) -> tuple[tuple[int, int], ...]:
    """The samples' numbers of rows in an ubatch, the last one below a regime and the first one in
    it, where neither is beside the edge."""
    rows = sorted({part.rows for s in samples for part in terms.split(*s.shape, n_ubatch)})
    edges = [regime.first for regime in terms.kernels.regimes]
    pairs = list(pairwise(rows))
    return tuple((low, high) for low, high in pairs if any(low + 1 < edge < high for edge in edges))


def _values(
    terms: Terms, mine: Sequence[Sample], others: Sequence[Sample], n_ubatch: int
) -> list[dict[str, float]]:
    """The terms of each sample; attention of the others' layout has names of its own."""
    theirs = replace(terms, unified=not terms.unified)
    return [terms.of_step(s.shape, n_ubatch) for s in mine] + [
        {
            f"{name}{OTHER_LAYOUT}" if name in ATTENTION else name: value
            for name, value in theirs.of_step(s.shape, n_ubatch).items()
        }
        for s in others
    ]


def robust_nnls(design: F64, seconds: F64, base: F64, n_rounds: int) -> tuple[F64, F64]:
    """Least squares of relative errors with coefficients >= 0; outliers get a smaller weight
    (Huber) in `n_rounds` rounds. Returns the coefficients, and (measured - fitted) / fitted.

    design: (samples, terms); seconds, base: (samples,), base a weight."""
    relative = design / seconds[:, None]
    weight = base
    for _ in range(n_rounds):
        coefficients = nnls(relative * weight[:, None], weight)
        residuals = 1.0 - relative @ coefficients
        scale = max(1.4826 * float(np.median(np.abs(residuals))), 1e-4)
        weight = base * np.minimum(1.0, 1.5 * scale / np.maximum(np.abs(residuals), 1e-12)) ** 0.5
    return coefficients, residuals / np.maximum(1.0 - residuals, 1e-9)


def nnls(design: F64, target: F64) -> F64:
    """min |design x - target| with x >= 0: Lawson and Hanson's active set method (Solving Least
    Squares Problems, 1974, chapter 23), columns scaled to length 1."""
    length = np.sqrt((design**2).sum(axis=0))
    live = length > 0
    a = design / np.where(live, length, 1.0)
    gram, right = a.T @ a, a.T @ target
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], dtype=bool)
    tolerance = 1e-10 * max(float(np.abs(right).max()), 1e-300)
    for _ in range(6 * a.shape[1]):
        gradient = np.where(free | ~live, -np.inf, right - gram @ x)
        if gradient.max() <= tolerance:
            break
        free[int(gradient.argmax())] = True
        while True:
            at = np.flatnonzero(free)
            solution = np.linalg.lstsq(gram[np.ix_(at, at)], right[at], rcond=1e-12)[0]
            if (solution > 0).all():
                x[:] = 0.0
                x[at] = solution
                break
            low = at[solution <= 0]
            step = (x[low] / (x[low] - solution[solution <= 0] + 1e-300)).min()
            x[at] += step * (solution - x[at])
            free &= x > 1e-14
            x[~free] = 0.0
            if not free.any():
                break
    scaled: F64 = x / np.where(live, length, 1.0)
    return scaled
