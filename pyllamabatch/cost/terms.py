"""The terms of the cost model: what the seconds of a step are a sum of.

A ubatch of n rows, o of them sampled, costs

    c_base + c_head * [o > 0] + c_output * o + c_experts * e(n)
    + (1 - h) * pass(n) + h * pass(o) + attention

    pass(n) = sum over regimes r of [n in r] * c_r . f_r(n) + sum over tiles t of c_t * ceil(n / t)

- f_r(n) is a pass over the weights, tiles, rows (`values_of`). Where rows beyond full tiles have
  passes of their own, each number of them has a term; a group of rows may be cheaper.
- Where a regime begins among rows that no sample is near (`Terms.gaps`), nothing is known of a
  jump, and a pass goes steadily from the last rows that were measured to the next ones.
- Only sampled rows pass the output matrix. h is between 0 (its time is c_head and c_output alone)
  and its share of the weights (it behaves like the other weights). The fit chooses.
- e(n) = 1 - (1 - k/E)^n: the share of E experts that n rows with k each touch if they choose
  evenly.

    attention = c_cells * kv + c_all * n * (attended cells) + c_own * (own cells that n rows read)

- From `Kernels.attention_from` rows on, attention has kernels that compute tiles of rows. Their
  start costs c_many. Rows of one prompt look at the same cells, and a tile skips the others: they
  have a c_all and a c_own of their own. Each row that decodes pays for the cells of all rows in its
  tile: a c_all and a c_own come on top.
- With a stream of cells for each sequence there is no c_all.
- Layers with a sliding window look at that many cells of a sequence at most. Of a sequence that
  holds more, w * (own - window) cells do not count. w is these layers' part of attention's time.
  The fit chooses.

All c are >= 0."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pyllamabatch.cost.kernels import Kernels, Regime

ATTENTION = ("cells", "all", "own", "all many", "own many", "all prompt", "own prompt", "many")
"""The terms that differ between a pool of cells and streams."""

Shape = tuple[int, int, float, int]
"""rows, prefill, kv, n_seqs: as `CostModel.predict` takes them."""


class Experts(NamedTuple):
    """Of a mixture of experts, else all 0: bytes of all, how many, of how many a row passes, and
    weights of all."""

    n_bytes: float = 0.0
    n: int = 0
    n_used: int = 0
    n_weights: float = 0.0


DENSE = Experts()


class Ubatch(NamedTuple):
    """Rows that are computed at once. decode: rows of sequences that have one row each; the others
    are prompt rows. sampled: rows with output. cells: held by all sequences. own, own_prompt: cells
    of its own sequence that a decoding row and a prompt row look at, on average."""

    rows: int
    decode: int
    sampled: int
    cells: float
    own: float
    own_prompt: float = 0.0


@dataclass(frozen=True, slots=True)
class Terms:
    """The values of the terms by name; those that are not named are 0. output_share: h. window: in
    cells. window_share: w. gaps: numbers of rows, between which a pass goes steadily."""

    kernels: Kernels
    output_share: float
    unified: bool
    n_expert: int = 0
    n_expert_used: int = 0
    window: int = 0
    window_share: float = 0.0
    gaps: tuple[tuple[int, int], ...] = ()

    def of_step(self, shape: Shape, n_ubatch: int) -> dict[str, float]:
        values: dict[str, float] = {}
        for ubatch in self.split(*shape, n_ubatch):
            _add(values, self.of(ubatch))
        return values

    def of(self, ubatch: Ubatch) -> dict[str, float]:
        n, decode, out = ubatch.rows, ubatch.decode, ubatch.sampled
        prompt, h = n - decode, self.output_share
        attended = ubatch.cells + n / 2 if self.unified else 0.0
        values = {"base": 1.0, "head": float(out > 0), "output": float(out)}
        values |= {"experts": self.experts(n), "cells": ubatch.cells}
        if n < self.kernels.attention_from:
            values |= {"all": n * attended, "own": decode * ubatch.own + prompt * ubatch.own_prompt}
        else:
            values |= {"all": decode * attended, "own": decode * ubatch.own, "many": 1.0}
            values |= {"all many": values["all"], "own many": values["own"]}
            values |= {"all prompt": prompt * attended, "own prompt": prompt * ubatch.own_prompt}
        _add(values, self.passes(n), 1 - h)
        _add(values, self.passes(out), h)
        return values

    def passes(self, n: int) -> dict[str, float]:
        """The terms of pass(n)."""
        for low, high in self.gaps:
            if low < n < high:
                values: dict[str, float] = {}
                part = (n - low) / (high - low)
                _add(values, self.passes(low), 1 - part)
                _add(values, self.passes(high), part)
                return values
        if not n:
            return {}
        # Kernels that compute a tile at once have another one for a single row.
        values = {f"tile of {tile}": float(-(-n // tile)) for tile in self.kernels.tiles if n > 1}
        regime = self.kernels.regimes[self.kernels.of(n)]
        return values | {f"{part} {regime.first}+": x for part, x in values_of(regime, n).items()}

    def split(self, rows: int, prefill: int, kv: float, n_seqs: int, n_ubatch: int) -> list[Ubatch]:
        """The ubatches of a step: n_ubatch rows each (src/llama-batch.cpp: `split_simple`). With
        streams, decoding rows are computed apart from prompts (`Step.parts`)."""
        decode = rows - prefill
        n_chunks = n_seqs - decode if n_seqs > decode else 1
        n_seqs = n_seqs or 1
        own = kv / n_seqs
        looked = self.looked_at(own)
        found: list[Ubatch] = []
        if not self.unified and decode and prefill:
            for first in range(0, decode, n_ubatch):
                n = min(n_ubatch, decode - first)
                found.append(Ubatch(n, n, n, looked * n_seqs * n / decode, looked))
            rows, decode = prefill, 0
        done = 0  # prompt rows
        while rows:
            n = min(rows, n_ubatch)
            single = min(decode, n)
            chunk = n - single
            sampled = min(n, single + n_chunks) if chunk and n == rows else single
            cells = self.looked_at(kv / n_seqs) * n_seqs
            before = self.looked_at(own + done / n_chunks)
            found.append(Ubatch(n, single, sampled, cells, looked, before + chunk / 2 / n_chunks))
            kv, done, rows, decode = kv + n, done + chunk, rows - n, decode - single
        return found

    def looked_at(self, own: float) -> float:
        """Cells that the layers look at on average, of a sequence that holds `own`."""
        if self.window_share and own > self.window:
            return own - self.window_share * (own - self.window)
        return own

    def experts(self, n: int) -> float:
        if not self.n_expert:
            return 0.0
        return 1.0 - float((1.0 - self.n_expert_used / self.n_expert) ** n)


def values_of(regime: Regime, n: int) -> dict[str, float]:
    """f_r(n), by the names of its parts."""
    full, beyond = divmod(n, regime.tile)
    if regime.rest != "each":
        tiles = {"tile": float(full + (beyond > 0))} if regime.tile > 1 else {}
        return {"pass": 1.0, **tiles, "row": float(n)}
    each = {f"{beyond} beyond": 1.0} if beyond else {}
    groups, rest = divmod(n, regime.group) if regime.group else (0, n)
    if not groups:
        return {"pass": 1.0, "full tile": float(full), **each}
    tiles = {"group": float(groups), "tile beyond": float(rest // regime.tile)}
    return {"any group": 1.0, **tiles, **each}


def _add(values: dict[str, float], more: Mapping[str, float], times: float = 1.0) -> None:
    for name, value in more.items():
        values[name] = values.get(name, 0.0) + times * value
