"""CostModel: how long a step takes on this device.

    cost.predict(rows=24, prefill=16, kv=9000, n_seqs=9)   # seconds

Fitted to a profile (see `terms` for the formula), or a prior from what the kernels are known to do.
An engine refines it from its own steps.
"""

from __future__ import annotations

from operator import mul
from typing import NamedTuple

import numpy as np

from pyllamabatch.device.profile import Profile, Sample
from pyllamabatch.device.regimes import Kernels
from pyllamabatch.device.terms import F64, Terms, Ubatch, fit, parts, values_of
from pyllamabatch.errors import ArgumentError

_ATTENTION = ("all", "own", "all many", "own many")
_SLOWEST, _FASTEST = 4.0, 0.25  # times the model that refinement goes to


class Estimate(NamedTuple):
    """seconds; sigma: one standard deviation relative to it, of a step's own time."""

    seconds: float
    sigma: float


class CostModel:
    """Seconds of a step by its shape.

    `calibrated`: made of measurements, of this device or the profile's; a prior is not: its steps
    are where the kernels have them, how high they are and all absolute times are guesses until
    `observe` has seen some. `error`: median and 95th percentile of the relative error on the
    profile's own samples.
    """

    def __init__(
        self,
        terms: Terms,
        coefficients: F64,
        n_ubatch: int,
        *,
        covariance: F64 | None = None,
        residual: float = 0.5,
        error: tuple[float, float] = (0.5, 1.0),
        calibrated: bool = False,
    ) -> None:
        self.terms = terms
        self.coefficients: dict[str, float] = dict(
            zip(terms.names, coefficients.tolist(), strict=True)
        )
        self.n_ubatch = n_ubatch
        self.unified = terms.unified
        self.calibrated = calibrated
        self.error = error
        self._covariance = covariance
        self._residual = residual
        # Tables by row count, so that `predict` is a few look-ups.
        kernels, h = terms.kernels, terms.output_share
        passes = self._passes()
        base, output, experts = (self.coefficients[n] for n in ("base", "output", "experts"))
        self._body: list[float] = [
            base + experts * terms.experts(n) + (1 - h) * t for n, t in enumerate(passes)
        ]
        self._head: list[float] = [output * n + h * t for n, t in enumerate(passes)]
        self._cell = self.coefficients["cells"]
        small = [self.coefficients[name] for name in _ATTENTION[:2]]
        many = [self.coefficients[name] for name in _ATTENTION[2:]]
        chosen = [small if n < kernels.attention_from else many for n in range(n_ubatch + 1)]
        self._all = [n * c[0] for n, c in enumerate(chosen)]
        self._own = [c[1] for c in chosen]
        self._regime = [0, *map(kernels.of, range(1, n_ubatch + 1))]
        # What refinement has found: a factor for each regime, without and with prompt rows.
        self._scale = [1.0] * (2 * len(kernels.regimes))
        self._seen = [0] * len(self._scale)

    # -- prediction --

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        """Seconds of a step of `rows` rows, `prefill` of them prompt rows that are not sampled, in
        `n_seqs` sequences that hold `kv` cells together before it. 0 rows take no time."""
        if rows > self.n_ubatch or rows == 0 or (prefill != 0 and not self.unified):
            return sum(map(self._time, self._split(rows, prefill, kv, n_seqs)))
        reads = rows * kv / n_seqs
        at = self._regime[rows]
        if prefill:
            reads += 0.5 * prefill * prefill / (n_seqs - rows + prefill)
            at += at + 1
        else:
            at += at
        return self._scale[at] * (
            self._body[rows]
            + self._head[rows - prefill]
            + self._all[rows] * (kv + 0.5 * rows)
            + self._own[rows] * reads
            + self._cell * kv
        )

    def estimate(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> Estimate:
        """`predict` with its uncertainty: what the fit leaves unexplained, and how far the shape is
        from those that were measured."""
        seconds = self.predict(rows, prefill, kv, n_seqs)
        variance = self._residual**2
        if self._covariance is not None and seconds > 0:
            x = self._features(rows, prefill, kv, n_seqs) / seconds
            variance *= 1.0 + float(x @ self._covariance @ x)
        return Estimate(seconds, variance**0.5)

    def _features(self, rows: int, prefill: int, kv: float, n_seqs: int) -> F64:
        found = self._split(rows, prefill, kv, n_seqs)
        total: F64 = np.sum([self.terms.of(part) for part in found], axis=0, dtype=np.float64)
        return total

    def _passes(self) -> list[float]:
        """Seconds of n rows in their regime, for n in 0..n_ubatch."""
        regimes = self.terms.kernels.regimes
        ends = [*(regime.first for regime in regimes[1:]), self.n_ubatch + 1]
        found = [0.0]
        for regime, end in zip(regimes, ends, strict=True):
            c = [self.coefficients[f"{part} {regime.first}+"] for part in parts(regime)]
            rows = range(regime.first, min(end, self.n_ubatch + 1))
            found += [sum(map(mul, c, values_of(regime, n))) for n in rows]
        return found

    def _split(self, rows: int, prefill: int, kv: float, n_seqs: int) -> list[Ubatch]:
        return split(rows, prefill, kv, n_seqs, self.n_ubatch, self.unified)

    def _time(self, part: Ubatch) -> float:
        n = part.rows
        return self._scale[2 * self._regime[n] + (part.sampled < n)] * (
            self._body[n]
            + self._head[part.sampled]
            + self._all[n] * (part.cells + 0.5 * n)
            + self._own[n] * part.reads
            + self._cell * part.cells
        )

    # -- refinement --

    def observe(self, rows: int, prefill: int, kv: float, n_seqs: int, seconds: float) -> None:
        """A step that was measured: moves the factor of its regime a little towards it. A few
        microseconds and no memory, however many; one step can't move it far, and it stays within a
        quarter and four times the model (a prior, whose level is a guess, may go anywhere)."""
        if rows < 1 or rows > self.n_ubatch or not seconds > 0:
            return
        at = 2 * self._regime[rows] + (prefill > 0)
        ratio = seconds / self.predict(rows, prefill, kv, n_seqs)
        seen = self._seen[at] = min(self._seen[at] + 1, _SEEN_MAX)
        if not self.calibrated:
            if seen == 1:  # the level first, for every regime that nothing is known of
                for i, n in enumerate(self._seen):
                    if n == 0:
                        self._scale[i] *= ratio
                self._scale[at] *= ratio
                return
        else:
            ratio = min(max(ratio, 0.5), 2.0)
        scale = self._scale[at] * (1.0 + (min(ratio, 4.0) - 1.0) / (seen + 4))
        self._scale[at] = min(max(scale, _FASTEST), _SLOWEST) if self.calibrated else scale

    @property
    def refinement(self) -> tuple[tuple[float, int], ...]:
        """The factor that steps of each regime have been found to take, and of how many steps (the
        count stops at 60): decoding alone and with prompt rows in turn."""
        return tuple(zip(self._scale, self._seen, strict=True))

    # -- making one --

    @classmethod
    def fit(cls, profile: Profile, *, unified: bool = True, n_ubatch: int = 0) -> CostModel:
        """A model of a profile, in some milliseconds, for contexts of this layout and n_ubatch (0:
        the profile's). Raises ArgumentError where it has too few samples (fewer than 4)."""
        terms = Terms(
            profile.kernels,
            profile.output_share,
            unified,
            profile.n_expert,
            profile.n_expert_used,
        )
        samples = _calm(profile.only(unified=unified).samples)
        if len(samples) < 4:
            raise ArgumentError("profile", f"{len(samples)} samples", "must have 4 at least")
        design = np.array([_row(terms, s, profile.n_ubatch) for s in samples])
        seconds = np.array([s.seconds for s in samples])
        found = fit(design, seconds, np.array([s.spread for s in samples]))
        errors = np.abs(found.residuals)
        return cls(
            terms,
            found.coefficients,
            n_ubatch or profile.n_ubatch,
            covariance=found.covariance,
            residual=max(1.4826 * float(np.median(errors)), 0.005),
            error=(float(np.median(errors)), float(np.percentile(errors, 95))),
            calibrated=True,
        )

    @classmethod
    def prior(
        cls,
        kernels: Kernels,
        row_bytes: float,
        n_ubatch: int = 512,
        *,
        gpu: bool,
        unified: bool = True,
    ) -> CostModel:
        """What can be said without measuring: a pass over `row_bytes` of weights at a typical
        bandwidth, and a tile's share of it for each tile of rows. Good for where steps are; not
        for their height, for absolute times or for what attention costs."""
        one_pass = row_bytes / (1e12 if gpu else 2e10)
        row = one_pass / (32 if gpu else 3)
        terms = Terms(kernels, 0.0, unified)
        guess = dict.fromkeys(terms.names, 0.0)
        for regime in kernels.regimes:
            guess[f"pass {regime.first}+"] = one_pass
            if regime.rest == "each":
                guess[f"full tile {regime.first}+"] = 0.6 * regime.tile * row
                for n in range(1, regime.tile):
                    guess[f"{n} beyond {regime.first}+"] = n * row
            elif regime.tile > 1:
                guess[f"tile {regime.first}+"] = regime.tile * row
            else:
                guess[f"row {regime.first}+"] = row
        return cls(terms, np.array(list(guess.values())), n_ubatch)


_SEEN_MAX = 60


def _calm(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """Those that were measured undisturbed at least once, where they are enough."""
    calm = tuple(sample for sample in samples if sample.n > 0)
    return calm if len(calm) >= max(4, len(samples) // 2) else samples


def _row(terms: Terms, s: Sample, n_ubatch: int) -> list[float]:
    found = split(s.rows, s.prefill, s.kv, s.n_seqs, n_ubatch, s.unified)
    values: list[float] = np.sum([terms.of(part) for part in found], axis=0).tolist()
    return values


def split(
    rows: int, prefill: int, kv: float, n_seqs: int, n_ubatch: int, unified: bool
) -> list[Ubatch]:
    """The ubatches that a step is computed in: n_ubatch rows each (src/llama-batch.cpp:
    `split_simple`); with cells of each sequence's own those that decode apart from the prompts
    (`Step.parts`)."""
    if rows == 0:
        return []
    decode = rows - prefill
    n_chunks = n_seqs - decode
    own = kv / n_seqs
    found: list[Ubatch] = []
    if not unified and decode and prefill:
        found.append(Ubatch(decode, decode, kv, decode * own))
        rows, decode = prefill, 0
    done = 0  # prompt rows
    while rows:
        n = min(rows, n_ubatch)
        sampled, decode = min(decode, n), max(decode - n, 0)
        chunk = n - sampled
        reads = n * own
        if chunk:
            reads += chunk * (done + chunk / 2) / n_chunks
        found.append(Ubatch(n, sampled, kv, reads))
        kv, done, rows = kv + n, done + chunk, rows - n
    return found
