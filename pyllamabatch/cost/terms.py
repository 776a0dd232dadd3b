"""The terms of the cost model: what a step's time is a sum of, and how they are fitted.

A ubatch of n rows, o of them sampled, costs

    sum over regimes r of  (1 - h) * [n in r] * c_r . f_r(n)  +  h * [o in r] * c_r . f_r(o)
    + sum over tiles t of  c_t * ((1 - h) * ceil(n / t) + h * ceil(o / t))
    + c_base + c_head * [o > 0] + c_output * o + c_experts * e(n) + c_many * [n is many] + attention

f_r(n) is (1, tiles of n, n), or where rows beyond full tiles go another way, in passes of their
own, (1, full tiles, [1 row beyond those], [2 rows], ...); where so many rows at once are a cheaper
group, the first two are for fewer than that, and in their place come (1, groups, full tiles beyond
them) for more. The tiles are those of other kernels that some of the weights go through. Only
sampled rows pass the output matrix: h is between 0, where its time is c_head and c_output alone,
and its share of the weights, where it behaves like the others; the fit chooses.
e(n) = 1 - (1 - k/E)^n is the share of E experts that n rows with k each are expected to touch, if
they choose evenly. Attention is

    c_cells * kv  +  c_all * n * (cells in sight)  +  c_own * (own cells that the n rows look at)

Where there are `Kernels.attention_from` rows or more, it has kernels that compute tiles of them;
c_many is what beginning those costs. Rows of one prompt look at the same cells, and a tile skips
the others: they have a c_all and a c_own of their own. Rows that decode look at different cells,
and each pays for those of all in its tile: a c_all and a c_own come on top of theirs. With cells of
each sequence's own there is no c_all. All c are >= 0.

Layers with a sliding window look at that many cells of a sequence at most. Of one that holds more,
w * (own - window) fewer count, as cells of its own and of those in sight: w is the part that such
layers have in what attention takes, which the fit chooses, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import add
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyllamabatch.cost.kernels import Kernels, Regime

F64 = npt.NDArray[np.float64]
# What differs between cells that are shared and streams: attention.
OF_LAYOUT = (
    "cells",
    "all",
    "own",
    "all many",
    "own many",
    "all prompt",
    "own prompt",
    "many",
)


class Ubatch(NamedTuple):
    """Rows that are computed at once. `decode`: rows of sequences that have one each; the others
    are prompt rows. `sampled`: rows with output, those and the last ones of prompts. `cells`: held
    by all sequences. `reads`, `prompt_reads`: cells of their own that the decoding rows and the
    prompt rows look at, in all."""

    rows: int
    decode: int
    sampled: int
    cells: float
    reads: float
    prompt_reads: float = 0.0


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms' names, and their values for a ubatch. `window`: in cells; `window_share`: w."""

    kernels: Kernels
    output_share: float
    unified: bool
    n_expert: int = 0
    n_expert_used: int = 0
    window: int = 0
    window_share: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        found = ["base", "head", "output", "experts", *OF_LAYOUT]
        found += [f"tile of {tile}" for tile in self.kernels.tiles]
        for regime in self.kernels.regimes:
            found += [f"{part} {regime.first}+" for part in parts(regime)]
        return tuple(found)

    def of(self, ubatch: Ubatch) -> list[float]:
        n, out = ubatch.rows, ubatch.sampled
        values = [1.0, float(out > 0), float(out), self.experts(n), ubatch.cells]
        attended_cells = ubatch.cells + n / 2 if self.unified else 0.0
        alone = [ubatch.decode * attended_cells, ubatch.reads]
        prompt = [(n - ubatch.decode) * attended_cells, ubatch.prompt_reads]
        if n < self.kernels.attention_from:
            values += [*map(add, alone, prompt), 0.0, 0.0, 0.0, 0.0, 0.0]
        else:
            values += [*alone, *alone, *prompt, 1.0]
        h = self.output_share
        for tile in self.kernels.tiles:
            values.append((1 - h) * tiles_of(tile, n) + h * tiles_of(tile, out))
        body, head = self.kernels.of(n), self.kernels.of(out) if out else -1
        for i, regime in enumerate(self.kernels.regimes):
            rows = values_of(regime, n) if i == body else (0.0,) * len(parts(regime))
            last = values_of(regime, out) if i == head else (0.0,) * len(rows)
            values += [(1 - h) * a + h * b for a, b in zip(rows, last, strict=True)]
        return values

    def split(self, rows: int, prefill: int, kv: float, n_seqs: int, n_ubatch: int) -> list[Ubatch]:
        """The ubatches that a step is computed in: n_ubatch rows each (src/llama-batch.cpp:
        `split_simple`); with cells of each sequence's own those that decode apart from the prompts
        (`Step.parts`)."""
        if rows == 0:
            return []
        decode = rows - prefill
        n_chunks = n_seqs - decode if n_seqs > decode else 1
        n_seqs = n_seqs or 1
        own = kv / n_seqs
        found: list[Ubatch] = []
        if not self.unified and decode and prefill:
            looked, left = self.looked_at(own), decode
            while left:
                n = min(left, n_ubatch)
                cells = looked * n_seqs * n / decode
                found.append(Ubatch(n, n, n, cells, n * looked))
                left -= n
            rows, decode = prefill, 0
        done = 0  # prompt rows
        while rows:
            n = min(rows, n_ubatch)
            single, decode = min(decode, n), max(decode - n, 0)
            chunk = n - single
            before = self.looked_at(own + done / n_chunks)
            of_prompts = chunk * (before + chunk / 2 / n_chunks) if chunk else 0.0
            sampled = min(n, single + n_chunks) if chunk and n == rows else single
            cells = self.looked_at(kv / n_seqs) * n_seqs
            of_single = single * self.looked_at(own)
            found.append(Ubatch(n, single, sampled, cells, of_single, of_prompts))
            kv, done, rows = kv + n, done + chunk, rows - n
        return found

    def looked_at(self, own: float) -> float:
        """Of a sequence's own cells, as many as its layers look at on average."""
        if self.window_share and own > self.window:
            return own - self.window_share * (own - self.window)
        return own

    def experts(self, n: int) -> float:
        if not self.n_expert:
            return 0.0
        return 1.0 - float((1.0 - self.n_expert_used / self.n_expert) ** n)


def tiles_of(tile: int, n: int) -> int:
    """How many tiles n rows fill, of kernels that have another one for a single row."""
    return -(-n // tile) if n > 1 else 0


def parts(regime: Regime) -> tuple[str, ...]:
    """Names of a regime's terms."""
    if regime.rest == "each":
        groups = ("any group", "group", "tile beyond") if regime.group else ()
        beyond = (f"{i} beyond" for i in range(1, regime.tile))
        return ("pass", "full tile", *groups, *beyond)
    return ("pass", "tile", "row") if regime.tile > 1 else ("pass", "row")


def values_of(regime: Regime, n: int) -> tuple[float, ...]:
    """Their values for n rows: f_r(n)."""
    full, beyond = divmod(n, regime.tile)
    if regime.rest == "each":
        each = [float(i == beyond) for i in range(1, regime.tile)]
        if not regime.group:
            return (1.0, float(full), *each)
        groups, rest = divmod(n, regime.group)
        if not groups:
            return (1.0, float(full), 0.0, 0.0, 0.0, *each)
        return (0.0, 0.0, 1.0, float(groups), float(rest // regime.tile), *each)
    tiles = full + (beyond > 0)
    return (1.0, float(tiles), float(n)) if regime.tile > 1 else (1.0, float(n))


class Fit(NamedTuple):
    """coefficients: seconds per unit of each term. residuals: (measured - fitted) / fitted.
    covariance: of the coefficients for residuals of 1, over the terms that are in use."""

    coefficients: F64
    residuals: F64
    covariance: F64


def fit(design: F64, seconds: F64, spread: F64, worth: F64, n_rounds: int) -> Fit:
    """Least squares of relative errors with coefficients >= 0, outliers weighed down (Huber) in
    `n_rounds` rounds.

    design: (samples, terms); seconds, spread, worth: (samples,), spread relative.
    """
    base = worth / (0.02 + spread)
    base /= base.mean()
    relative = design / seconds[:, None]
    weight = base
    for _ in range(n_rounds):
        coefficients = nnls(relative * weight[:, None], weight)
        residuals = 1.0 - relative @ coefficients
        scale = max(1.4826 * float(np.median(np.abs(residuals))), 1e-4)
        weight = base * np.minimum(1.0, 1.5 * scale / np.maximum(np.abs(residuals), 1e-12)) ** 0.5
    used = coefficients > 0
    inside = (relative * weight[:, None])[:, used]
    covariance = np.zeros((len(coefficients),) * 2)
    covariance[np.ix_(used, used)] = np.linalg.pinv(inside.T @ inside)
    return Fit(coefficients, residuals / np.maximum(1.0 - residuals, 1e-9), covariance)


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
