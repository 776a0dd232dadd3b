"""CostModel: how long a step takes on this device.

    cost.predict(rows=24, prefill=16, kv=9000, n_seqs=9)   # seconds

Fitted to a profile (see `terms` for the formula), or a prior from what the kernels are known to do.
An engine refines it from its own steps.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import inf
from operator import mul
from typing import NamedTuple

import numpy as np

from pyllamabatch.cost.kernels import Kernels
from pyllamabatch.cost.profile import SCHEMA, Profile, Sample
from pyllamabatch.cost.step_cost import NO_COST, NewGraph, StepCost
from pyllamabatch.cost.terms import (
    F64,
    OF_LAYOUT,
    Fit,
    Terms,
    Ubatch,
    fit,
    parts,
    tiles_of,
    values_of,
)
from pyllamabatch.errors import ArgumentError, ProfileError

_OTHER_LAYOUT = 0.5  # times the residuals of samples of the other cache layout
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the output matrix's share, that a fit tries for h
_WINDOW_SHARES = (0.0, 0.5, 0.75, 0.875)  # that it tries for w
_SLOWEST, _FASTEST = 4.0, 0.25  # times the model that refinement goes to


class Estimate(NamedTuple):
    """seconds; sigma: one standard deviation relative to it, of a step's own time."""

    seconds: float
    sigma: float


class CostModel(StepCost):
    """Seconds of a step by its shape, where the graph of the step before is reused.

    `calibrated`: made of measurements, of this device or the profile's; a prior is not: its steps
    are where the kernels have them, how high they are and all absolute times are guesses until
    `observe` has seen some (`absolute`). `error`: median and 95th percentile of the relative error
    on the profile's own samples. `new_graph`: what it costs when the graph can't be reused.
    `edges`: row counts that end a tile or a kernel's range, up to n_ubatch: one row more may cost
    a jump. `computes_masked`: see `Kernels`. `switch`: see `observe_switch`.
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
        new_graph: NewGraph = NO_COST,
    ) -> None:
        self.terms = terms
        self.new_graph = new_graph
        values: list[float] = coefficients.tolist()
        self.coefficients = dict(zip(terms.names, values, strict=True))
        self.n_ubatch = n_ubatch
        self.unified = terms.unified
        self.computes_masked = terms.kernels.computes_masked
        self.calibrated = calibrated
        self.error = error
        self.switch = None if any(new_graph) else 0.0
        self._covariance = covariance
        self._residual = residual
        self._window = terms.window if terms.window_share else inf
        self._window_share = terms.window_share
        # Tables by row count, so that `predict` is a few look-ups.
        kernels, h = terms.kernels, terms.output_share
        passes = self._passes()
        base, head, output, experts, self._cell, *attention = values[: 4 + len(OF_LAYOUT)]
        all_few, own_few, all_many, own_many, all_prompt, own_prompt, begin = attention
        few = min(kernels.attention_from, n_ubatch + 1)
        many = n_ubatch + 1 - few
        self._body: list[float] = [
            base + experts * terms.experts(n) + begin * (n >= few) + (1 - h) * t
            for n, t in enumerate(passes)
        ]
        self._head: list[float] = [
            head * (n > 0) + output * n + h * t for n, t in enumerate(passes)
        ]
        self._all: list[float] = [all_few] * few + [all_few + all_many] * many
        self._own: list[float] = [own_few] * few + [own_few + own_many] * many
        self._all_prompt: list[float] = [all_few] * few + [all_prompt] * many
        self._own_prompt: list[float] = [own_few] * few + [own_prompt] * many
        self._regime = [0, *map(kernels.of, range(1, n_ubatch + 1))]
        jumps = kernels.edges(n_ubatch)
        self.edges = tuple(n for n in jumps if n + 1 in jumps or n == n_ubatch)
        # What refinement has found: a factor for each regime, without and with prompt rows.
        self._scale = [1.0] * (2 * len(kernels.regimes))
        self._seen = [0] * len(self._scale)

    # -- prediction --

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        """Seconds of a step of `rows` rows, `prefill` of them prompt rows, in `n_seqs` sequences
        that hold `kv` cells together before it. One row of each sequence is sampled. 0 rows take no
        time."""
        if rows > self.n_ubatch or rows == 0:
            return sum(map(self._time, self._split(rows, prefill, kv, n_seqs)))
        decode, own = rows - prefill, kv / (n_seqs or 1)
        if own > self._window:  # as `Terms.looked_at`, in a tenth of a microsecond
            own -= self._window_share * (own - self._window)
            kv = own * (n_seqs or 1)
        if not prefill:
            return self._decodes(rows, kv, own)
        n_chunks = n_seqs - decode if n_seqs > decode else 1
        if decode and not self.unified:
            return self._decodes(decode, kv, own) + self._prompts(prefill, 0, n_chunks, kv, own)
        return self._prompts(rows, decode, n_chunks, kv, own)

    def _decodes(self, n: int, kv: float, own: float) -> float:
        """A ubatch of rows that decode. own: cells of a sequence."""
        return self._scale[2 * self._regime[n]] * (
            self._body[n]
            + self._head[n]
            + self._cell * kv
            + n * (self._all[n] * (kv + 0.5 * n) + self._own[n] * own)
        )

    def _prompts(self, n: int, decode: int, n_chunks: int, kv: float, own: float) -> float:
        """One with prompt rows."""
        prompt, sight = n - decode, kv + 0.5 * n
        return self._scale[2 * self._regime[n] + 1] * (
            self._body[n]
            + self._head[min(decode + n_chunks, n)]
            + self._cell * kv
            + decode * (self._all[n] * sight + self._own[n] * own)
            + prompt * (self._all_prompt[n] * sight)
            + prompt * (self._own_prompt[n] * (own + 0.5 * prompt / n_chunks))
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
        for tile in self.terms.kernels.tiles:
            each = self.coefficients[f"tile of {tile}"]
            found = [t + each * tiles_of(tile, n) for n, t in enumerate(found)]
        return found

    def _split(self, rows: int, prefill: int, kv: float, n_seqs: int) -> list[Ubatch]:
        return self.terms.split(rows, prefill, kv, n_seqs, self.n_ubatch)

    def _time(self, part: Ubatch) -> float:
        n, decode = part.rows, part.decode
        sight = part.cells + 0.5 * n
        return self._scale[2 * self._regime[n] + (decode < n)] * (
            self._body[n]
            + self._head[part.sampled]
            + self._cell * part.cells
            + self._all[n] * decode * sight
            + self._own[n] * part.reads
            + self._all_prompt[n] * (n - decode) * sight
            + self._own_prompt[n] * part.prompt_reads
        )

    # -- refinement --

    def observe(
        self, rows: int, prefill: int, kv: float, n_seqs: int, seconds: float, n_steps: int = 1
    ) -> None:
        """Steps that were measured, `seconds` each on average: moves the factor of their regime
        towards it. Regimes that nobody has observed yet follow the mean of those of the same kind,
        with or without prompt rows: the device may be faster or slower today. A few microseconds
        and no memory, however many; one step can't move it far, and it stays within a quarter and
        four times the model (a prior, whose level is a guess, may go anywhere)."""
        if rows < 1 or rows > self.n_ubatch or not seconds > 0:
            return
        at = 2 * self._regime[rows] + (prefill > 0)
        expected = self.predict(rows, prefill, kv, n_seqs)
        if not expected > 0:  # a fit of few samples may know nothing of a regime
            return
        ratio = seconds / expected
        known, n_steps = self._seen[at], min(n_steps, _CALL_COUNTS)
        seen = self._seen[at] = min(known + n_steps, _SEEN_MAX)
        if not self.calibrated:
            if known == 0:  # the level first, for every regime that nothing is known of
                for i, n in enumerate(self._seen):
                    if n == 0:
                        self._scale[i] *= ratio
                self._scale[at] *= ratio
                return
        else:
            ratio = min(max(ratio, 1 / _STEP_MOST), _STEP_MOST)
        share = n_steps / (seen + _FIT_COUNTS)
        moved = 1.0 + (min(ratio, 4.0) - 1.0) * share
        alike = range(at % 2, len(self._scale), 2)
        n_seen = sum(self._seen[i] > 0 for i in alike)
        for i in alike:
            if i == at or not self._seen[i]:  # these follow the mean of the others
                scale = self._scale[i] * (moved if i == at else moved ** (1 / n_seen))
                self._scale[i] = min(max(scale, _FASTEST), _SLOWEST) if self.calibrated else scale

    def observe_switch(self, seconds: float) -> None:
        """What a step took longer because other sequences decode in it than in the one before,
        though as many. `switch` follows what is observed; None: nobody knows yet. Where new graphs
        cost nothing it begins with 0. (It is less than a graph of other rows: on an NVIDIA H200
        0.2 ms and what the engine takes between two calls, where that is 2 ms and 5 behind it.)
        One that took more than twice as long as what is known, or at first than a new graph, counts
        as that: a disturbed one would end all turns, and then there are no more to learn from."""
        known = self.new_graph.step if self.switch is None else self.switch
        seconds = max(0.0, seconds)
        if known:
            seconds = min(seconds, 2 * known)
        self.switch = seconds if self.switch is None else 0.75 * self.switch + 0.25 * seconds

    @property
    def absolute(self) -> bool:
        """Whether its seconds are more than a guess: measured, or followed from a step at least."""
        return self.calibrated or any(self._seen)

    @property
    def refinement(self) -> tuple[tuple[float, int], ...]:
        """The factor that steps of each regime have been found to take, and of how many steps (a
        call counts as 8 at most, and the count stops at 60): decoding alone and with prompt rows in
        turn."""
        return tuple(zip(self._scale, self._seen, strict=True))

    @property
    def n_regimes(self) -> int:
        return len(self.terms.kernels.regimes)

    def regime_of(self, rows: int) -> int:
        """Which regime of `Kernels` so many rows are in; the last one's, beyond n_ubatch."""
        return self._regime[min(rows, self.n_ubatch)]

    def at_speed(
        self, decode: float | Sequence[float], prompt: float, graph: float = 1.0
    ) -> CostModel:
        """The same device when it is slower (more than 1) or faster: steps that only decode (of
        each regime, or all), those with prompt rows, and new graphs take so many times what this
        model says."""
        found = copy.copy(self)
        each = [decode] * self.n_regimes if isinstance(decode, (int, float)) else decode
        factors = [x for regime in each for x in (regime, prompt)]
        found._scale = [a * b for a, b in zip(self._scale, factors, strict=True)]
        found._seen = [0] * len(self._seen)
        step, settle = self.new_graph
        found.new_graph = NewGraph(graph * step, graph * settle)
        return found

    # -- making one --

    @classmethod
    def fit(
        cls,
        profile: Profile,
        *,
        unified: bool = True,
        n_ubatch: int = 0,
        swa_full: bool = True,
    ) -> CostModel:
        """A model of a profile, in some milliseconds, for contexts of this layout and n_ubatch (0:
        the profile's). What the weights cost is the same in both layouts: the samples of the other
        one count for that, as if they were half as exact, and have attention of their own.

        swa_full: the context's (libllama's default). Layers with a window then hold every cell, and
        kernels that compute what is masked are charged for them all. Samples are of sequences of
        which those layers hold the window alone. (Both are a little more than that, and less:
        libllama gives masked cells to others when it comes by them.)

        Raises ArgumentError where it has too few samples (fewer than 4)."""
        all_cells = swa_full and profile.kernels.computes_masked
        profile = _at_one_speed(profile, unified)
        chosen = profile.only(unified=unified).samples
        samples = _calm(chosen)
        if len(samples) < 4:
            raise ArgumentError("profile", f"{len(samples)} samples", "must have 4 at least")
        known = set(chosen)
        others = tuple(
            s for s in profile.samples if s.n > 0 and s not in known and s.unified != unified
        )
        new_graph = _new_graph(samples, profile.n_ubatch)
        theirs = _new_graph(others, profile.n_ubatch)
        seconds = np.array(
            [
                *(_reused(s, new_graph.step, profile.n_ubatch) for s in samples),
                *(_reused(s, theirs.step, profile.n_ubatch) for s in others),
            ]
        )
        spread = np.array([s.spread for s in (*samples, *others)])
        worth = np.array([1.0] * len(samples) + [_OTHER_LAYOUT] * len(others))

        terms = Terms(
            profile.kernels,
            0.0,
            unified,
            profile.n_expert,
            profile.n_expert_used,
            profile.n_swa,
        )

        def design_of(terms: Terms) -> F64:
            return _design(terms, samples, others, profile.n_ubatch)

        plain = design_of(terms)  # the others are linear in h and w
        all_share = design_of(replace(terms, output_share=1.0))
        all_window = design_of(replace(terms, window_share=1.0)) if profile.n_swa else plain

        def attempt(share: float, window_share: float, n_rounds: int) -> Fit:
            design = plain + share * (all_share - plain) + window_share * (all_window - plain)
            found, n = fit(design, seconds, spread, worth, n_rounds), len(terms.names)
            return Fit(
                found.coefficients[:n], found.residuals[: len(samples)], found.covariance[:n, :n]
            )

        def best(tried: Sequence[float], quick: Callable[[float], Fit]) -> float:
            if len(tried) == 1:
                return tried[0]
            errors = [np.abs(quick(x).residuals).clip(0, 0.2).mean() for x in tried]
            return tried[int(np.argmin(errors))]

        shares = sorted({profile.output_share * part for part in _SHARES})
        share = best(shares, lambda x: attempt(x, 0.0, 2))
        window_shares = _WINDOW_SHARES if (all_window != plain).any() else (0.0,)
        window_share = best(window_shares, lambda x: attempt(share, x, 2))
        found = attempt(share, window_share, 6)
        errors = np.abs(found.residuals)
        return cls(
            replace(terms, output_share=share, window_share=0.0 if all_cells else window_share),
            found.coefficients,
            n_ubatch or profile.n_ubatch,
            covariance=found.covariance,
            residual=max(1.4826 * float(np.median(errors)), 0.005),
            error=(float(np.median(errors)), float(np.percentile(errors, 95))),
            calibrated=True,
            new_graph=new_graph,
        )

    def to_json(self) -> str:
        """The fitted model, without what refinement has found; `from_json` makes it again."""
        terms = asdict(self.terms)
        covariance = None if self._covariance is None else self._covariance.tolist()
        return json.dumps(
            {
                "schema": SCHEMA,
                "terms": terms,
                "coefficients": self.coefficients,
                "n_ubatch": self.n_ubatch,
                "residual": self._residual,
                "error": self.error,
                "calibrated": self.calibrated,
                "covariance": covariance,
                "new_graph": self.new_graph,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """Raises ProfileError for what `to_json` has not made."""
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']}, this version reads {SCHEMA}")
            terms = Terms(Kernels.from_dict(data["terms"].pop("kernels")), **data["terms"])
            values = np.array([data["coefficients"][name] for name in terms.names], np.float64)
            covariance = data["covariance"]
            return cls(
                terms,
                values,
                int(data["n_ubatch"]),
                covariance=None if covariance is None else np.array(covariance, np.float64),
                residual=float(data["residual"]),
                error=(float(data["error"][0]), float(data["error"][1])),
                calibrated=bool(data["calibrated"]),
                new_graph=NewGraph(*map(float, data["new_graph"])),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ProfileError("cost model", f"{type(error).__name__}: {error}") from None

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
        for tile in kernels.tiles:
            guess[f"tile of {tile}"] = 0.25 * one_pass
        for regime in kernels.regimes:
            guess[f"pass {regime.first}+"] = one_pass
            if regime.rest == "each":
                guess[f"full tile {regime.first}+"] = 0.6 * regime.tile * row
                if regime.group:
                    # each goes through the weights: no more for the first one
                    guess[f"group {regime.first}+"] = one_pass + 0.5 * regime.group * row
                    guess[f"tile beyond {regime.first}+"] = 0.6 * regime.tile * row
                for n in range(1, regime.tile):
                    guess[f"{n} beyond {regime.first}+"] = n * row
            elif regime.tile > 1:
                guess[f"tile {regime.first}+"] = regime.tile * row
            else:
                guess[f"row {regime.first}+"] = row
        return cls(terms, np.array(list(guess.values())), n_ubatch)


_SEEN_MAX = 60
_FIT_COUNTS = 2  # steps: what the fit says of a regime counts as much as so many observed ones
_CALL_COUNTS = 8  # steps: a call of more counts as so many, for something may have disturbed it
_STEP_MOST = 1.6  # a step that is further away counts as this


def held_out(profile: Profile, *, unified: bool = True, parts: int = 5) -> list[float]:
    """Relative errors on samples of this layout that the fit has not seen: each is left out once,
    with every `parts`-th one, and with what the other layout has of the same step; none where they
    are too few. New graphs count where steps of that shape have some. It says how good the model
    is, which `CostModel.error` does not."""
    known = [s for s in profile.samples if s.n > 0]
    samples = [s for s in known if s.unified == unified]
    others = [s for s in known if s.unified != unified]
    errors: list[float] = []
    for k in range(parts):
        kept = tuple(s for i, s in enumerate(samples) if i % parts != k)
        if len(kept) < 4:
            return []
        out = {s.shape for s in samples[k::parts] if s.n_seqs == 1}  # the same step in both
        kept += tuple(s for s in others if s.shape not in out)
        part = replace(profile, samples=kept)
        cost = CostModel.fit(part, unified=unified, swa_full=False)  # as samples are
        for s in samples[k::parts]:
            graphs = _graphs_each(s, profile.n_ubatch) * cost.new_graph.step
            predicted = cost.predict(*s.shape) + graphs
            errors.append(abs(predicted / s.seconds - 1))
    return errors


def _calm(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """Those that were measured undisturbed at least once, where they are enough."""
    calm = tuple(sample for sample in samples if sample.n > 0)
    return calm if len(calm) >= max(4, len(samples) // 2) else samples


def _new_graph(samples: tuple[Sample, ...], n_ubatch: int) -> NewGraph:
    """Medians: it hardly depends on the rows."""
    one = [s for s in samples if not _graphs_each(s, n_ubatch)]
    new = [s.new for s in one if s.new is not None]
    settle = [s.settle for s in one if s.settle is not None]
    return NewGraph(
        max(0.0, float(np.median(new))) if new else 0.0,
        max(0.0, float(np.median(settle))) if settle else 0.0,
    )


def _graphs_each(s: Sample, n_ubatch: int) -> int:
    """Graphs that are new at every one of equal steps: libllama keeps the last one alone, so of
    several ubatches none finds its own."""
    apart = (s.rows - s.prefill, s.prefill) if s.prefill and not s.unified else (s.rows,)
    n = sum(-(-rows // n_ubatch) for rows in apart)
    return n if n > 1 else 0


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


def _reused(s: Sample, each: float, n_ubatch: int) -> float:
    """Its seconds without the graphs that were new at every step, which took `each`."""
    return s.seconds - min(_graphs_each(s, n_ubatch) * each, 0.5 * s.seconds)


def _design(
    terms: Terms, samples: tuple[Sample, ...], others: tuple[Sample, ...], n_ubatch: int
) -> F64:
    """(samples and others, terms and those of the other layout)."""
    mine = np.array([_row(terms, s, n_ubatch) for s in samples])
    if not others:
        return mine
    terms = replace(terms, unified=not terms.unified)
    theirs = np.array([_row(terms, s, n_ubatch) for s in others])
    at = [terms.names.index(name) for name in OF_LAYOUT]
    apart = theirs[:, at]
    theirs[:, at] = 0.0
    return np.block([[mine, np.zeros((len(mine), len(at)))], [theirs, apart]])


def _row(terms: Terms, s: Sample, n_ubatch: int) -> list[float]:
    found = terms.split(*s.shape, n_ubatch)
    values: list[float] = np.sum([terms.of(part) for part in found], axis=0).tolist()
    return values
