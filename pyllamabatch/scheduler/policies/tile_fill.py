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
from typing import Any, TypeGuard

from pyllamabatch.cost.step_cost import StepCost

from ...errors import ArgumentError
from ..view import Limits, SequenceView, StepView
from .composed import ComposedPolicy
from .parts import LEAST_ROWS, Paced, TokenBudget
from .sarathi import sarathi

OVER = 0.05  # so much longer than its target a step may be for a full tile
# The share of throughput that may be lost to keep steps within their target: where no slot is
# free, and where all are.
LOSS, LOSS_FREE = 0.01, 0.075
PER_DOUBLING = 4  # so many steps are looked at from one to that with twice its rows
ENOUGH = 4  # batches of rows: where more wait, the last step of them does not matter
MANY = 64  # sets of candidates that are remembered


@dataclass(frozen=True, slots=True)
class TileFill:
    """Rows of a step, by what the cost model says that the rows of prompts that wait will take, so
    many at a step: the time of all steps of them, the last, shorter one, too, less what the tokens
    decoded meanwhile would take in steps in which all decode, also those that wait now. (In narrow
    steps a prompt takes long, and the batch is small until it is computed.)

    Of the steps within the target of `paced` it takes the widest that takes about as little as any
    of them, if that loses no more than 1% of the time; else the narrowest that loses no more. Where
    slots are free more may be lost, in proportion to them, up to 7.5% if all were: fewer requests
    wait for it. So experts, which the first rows of a prompt all load, get more rows than the
    target allows.

    It looks at steps from half of what `paced` allows, or one ubatch if that is fewer, to what is
    counted without a cost model. As `paced` where there is none, or none that was measured.

    `reserve`: rows that are left free for each sequence that decodes, up to the edge (speculative
    ones of its own), where the batch has room for them and for some rows of prompts."""

    paced: Paced
    reserve: int = 0
    _known: dict[Any, tuple[int, tuple[int, ...]]] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.reserve < 0:
            raise ArgumentError("reserve", self.reserve, "at least 0 rows")

    def __call__(self, view: StepView) -> int:
        n, cost, limits = len(view.decoding), view.cost, view.limits
        if n == 0 or not measured(cost):
            return self.paced(view)
        admitted = who_fits(view)
        n_prompts = len(view.prefilling) + len(admitted)
        if not n_prompts:
            return self.paced(view)
        kv, predict = view.kv.attended, cost.predict
        # The same while there are about as many cells, and the model has not learned much.
        key = n, rough(kv), view.step // 64, cost, limits
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MANY:
                self._known.clear()
            found = self._known[key] = self._candidates(view, n, kv)
        paced, candidates = found
        if not candidates:
            return n

        base = n + self._held(n, limits)
        together = n + n_prompts
        wide = predict(together + self._held(together, limits), 0, kv, together)
        decode = min(predict(base, 0, kv, n), wide * n / together)
        seconds = {prompt: predict(base + prompt, prompt, kv, n + 1) for prompt in candidates}
        enough = ENOUGH * limits.n_batch
        rows = rows_of(chain(view.prefilling, admitted), enough)

        def added(prompt: int) -> float:
            """By all rows that wait, so many at a step."""
            step: float = seconds[prompt] - decode
            if rows >= enough:
                return rows / prompt * step
            n_steps, rest = divmod(rows, prompt)
            last = predict(base + rest, rest, kv, n + 1) - decode if rest else 0.0
            return n_steps * step + last

        each = {prompt: added(prompt) for prompt in candidates}
        best = min(each.values())
        taken = best + -(-rows // candidates[-1]) * decode  # at least
        free = limits.n_seq_max - len(view.running) - len(admitted)
        share = free / limits.n_seq_max if len(admitted) == len(view.waiting) else 0.0
        most = best + (LOSS + share * (LOSS_FREE - LOSS)) * taken
        longest = (1 + OVER) * max(seconds[paced], self.paced.target(predict(n, 0, kv, n)))
        inside = [p for p in candidates if seconds[p] <= longest]
        least = min(each[p] for p in inside)
        if least > most:
            return n + min(p for p in candidates if each[p] <= most)
        most = min(most, least + LOSS * taken)
        return n + max(p for p in inside if each[p] <= most)

    def _held(self, n: int, limits: Limits) -> int:
        return min(n * self.reserve, max(0, limits.n_batch - n - LEAST_ROWS))

    def _candidates(self, view: StepView, n: int, kv: int) -> tuple[int, tuple[int, ...]]:
        """Rows of prompts that `paced` allows, and those worth a look, ascending: these, what is
        counted without a cost model, and edges, of about as many rows the one at which each takes
        the least. None where those who decode fill the batch."""
        assert view.cost is not None
        predict, limits = view.cost.predict, view.limits
        held = self._held(n, limits)
        most = min(self.paced.otherwise(view) - n, limits.n_batch - n - held)
        paced = min(self.paced(view) - n, most)
        if paced < 1:
            return 0, ()
        base = n + held if limits.unified else 0  # else prompts have ubatches of their own
        least = max(1, min(paced // 2, limits.n_ubatch - base))
        edges = edges_of(view.cost, limits.n_ubatch, limits.n_batch)
        prompts = [edge - base for edge in edges if least <= edge - base <= most]
        alone = predict(n + held, 0, kv, n)

        def row(prompt: int) -> float:
            """Seconds, by each of so many."""
            added: float = predict(n + held + prompt, prompt, kv, n + 1) - alone
            return added / prompt

        about = groupby(prompts, key=lambda prompt: int(PER_DOUBLING * log2(prompt)))
        return paced, (*sorted({paced, most, *(min(some, key=row) for _, some in about)}),)


def who_fits(view: StepView) -> list[SequenceView]:
    """Those who wait that slots and cells are free for, as they came."""
    slots, limits = view.limits.n_seq_max - len(view.running), view.limits
    cells = view.kv.free - view.kv.promised
    found = []
    for seq in islice(view.waiting, max(0, slots)):
        if limits.unified:
            cells -= seq.prefix.cells + seq.remaining
            if cells < 0:
                break
        found.append(seq)
    return found


def rows_of(sequences: Iterable[SequenceView], enough: int) -> int:
    """Rows that they have to compute, counted as far as `enough`."""
    total = 0
    for seq in sequences:
        total += seq.remaining
        if total >= enough:
            break
    return total


def measured(cost: StepCost | None) -> TypeGuard[StepCost]:
    """There is a cost model, and it is more than a guess."""
    return cost is not None and cost.calibrated


def rough(kv: int) -> int:
    """`kv` to an eighth of itself."""
    return kv >> max(0, kv.bit_length() - 3) << 8 | kv.bit_length()


def edges_of(cost: StepCost, n_ubatch: int, n_batch: int) -> list[int]:
    """Row counts, ascending, after which one more row may cost a jump."""
    inside = [edge for edge in cost.edges if edge < n_ubatch]
    return [*inside, *range(n_ubatch, n_batch + 1, n_ubatch)]


def tile_fill(
    *,
    budget: int | None = None,
    itl: float = 0.1,
    stretch: float = 2.0,
    reserve: int = 0,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`reserve`: see `TileFill`. Otherwise as `sarathi`; `budget`: rows of a step where nothing has
    been measured, and the most where something has."""
    plain = sarathi(itl=itl, stretch=stretch, watermark=watermark)
    paced = Paced(TokenBudget(budget), itl, stretch)
    return replace(plain, budget=TileFill(paced, reserve))
