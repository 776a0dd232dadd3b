"""TileFill: rows of prompts up to the edge of a tile."""

from __future__ import annotations

from typing import Any

import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.scheduler import Limits, SequenceView, StepView, make_policy, tile_fill

LIMITS = Limits(n_batch=512, n_ubatch=128, n_seq_max=40, n_cells=20000, n_cells_seq=20000)


class Tiles:
    """A step costs by the tile of 16, 30 ms each, and `base`."""

    calibrated = True
    error = (0.01, 0.05)
    edges = tuple(range(16, 129, 16))

    def __init__(self, base: float = 0.05, tile: float = 0.03) -> None:
        self.base, self.tile = base, tile

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return self.base + self.tile * -(-rows // 16)


def rows(n: int, cost: Any, n_waiting: int = 1, limits: Limits = LIMITS, **options: Any) -> int:
    """Of the step in which n decode and a long prompt waits."""
    running = [
        SequenceView(i, 0.0, 10, computed=10, generated=1, max_tokens=99, running=True)
        for i in range(n)
    ]
    waiting = [SequenceView(100 + i, 0.0, 2000) for i in range(n_waiting)]
    view = StepView.of(limits, running, waiting, cost=cost)
    return tile_fill(**options).budget(view)


def test_a_step_ends_at_an_edge() -> None:
    # 5 decode: 0.08 s alone, twice that is the target: 48 rows in 0.14 s, and one tile more is over
    # it by less than 5% of nothing.
    assert rows(5, Tiles()) == 48
    assert rows(5, Tiles(), itl=0.3) == 128  # one ubatch, and not one row of a second one


def test_a_tile_that_is_nearly_within_the_target_is_filled() -> None:
    assert rows(5, Tiles(), itl=0.169) == 64  # 0.17 s
    assert rows(5, Tiles(), itl=0.16) == 48


def test_rows_that_others_will_want_are_left_free() -> None:
    assert rows(5, Tiles(), reserve=2) == 48 - 10
    with pytest.raises(ArgumentError, match="reserve"):
        tile_fill(reserve=-1)


def test_many_prompts_that_wait_are_not_paced() -> None:
    assert rows(16, Tiles(), n_waiting=1) == 48
    assert rows(16, Tiles(), n_waiting=4) == 128


def test_where_pacing_makes_rows_dear_it_does_not_pace() -> None:
    """As a mixture of experts: the first rows cost nearly all that many do."""
    dear = Tiles(base=0.01, tile=0.0)

    def predict(rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return 0.01 * rows if rows <= 24 else 0.24 + 0.001 * rows

    dear.predict = predict  # type: ignore[method-assign]
    assert rows(8, dear) == 128


@pytest.mark.parametrize(("once", "found"), [(0.0, 24), (0.0076, 24), (0.008, 80), (0.03, 112)])
def test_what_a_prompt_costs_at_every_step_of_it_is_the_price_of_pacing(
    once: float, found: int
) -> None:
    """As on a CPU, which unpacks weights for rows of prompts. Beside 8 who decode in 50 ms a row of
    a prompt takes 5, and each step with such rows `once` more: what all its rows share."""

    class Once(Tiles):
        def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
            return 0.05 + (once if prefill else 0.0) + 0.005 * prefill

    assert rows(8, Once()) == found


def test_what_nobody_has_measured_is_paced_as_before() -> None:
    class Prior(Tiles):
        calibrated = False

    for n in (1, 5, 16):
        assert rows(n, Prior()) == make_policy("sarathi").budget(  # type: ignore[attr-defined]
            StepView.of(
                LIMITS,
                [
                    SequenceView(i, 0.0, 10, computed=10, generated=1, max_tokens=99, running=True)
                    for i in range(n)
                ],
                [SequenceView(100, 0.0, 2000)],
                cost=Prior(),
            )
        )
