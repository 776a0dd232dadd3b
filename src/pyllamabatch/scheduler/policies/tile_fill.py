"""Chunked prefill up to the edge of a tile. Kernels compute rows in tiles (see
`device/regimes.py`), and a tile that is not full costs like a full one: the decoding rows leave
slack, which rows of prompts fill nearly for nothing, and one row beyond the edge may cost a whole
tile. Sarathi-Serve (Agrawal et al., OSDI 2024) names this as tile quantization and takes multiples
of the tile; here the cost model of the device says where the edges are and what lies between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

from ...errors import ArgumentError
from ..policy import ComposedPolicy
from ..view import StepView
from .parts import Paced, TokenBudget
from .sarathi import sarathi

NEAR = 0.02  # so much dearer a row may be for a shorter step
OVER = 0.05  # so much longer than its target a step may be for a full tile
# See `TileFill`. A price at which no shipped profile loses 1% of throughput (`bench policies`), and
# the M2 Ultra's turns make no ITL longer.
BACKLOG, PRICE = 0.125, 0.075
BESIDE = 32  # rows beyond the target's that are looked at, if it has few
MANY = 64  # candidates, and results that are kept


class Fill(NamedTuple):
    """Rows of a step, and where more than `patience` sequences wait for rows of their prompts."""

    rows: int
    crowded: int
    patience: float


@dataclass(frozen=True, slots=True)
class TileFill:
    """Rows of a step: those of `paced`, or of the edges near it the one at which a row costs least:
    from half of the prompts' rows that `paced` allows, or one ubatch if that is fewer, to those
    that take no more than 5% longer, but no more than are counted without a cost model. Of edges
    that are about as good the narrowest. As `paced` where there is no cost model, or none that was
    measured.

    Pacing has a price: in a short step a row of a prompt may add more to what the decoding rows
    take anyway. Where it adds 7.5% more than in the best of all steps (experts, which the first
    rows of a prompt all load; CPUs), or where more prompts wait for rows than one, and one for each
    eight that decode, it is the best of all steps: whoever waits would decode, and the batch gets
    small. (M2 Ultra, gpt-oss-120b, simulated under load: pacing alone halves the throughput.)

    `reserve`: rows that are left free for each sequence that decodes, up to the edge (speculative
    ones of its own)."""

    paced: Paced
    reserve: int = 0
    _found: dict[Any, Fill] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.reserve < 0:
            raise ArgumentError("reserve", self.reserve, "at least 0 rows")

    def __call__(self, view: StepView) -> int:
        n, cost, limits = len(view.decoding), view.cost, view.limits
        n_prompts = len(view.prefilling) + min(
            len(view.waiting), limits.n_seq_max - len(view.running)
        )
        if n == 0 or not n_prompts or not measured(cost):
            return self.paced(view)
        kv = view.kv_total - view.kv_free
        # The same while there are about as many cells, and the model has not learned much.
        key = n, rough(kv), view.step // 64, id(cost), limits
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= MANY:
                self._found.clear()
            found = self._found[key] = self._choose(view, n, kv)
        return found.crowded if n_prompts > found.patience else found.rows

    def _choose(self, view: StepView, n: int, kv: int) -> Fill:
        predict, limits = view.cost.predict, view.limits
        held = n * self.reserve
        room = limits.n_batch - n - held
        most = min(self.paced.otherwise(view) - n, room)
        paced = min(self.paced(view) - n, most)
        if paced < 1:
            return Fill(n + paced, n + most, inf)

        def seconds(prompt: int) -> float:
            value: float = predict(n + held + prompt, prompt, kv, n + 1)
            return value

        def added(prompt: int) -> float:
            """To the step by each row of a prompt."""
            return max(0.0, seconds(prompt) - seconds(0)) / prompt

        base = n + held if limits.unified else 0  # else prompts have ubatches of their own
        least = max(1, min(paced // 2, limits.n_ubatch - base))
        edges = edges_of(view.cost, limits.n_ubatch, limits.n_batch)
        prompts = [edge - base for edge in edges if least <= edge - base <= most + BESIDE]
        alone = predict(n, 0, kv, n)
        taken = predict(n + paced, paced, kv, n + 1)
        longest = (1 + OVER) * max(taken, self.paced.target(alone))
        best, far = (0.0, paced), (0.0, most)
        for prompt in sorted({paced, most, *prompts[:MANY]}):
            if prompt > room:
                break
            taken = seconds(prompt)
            rate = (n + prompt) / taken
            if rate > (1 + NEAR) * best[0] and taken <= longest:
                best = rate, prompt
            if rate > (1 + NEAR) * far[0]:
                far = rate, prompt
        dear = added(best[1]) > (1 + PRICE) * added(far[1])
        return Fill(n + best[1], n + far[1], 0.0 if dear else 1 + BACKLOG * n)


def measured(cost: Any) -> bool:
    """There is a cost model, and it is more than a guess."""
    return cost is not None and getattr(cost, "calibrated", True)


def rough(kv: int) -> int:
    """`kv` to an eighth of itself."""
    return kv >> max(0, kv.bit_length() - 3) << 8 | kv.bit_length()


def edges_of(cost: Any, n_ubatch: int, n_batch: int) -> list[int]:
    """Row counts, ascending, after which one more row may cost a jump."""
    inside = [edge for edge in getattr(cost, "edges", ()) if edge < n_ubatch]
    return [*inside, *range(n_ubatch, n_batch + 1, n_ubatch)]


def tile_fill(
    *,
    budget: int | None = None,
    itl: float = 0.1,
    stretch: float = 2.0,
    reserve: int = 0,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`reserve`: see `TileFill`. Otherwise as `sarathi`; `budget` is for where nothing has been
    measured."""
    plain = sarathi(itl=itl, stretch=stretch, watermark=watermark)
    paced = Paced(TokenBudget(budget), itl, stretch)
    return replace(plain, budget=TileFill(paced, reserve))
