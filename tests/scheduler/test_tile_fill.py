"""TileFill: rows of prompts up to the edge of a tile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.scheduler import Limits, StepView, make_policy, tile_fill
from tests.support import views

LIMITS = Limits(n_batch=512, n_ubatch=128, n_seq_max=40, n_cells=20000, n_cells_seq=20000)


class Tiles(StepCost):
    """A step costs by the tile of 16, 30 ms each, and `base`."""

    calibrated = True
    error = (0.01, 0.05)
    edges = tuple(range(16, 129, 16))

    def __init__(self, base: float = 0.05, tile: float = 0.03) -> None:
        self.base, self.tile = base, tile

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return self.base + self.tile * -(-rows // 16)


class Once(Tiles):
    """A row takes 5 ms, and a step with rows of prompts `once` more."""

    def __init__(self, once: float) -> None:
        self.once = once

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return 0.005 * rows + (self.once if prefill else 0.0)


def view_of(
    n: int,
    cost: Any,
    n_waiting: int = 1,
    limits: Limits = LIMITS,
    remaining: int = 2000,
    computed: int = 10,
    begun: int = 0,
) -> StepView:
    """n decode, `computed` cells each, and prompts wait with so many rows; `begun` more have a slot
    and half of their rows computed."""
    sequences = [views.decoding(i, computed) for i in range(n)]
    sequences += [views.prefilling(50 + i, 2 * remaining, remaining) for i in range(begun)]
    sequences += [views.waiting(100 + i, remaining) for i in range(n_waiting)]
    return views.view_of(*sequences, limits=limits, cost=cost)


def rows(n: int, cost: Any, n_waiting: int = 1, limits: Limits = LIMITS, **options: Any) -> int:
    """Of the step in which n decode and long prompts wait."""
    return tile_fill(**options).budget(view_of(n, cost, n_waiting, limits))


def full(n: int) -> Limits:
    """As many slots as there are sequences."""
    return replace(LIMITS, n_seq_max=n)


def steps_of(view: StepView, width: int) -> tuple[float, float]:
    """Seconds of all steps until the prompts are computed, `width` rows at a step; and less what
    their decoded tokens take where all decode, if that is less than without the prompts."""
    assert view.cost is not None
    predict, n, kv = view.cost.predict, len(view.decoding), view.kv.attended
    wide = n + len(view.waiting)
    share = min(predict(n, 0, kv, n), predict(wide, 0, kv, wide) * n / wide)
    taken, added, left = 0.0, 0.0, sum(seq.remaining for seq in view.waiting)
    while left:
        prompt = min(left, width - n)
        seconds = predict(n + prompt, prompt, kv, n + 1)
        taken, added, left = taken + seconds, added + seconds - share, left - prompt
    return taken, added


def test_a_step_ends_at_an_edge() -> None:
    """5 decode in 0.08 s. 48 rows are the most within twice that; but in 32, which take 0.11 s, 11
    of 27 rows of the prompt cost nothing."""
    assert rows(5, Tiles()) == 32
    assert rows(5, Tiles(), itl=0.16) == 32
    # Beside 16 no row is free: the most within the target, 0.16 s.
    assert rows(16, Tiles()) == 48
    assert rows(16, Tiles(), itl=0.3) == 128  # one ubatch, and not one row of a second one


def test_a_tile_that_is_nearly_within_the_target_is_filled() -> None:
    assert rows(16, Tiles(), itl=0.169) == 64  # 0.17 s
    assert rows(16, Tiles(), itl=0.16) == 48


@pytest.mark.parametrize("reserve", [1, 2, 3])
def test_rows_that_others_will_want_are_left_free(reserve: int) -> None:
    """The step ends at an edge when they are taken, and they are left only where there is room."""
    for n in (5, 9, 16):
        found = rows(n, Tiles(), reserve=reserve)
        assert found > n
        assert (found + n * reserve) % 16 == 0
    narrow = replace(LIMITS, n_batch=32, n_ubatch=32)
    assert 20 < rows(20, Tiles(), limits=narrow, reserve=reserve) <= 32
    assert rows(32, Tiles(), limits=narrow, reserve=reserve) == 32


def test_with_a_stream_of_cells_each_prompts_have_edges_of_their_own() -> None:
    class Streams(Tiles):
        def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
            return self.base + self.tile * (-(-(rows - prefill) // 16) + -(-prefill // 16))

    for n in (5, 9, 16):
        found = rows(n, Streams(), limits=replace(LIMITS, unified=False))
        assert found > n
        assert (found - n) % 16 == 0


def test_a_prompt_that_has_begun_counts_like_one_that_waits() -> None:
    for remaining in (40, 90, 700):
        waits = view_of(5, Tiles(), n_waiting=3, remaining=remaining)
        begun = view_of(5, Tiles(), n_waiting=1, remaining=remaining, begun=2)
        assert tile_fill().budget(waits) == tile_fill().budget(begun)


def test_who_finds_no_cells_waits_as_one_who_finds_no_slot() -> None:
    """It would not decode if the prompt that has begun were done, and waits for what is lost."""
    for remaining in (300, 900):
        no_cells = replace(LIMITS, n_cells=100 + 2 * remaining)
        loads = [
            view_of(9, Tiles(), 3, limits, remaining, begun=1) for limits in (no_cells, full(10))
        ]
        with_room = view_of(9, Tiles(), 3, LIMITS, remaining, begun=1)
        assert tile_fill().budget(loads[0]) == tile_fill().budget(loads[1])
        assert tile_fill().budget(loads[0]) < tile_fill().budget(with_room)


def test_many_prompts_that_wait_are_not_paced() -> None:
    """Each that waits would decode, and with 5 rows or 9 a step takes as long."""
    assert rows(5, Tiles(), limits=full(6)) == 32
    assert rows(5, Tiles(), n_waiting=4, limits=full(9)) == 128


def test_a_prompt_is_not_left_with_a_short_last_step() -> None:
    """Rows of prompts beyond 64 go through another kernel, three times as fast. Of 100 rows 80
    would leave 20 to the slow one."""

    class Two(Tiles):
        def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
            return 0.05 + prefill * (0.003 if prefill < 64 else 0.001)

    for remaining, found in ((640, 80), (100, 100)):
        view = view_of(16, Two(), limits=full(17), remaining=remaining)
        assert tile_fill().budget(view) - 16 >= found


def test_where_pacing_makes_rows_dear_it_does_not_pace() -> None:
    """As a mixture of experts: the first rows cost nearly all that many do."""
    dear = Tiles(base=0.01, tile=0.0)

    def predict(rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return 0.01 * rows if rows <= 24 else 0.24 + 0.001 * rows

    dear.predict = predict  # type: ignore[method-assign]
    assert rows(8, dear) == 128


@pytest.mark.parametrize(
    ("once", "free", "taken"), [(0.0, 24, 24), (0.002, 24, 48), (0.008, 32, 80), (0.03, 64, 112)]
)
def test_what_a_prompt_costs_at_every_step_of_it_is_the_price_of_pacing(
    once: float, free: int, taken: int
) -> None:
    """As on a CPU, which unpacks weights for rows of prompts. Beside 8 who decode in 40 ms a row of
    a prompt takes 5, as theirs do, and each step with such rows `once` more: what all its rows
    share. 1% of the time is given for the target where no slot is free, 6% where most are."""
    assert rows(8, Once(once)) == free
    assert rows(8, Once(once), limits=full(9)) == taken


def test_the_fewer_slots_are_free_the_less_is_given_for_the_target() -> None:
    taken = [rows(8, Once(0.008), limits=full(n)) for n in (9, 10, 12, 16, 24, 40, 400)]
    assert taken == [80, 64, 48, 48, 32, 32, 32]


@pytest.mark.parametrize("seed", range(300))
def test_no_throughput_is_lost_to_the_policy_that_counts(seed: int) -> None:
    """Kernels, tiles and prompts of all sorts, every slot taken: of all the time that the steps
    with the prompts take, at most 1% is lost, against as many rows as without a cost model. Also
    where cells have filled since the policy was asked first."""
    rng = np.random.default_rng(seed)
    n, n_waiting = int(rng.integers(1, 33)), int(rng.integers(1, 9))
    tile, kernel = int(rng.choice([1, 4, 8, 16, 32])), int(rng.choice([8, 16, 32, 64, 200]))
    base, once, cell = rng.uniform(0, 0.05), rng.uniform(0, 0.03), rng.uniform(0, 2e-5)
    one, many = rng.uniform(0.0002, 0.01, 2)

    class Some(Tiles):
        edges = (*range(tile, 129, tile),)

        def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
            padded = -(-rows // tile) * tile
            each = min(padded, kernel) * one + max(0, padded - kernel) * many
            return float(base + each + rows * kv / n * cell + (once if prefill else 0.0))

    fill, cost = tile_fill().budget, Some()
    remaining, computed = int(rng.integers(1, 2000 // n_waiting)), int(rng.integers(1, 500))
    for cells in (computed, computed + computed // 5):
        view = view_of(n, cost, n_waiting, full(n + n_waiting), remaining, cells)
        taken, lost = steps_of(view, fill(view))
        _, lost_counted = steps_of(view, 128)
        assert lost <= lost_counted + 0.01 * taken


def test_what_nothing_has_measured_is_paced_as_before() -> None:
    class Prior(Tiles):
        calibrated = False

    for n in (1, 5, 16):
        view = view_of(n, Prior())
        assert tile_fill().budget(view) == make_policy("sarathi").budget(view)  # type: ignore[attr-defined]
