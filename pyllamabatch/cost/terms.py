"""The terms of the cost model: what the seconds of a step are a sum of.

A ubatch of n rows, o of them sampled, costs

    c_base + c_head * [o > 0] + c_output * o + c_experts * e(n)
    + (1 - h) * pass(n) + h * pass(o) + attention

    pass(n) = sum over regimes r of [n in r] * c_r . f_r(n) + sum over tiles t of c_t * ceil(n / t)

- f_r(n) is (1, tiles of n, n): a pass over the weights, tiles, rows (see `kernels.Regime`). Where
  rows beyond full tiles have passes of their own it is (1, full tiles, [1 row beyond], [2], ...);
  where more rows are a cheaper group, it is (1, groups, tiles beyond, ...) from a group on.
- Only sampled rows pass the output matrix. h is between 0 (its time is c_head and c_output alone)
  and its share of the weights (it behaves like the other weights). The fit chooses.
- e(n) = 1 - (1 - k/E)^n: the share of E experts that n rows with k each touch if they choose
  evenly.

    attention = c_cells * kv + c_all * n * (attended cells) + c_own * (own cells that n rows read)

- With `Kernels.attention_from` rows or more, attention has kernels that compute tiles of rows.
  Their start costs c_many.
- Rows of one prompt look at the same cells, and a tile skips the others: they have a c_all and a
  c_own of their own. Rows that decode look at different cells, and each pays for the cells of all
  rows in its tile: a c_all and a c_own come on top.
- With a stream of cells for each sequence there is no c_all.
- Layers with a sliding window look at that many cells of a sequence at most. Of a sequence that
  holds more, w * (own - window) cells do not count. w is these layers' part of attention's time.
  The fit chooses.

All c are >= 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import add
from typing import NamedTuple

from pyllamabatch.cost.kernels import Kernels, Regime

COMMON = ("base", "head", "output", "experts")
ATTENTION = ("cells", "all", "own", "all many", "own many", "all prompt", "own prompt", "many")
"""The terms that differ between a pool of cells and streams."""


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
    """The terms' names, and their values for a ubatch. output_share: h. window: in cells.
    window_share: w."""

    kernels: Kernels
    output_share: float
    unified: bool
    n_expert: int = 0
    n_expert_used: int = 0
    window: int = 0
    window_share: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        found = [*COMMON, *ATTENTION, *(f"tile of {tile}" for tile in self.kernels.tiles)]
        for regime in self.kernels.regimes:
            found += [f"{part} {regime.first}+" for part in parts(regime)]
        return tuple(found)

    def of(self, ubatch: Ubatch) -> list[float]:
        n, decode, out = ubatch.rows, ubatch.decode, ubatch.sampled
        attended = ubatch.cells + n / 2 if self.unified else 0.0
        decoding = [decode * attended, decode * ubatch.own]
        prompt = [(n - decode) * attended, (n - decode) * ubatch.own_prompt]
        values = [1.0, float(out > 0), float(out), self.experts(n), ubatch.cells]
        if n < self.kernels.attention_from:
            values += [*map(add, decoding, prompt), 0.0, 0.0, 0.0, 0.0, 0.0]
        else:
            values += [*decoding, *decoding, *prompt, 1.0]
        h = self.output_share
        return values + [
            (1 - h) * a + h * b for a, b in zip(self.passes(n), self.passes(out), strict=True)
        ]

    def passes(self, n: int) -> list[float]:
        """The terms of pass(n): tiles, then regimes."""
        values = [float(tiles_of(tile, n)) for tile in self.kernels.tiles]
        here = self.kernels.of(n) if n else -1
        for i, regime in enumerate(self.kernels.regimes):
            values += values_of(regime, n) if i == here else [0.0] * len(parts(regime))
        return values

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


def tiles_of(tile: int, n: int) -> int:
    """Tiles that n rows fill, of kernels that have another one for a single row."""
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
