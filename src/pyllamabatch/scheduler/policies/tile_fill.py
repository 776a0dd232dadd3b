"""Chunked prefill up to the edge of a tile. Kernels compute rows in tiles (see
`device/regimes.py`), and a tile that is not full costs like a full one: the decoding rows leave
slack, which rows of prompts fill nearly for nothing, and one row beyond the edge may cost a whole
tile. Sarathi-Serve (Agrawal et al., OSDI 2024) names this as tile quantization and takes multiples
of the tile; here the cost model of the device says where the edges are and what lies between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from math import log2
from typing import Any, NamedTuple

from ...errors import ArgumentError
from ..policy import ComposedPolicy
from ..view import SequenceView, StepView
from .parts import Paced, TokenBudget
from .sarathi import sarathi

OVER = 0.05  # so much longer than its target a step may be for a full tile
# What may be lost of the throughput for steps within their target, and while slots are free, that
# is while nobody waits for what is lost.
LOSS, LOSS_FREE = 0.01, 0.075
BESIDE = 32  # rows beyond those counted without a cost model that are looked at
PER_DOUBLING = 4  # so many steps are looked at from one to that with twice its rows
ENOUGH = 4  # batches of rows: where more wait, the last step of them does not matter
MANY = 64  # tables that are kept


class Steps(NamedTuple):
    """The steps that n who decode can be in: `seconds` by the rows of prompts, ascending. `paced`:
    those within the target, `longest`: seconds that it allows. `alone`: seconds without
    prompts."""

    seconds: dict[int, float]
    paced: int
    longest: float
    alone: float


@dataclass(frozen=True, slots=True)
class TileFill:
    """Rows of a step, by what the cost model says that the rows of prompts that wait will take:
    all steps of them, the last and shorter one, too, less what the tokens of those who decode would
    take in that time if whoever waits did, too. (In narrow steps a prompt takes long, and the batch
    is small until then.)

    Of the steps within the target of `paced` the widest that takes about as little as any of them;
    where throughput would lose more than 1% by that, the narrowest by which it does not. It
    may lose 7.5% while slots are free, for then nobody waits for what is lost. So experts, which the
    first rows of a prompt all load, get more rows than the target allows. (M2 Ultra, gpt-oss-120b,
    simulated under load: pacing alone halves the throughput.) From half of what `paced` allows, or
    one ubatch if that is fewer, to what is counted without a cost model. As `paced` where there is
    none, or none that was measured.

    `reserve`: rows that are left free for each sequence that decodes, up to the edge (speculative
    ones of its own)."""

    paced: Paced
    reserve: int = 0
    _known: dict[Any, Steps] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.reserve < 0:
            raise ArgumentError("reserve", self.reserve, "at least 0 rows")

    def __call__(self, view: StepView) -> int:
        n, cost, limits = len(view.decoding), view.cost, view.limits
        slots = limits.n_seq_max - len(view.running)
        n_prompts = len(view.prefilling) + min(len(view.waiting), slots)
        if n == 0 or not n_prompts or not measured(cost):
            return self.paced(view)
        kv = view.kv_total - view.kv_free
        # The same while there are about as many cells, and the model has not learned much.
        key = n, rough(kv), view.step // 64, id(cost), limits
        steps = self._known.get(key)
        if steps is None:
            if len(self._known) >= MANY:
                self._known.clear()
            steps = self._known[key] = self._steps(view, n, kv)
        if not steps.seconds:
            return n + steps.paced

        held, together = n * self.reserve, n + n_prompts
        at_best = cost.predict(together + held, 0, kv, together) * n / together
        decode = min(steps.alone, at_best)
        rows = rows_of(chain(view.prefilling, islice(view.waiting, slots)), ENOUGH * limits.n_batch)

        def added(prompt: int) -> float:
            """Seconds, by all rows that wait, so many at a step."""
            n_steps, rest = divmod(rows, prompt)
            seconds: float = n_steps * (steps.seconds[prompt] - decode)
            if rest:
                seconds += cost.predict(n + held + rest, rest, kv, n + 1) - decode
            return seconds

        each = {prompt: added(prompt) for prompt in steps.seconds}
        best = min(each, key=each.__getitem__)
        least, taken = each[best], -(-rows // best) * steps.seconds[best]
        near = LOSS * taken
        inside = [p for p, seconds in steps.seconds.items() if seconds <= steps.longest]
        most = min(each[p] for p in inside) + near
        found = max(p for p in inside if each[p] <= most)
        if each[found] > least + (LOSS_FREE if slots > len(view.waiting) else LOSS) * taken:
            found = min(p for p in each if each[p] <= least + near)
        return n + found

    def _steps(self, view: StepView, n: int, kv: int) -> Steps:
        predict, limits = view.cost.predict, view.limits
        held = n * self.reserve
        room = limits.n_batch - n - held
        most = min(self.paced.otherwise(view) - n, room)
        paced = min(self.paced(view) - n, most)
        if paced < 1:
            return Steps({}, paced, 0.0, 0.0)
        alone = predict(n + held, 0, kv, n)
        base = n + held if limits.unified else 0  # else prompts have ubatches of their own
        least = max(1, min(paced // 2, limits.n_ubatch - base))
        last = min(most + BESIDE, room)
        edges = edges_of(view.cost, limits.n_ubatch, limits.n_batch)
        prompts = {edge - base for edge in edges if least <= edge - base <= last}
        seconds = {p: predict(n + held + p, p, kv, n + 1) for p in sorted({paced, most, *prompts})}

        def row(prompt: int) -> float:
            """Seconds, by each of so many."""
            added: float = seconds[prompt] - alone
            return added / prompt

        about = groupby(sorted(prompts), key=lambda prompt: int(PER_DOUBLING * log2(prompt)))
        kept = {paced, most, *(min(some, key=row) for _, some in about)}
        seconds = {prompt: taken for prompt, taken in seconds.items() if prompt in kept}
        longest = (1 + OVER) * max(seconds[paced], self.paced.target(predict(n, 0, kv, n)))
        return Steps(seconds, paced, longest, alone)


def rows_of(sequences: Iterable[SequenceView], enough: int) -> int:
    """Rows that they have to compute, counted as far as `enough`."""
    total = 0
    for seq in sequences:
        total += seq.remaining
        if total >= enough:
            break
    return total


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
