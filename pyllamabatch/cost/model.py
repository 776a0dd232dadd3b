"""CostModel: how long a step takes on this device.

    cost.predict(rows=24, prefill=16, kv=9000, n_seqs=9)   # seconds

The model is fitted to a profile (`terms` has the formula), or a prior from what the kernels are
known to do. An engine refines it with the steps that it runs."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf

from pyllamabatch.cost.fit import LEAST_SAMPLES, fit_terms
from pyllamabatch.cost.kernels import Kernels
from pyllamabatch.cost.prior import Sizes, Speeds, coefficients_of
from pyllamabatch.cost.profile import Profile
from pyllamabatch.cost.step_cost import NO_COST, NewGraph, StepCost
from pyllamabatch.cost.terms import Terms

_SEEN_MAX = 60  # steps that refinement remembers of a regime
_FIT_COUNTS = 2  # steps: the fit counts as much as so many observed ones
_CALL_COUNTS = 8  # steps: a longer call counts as so many; something may have disturbed it
_STEP_MOST = 1.6  # a step that is further off counts as this
_SLOWEST, _FASTEST = 4.0, 0.25  # limits of refinement, times the fit


class CostModel(StepCost):
    """Seconds of a step by its shape, where the graph of the step before is reused.

    A prior (`calibrated` is False) knows where the steps of the kernels are. Their heights and all
    absolute times are estimates until `observe` has seen a step (`absolute`)."""

    def __init__(
        self,
        terms: Terms,
        coefficients: Mapping[str, float],
        n_ubatch: int,
        *,
        error: tuple[float, float] = (0.5, 1.0),
        calibrated: bool = False,
        new_graph: NewGraph = NO_COST,
    ) -> None:
        kernels = terms.kernels
        self.terms = terms
        self.coefficients = coefficients
        self.n_ubatch = n_ubatch
        self.unified = terms.unified
        self.computes_masked = kernels.computes_masked
        self.calibrated = calibrated
        self.error = error
        self.new_graph = new_graph
        self.switch = None if any(new_graph) else 0.0
        self.edges = kernels.last_rows(n_ubatch)
        self._window = terms.window if terms.window_share else inf
        # Tables by row count, so that `predict` is a few look-ups. Unknown terms cost nothing.
        c = defaultdict(float, coefficients)
        rows, h = range(n_ubatch + 1), terms.output_share
        passes = [sum(c[name] * x for name, x in terms.passes(n).items()) for n in rows]
        few = [n < kernels.attention_from for n in rows]
        self._body = [
            c["base"] + c["experts"] * terms.experts(n) + c["many"] * (not few[n])
            + (1 - h) * passes[n]
            for n in rows
        ]  # fmt: skip
        self._head = [c["head"] * (n > 0) + c["output"] * n + h * passes[n] for n in rows]
        self._cell = c["cells"]
        self._all = [c["all"] if f else c["all"] + c["all many"] for f in few]
        self._own = [c["own"] if f else c["own"] + c["own many"] for f in few]
        self._all_prompt = [c["all"] if f else c["all prompt"] for f in few]
        self._own_prompt = [c["own"] if f else c["own prompt"] for f in few]
        self._regime = [0, *map(kernels.of, rows[1:])]
        # Refinement: a factor and a number of steps for each regime, without prompt rows and with.
        self._scale = [1.0] * (2 * len(kernels.regimes))
        self._seen = [0] * len(self._scale)

    # -- prediction --

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        """Seconds of a step of `rows` rows in `n_seqs` sequences, `prefill` of them prompt rows,
        when `kv` cells are held before it. One row of each sequence is sampled. 0 rows take no
        time."""
        if rows > self.n_ubatch or rows == 0:
            parts = self.terms.split(rows, prefill, kv, n_seqs, self.n_ubatch)
            return sum(self._ubatch(*part) for part in parts)
        decode, own = rows - prefill, kv / (n_seqs or 1)
        if own > self._window:
            own = self.terms.looked_at(own)
            kv = own * (n_seqs or 1)
        if not prefill:
            return self._decodes(rows, kv, own)
        n_chunks = n_seqs - decode if n_seqs > decode else 1
        own_prompt = own + 0.5 * prefill / n_chunks
        if decode and not self.unified:
            alone = self._ubatch(prefill, 0, min(n_chunks, prefill), kv, own, own_prompt)
            return self._decodes(decode, kv, own) + alone
        return self._ubatch(rows, decode, min(decode + n_chunks, rows), kv, own, own_prompt)

    def _decodes(self, n: int, cells: float, own: float) -> float:
        """A ubatch of rows that decode."""
        return self._scale[2 * self._regime[n]] * (
            self._body[n]
            + self._head[n]
            + self._cell * cells
            + n * (self._all[n] * (cells + 0.5 * n) + self._own[n] * own)
        )

    def _ubatch(
        self, n: int, decode: int, sampled: int, cells: float, own: float, own_prompt: float
    ) -> float:
        """Any ubatch, as `Ubatch` has it."""
        prompt, attended = n - decode, cells + 0.5 * n
        return self._scale[2 * self._regime[n] + (prompt > 0)] * (
            self._body[n]
            + self._head[sampled]
            + self._cell * cells
            + decode * (self._all[n] * attended + self._own[n] * own)
            + prompt * (self._all_prompt[n] * attended)
            + prompt * (self._own_prompt[n] * own_prompt)
        )

    def deeper(self, prefill: int, own: float, depth: float) -> float:
        n, looked_at = min(prefill, self.n_ubatch), self.terms.looked_at
        scale = self._scale[2 * self._regime[n] + 1]
        return scale * self._own_prompt[n] * prefill * (looked_at(depth) - looked_at(own))

    # -- refinement --

    @property
    def absolute(self) -> bool:
        return self.calibrated or any(self._seen)

    def observe(
        self, rows: int, prefill: int, kv: float, n_seqs: int, seconds: float, n_steps: int = 1
    ) -> None:
        """Steps that were measured: `n_steps`, `seconds` each on average.

        The factor of their regime moves towards the measurement. Regimes that were never observed
        follow the mean of those of the same kind (with or without prompt rows): the device may be
        faster or slower today. One call can't move a factor far, and it stays between a quarter and
        four times the fit. A prior's factors are not limited: its level is a guess, and what the
        first call of all says."""
        if rows < 1 or rows > self.n_ubatch or not seconds > 0:
            return
        at = 2 * self._regime[rows] + (prefill > 0)
        expected = self.predict(rows, prefill, kv, n_seqs)
        if not expected > 0:  # a fit of few samples may know nothing of a regime
            return
        ratio, n_steps, level = seconds / expected, min(n_steps, _CALL_COUNTS), not self.absolute
        most = _STEP_MOST if self.calibrated else _SLOWEST
        near = min(max(ratio, 1 / most), most)
        weight = n_steps / (min(self._seen[at] + n_steps, _SEEN_MAX) + _FIT_COUNTS)
        counts = n_steps if near == ratio or self.calibrated else 1  # one so far off may be wrong
        self._seen[at] = min(self._seen[at] + counts, _SEEN_MAX)
        if level:
            self._scale = [scale * ratio for scale in self._scale]
            return
        moved = near**weight  # the mean of ratios
        self._move(at, moved)
        alike = range(at % 2, len(self._scale), 2)
        unseen = [i for i in alike if not self._seen[i]]
        for i in unseen:
            self._move(i, moved ** (1 / (len(alike) - len(unseen))))

    def _move(self, i: int, factor: float) -> None:
        scale = self._scale[i] * factor
        self._scale[i] = min(max(scale, _FASTEST), _SLOWEST) if self.calibrated else scale

    def observe_switch(self, seconds: float) -> None:
        """How much longer a step took because other sequences decode in it than in the step before,
        though as many. A value above twice the known one (at first: a new graph's) counts as twice
        that: a single disturbed step would stop all switches, and nothing would correct it."""
        known = self.new_graph.step if self.switch is None else self.switch
        seconds = max(0.0, seconds)
        if known:
            seconds = min(seconds, 2 * known)
        self.switch = seconds if self.switch is None else 0.75 * self.switch + 0.25 * seconds

    @property
    def refinement(self) -> tuple[tuple[float, int], ...]:
        """The factor of each regime, and the number of steps it comes from (60 at most): decoding
        alone and with prompt rows in turn."""
        return tuple(zip(self._scale, self._seen, strict=True))

    @property
    def n_regimes(self) -> int:
        return len(self.terms.kernels.regimes)

    def regime_of(self, rows: int) -> int:
        """The regime of `Kernels` that `rows` rows fall into; the last one beyond n_ubatch."""
        return self._regime[min(rows, self.n_ubatch)]

    def at_speed(
        self, decode: float | Sequence[float] = 1.0, prompt: float = 1.0, graph: float = 1.0
    ) -> CostModel:
        """The fit, unrefined, of the same device when it is slower (above 1) or faster: factors of
        steps that only decode (one, or one per regime), of steps with prompt rows, and of new
        graphs."""
        found = copy.copy(self)
        each = [decode] * self.n_regimes if isinstance(decode, (int, float)) else decode
        factors = [factor for regime in each for factor in (regime, prompt)]
        found._scale = [factor for _, factor in zip(self._scale, factors, strict=True)]
        found._seen = [0] * len(found._scale)
        step, settle = self.new_graph
        found.new_graph = NewGraph(graph * step, graph * settle)
        return found

    # -- making one --

    @classmethod
    def fit(
        cls, profile: Profile, *, unified: bool = True, n_ubatch: int = 0, swa_full: bool = True
    ) -> CostModel:
        """A model of a profile, for contexts of this layout and n_ubatch (0: the profile's).

        swa_full: the context's (libllama's default is True). Layers with a window then hold every
        cell, and kernels that compute masked cells are charged for all of them; in the samples such
        layers hold the window alone.

        Raises ArgumentError for fewer than 4 samples of the layout."""
        found = fit_terms(profile, unified=unified, swa_full=swa_full)
        cost = cls(**found._asdict(), n_ubatch=n_ubatch or profile.n_ubatch, calibrated=True)
        cost.layout_measured = profile.has(unified=unified)
        return cost

    @classmethod
    def prior(
        cls,
        kernels: Kernels,
        model: Sizes,
        device: Speeds,
        n_ubatch: int = 512,
        *,
        unified: bool = True,
    ) -> CostModel:
        """What is known without measuring (`cost.prior`): where the steps of the kernels are, and
        of their heights what the device's speeds and the model's sizes say."""
        terms = Terms(kernels, 0.0, unified, model.experts.n, model.experts.n_used)
        return cls(terms, coefficients_of(terms, model, device), n_ubatch)


def held_out(profile: Profile, *, unified: bool = True, parts: int = 5) -> list[float]:
    """Relative errors on samples of this layout that the fit has not seen; empty where they are
    too few. Each sample is left out once, with every `parts`-th one, and with the other layout's
    sample of the same step. `CostModel.error` is on samples that the fit has seen."""
    calm = [s for s in profile.samples if s.n > 0]
    samples = [s for s in calm if s.unified == unified]
    others = [s for s in calm if s.unified != unified]
    errors: list[float] = []
    for k in range(parts):
        seen = [s for i, s in enumerate(samples) if i % parts != k]
        if len(seen) < LEAST_SAMPLES:
            return []
        out = {s.shape for s in samples[k::parts] if s.n_seqs == 1}  # the same step in both
        seen += [s for s in others if s.shape not in out]
        part = replace(profile, samples=tuple(seen))
        cost = CostModel.fit(part, unified=unified, swa_full=False)  # as samples are
        for s in samples[k::parts]:
            graphs = s.new_graphs(profile.n_ubatch) * cost.new_graph.step
            errors.append(abs((cost.predict(*s.shape) + graphs) / s.seconds - 1))
    return errors
