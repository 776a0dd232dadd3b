"""Neighbours: newcomers' prompts side by side.

Where every sequence has a stream of cells, prompts are computed together only if their slots follow
each other and they have the same number of rows. On a device a call costs so much that it pays to
fill up the shorter ones with rows that no sequence reads, which are taken out again, and to give
newcomers of one step slots in a row, from which sequences that decode move away."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..cost.step_cost import StepCost
from .step import PromptChunk, by_slot
from .view import Limits

MOST = 8  # prompts that are computed together


class Neighbours:
    """Of one context. stream_seconds: for a copy of a stream of cells. moves: streams can be
    copied."""

    def __init__(self, limits: Limits, stream_seconds: float, *, moves: bool) -> None:
        self.moves = moves and limits.fills
        self._limits = limits
        self._stream_seconds = stream_seconds

    def evened(self, chunks: Sequence[PromptChunk], cost: StepCost) -> tuple[PromptChunk, ...]:
        """The chunks, by slot, with as many rows each where they are best computed together."""
        found: list[PromptChunk] = []
        ordered = sorted(chunks, key=by_slot)
        first = 0
        for end in range(1, len(ordered) + 1):
            if end < len(ordered) and ordered[end].slot == ordered[end - 1].slot + 1:
                continue
            run = ordered[first:end]
            starts, sizes = [chunk.start for chunk in run], [chunk.n for chunk in run]
            _, groups = self._grouped(starts, sizes, cost)
            filled_before = False
            for group in groups:
                most = max(sizes[i] for i in group)
                chunks_of = [run[i]._replace(fill=most - sizes[i]) for i in group]
                filled = any(chunk.fill for chunk in chunks_of)
                # rows that fill up are in no budget: two groups might be too many for a call
                chunks_of[0] = chunks_of[0]._replace(apart=filled or filled_before)
                found += chunks_of
                filled_before = filled
            first = end
        return tuple(found)

    def window(
        self, sizes: Sequence[int], occupied: npt.NDArray[np.bool_], cost: StepCost
    ) -> list[int] | None:
        """Slots in a row for newcomers with prompts of these sizes, so that those of a similar size
        are neighbours, where it pays that those that run there move away; else None. occupied: by
        slot."""
        k = min(len(sizes), MOST)
        free = (~occupied).nonzero()[0][:k].tolist()
        if k < 2 or len(free) < k:
            return None
        top = max(*occupied.nonzero()[0].tolist(), *free) + 1
        in_the_way = np.convolve(occupied[:top], np.ones(k, dtype=np.int64), "valid")
        first = int(in_the_way.argmin())
        by_size = sorted(range(k), key=sizes.__getitem__)
        together, _ = self._grouped([0] * k, [sizes[i] for i in by_size], cost)
        alone = sum(self._seconds(1, size, cost) for size in sizes[:k])
        if alone - together <= in_the_way[first] * self._stream_seconds:
            return None
        return [first + by_size.index(i) for i in range(k)]

    def _seconds(self, k: int, size: int, cost: StepCost) -> float:
        return cost.predict(k * size, k * size, 0, k)

    def _grouped(
        self, starts: Sequence[int], sizes: Sequence[int], cost: StepCost
    ) -> tuple[float, list[range]]:
        """How neighbours are best grouped, in their order, and how long that takes."""
        limits = self._limits
        best: list[tuple[float, int]] = [
            (0.0, 0)
        ]  # of the first i, and where their last group begins
        for end in range(1, len(sizes) + 1):
            found = (best[end - 1][0] + self._seconds(1, sizes[end - 1], cost), end - 1)
            for first in range(end - 2, max(-1, end - MOST - 1), -1):
                size, k = max(sizes[first:end]), end - first
                if (
                    k * size > limits.rows_together
                    or max(starts[first:end]) + size > limits.n_cells_seq
                ):
                    break
                found = min(found, (best[first][0] + self._seconds(k, size, cost), first))
            best.append(found)
        groups: list[range] = []
        end = len(sizes)
        while end:
            groups.append(range(best[end][1], end))
            end = best[end][1]
        return best[-1][0], groups[::-1]
