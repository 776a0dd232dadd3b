"""Drafts in virtual time: what each step of a call has of them, and what comes of it.

A step decides as the native one does (`plb_draft_rows` in native/step/plb_drafts.h), by the prices
of the plan and by what the steps before have left (`Before`). Of a request's
drafted tokens the next one is right with its acceptance as probability, be it the first or the
fourth; a draft is found in every step. The same request has the same luck in any run."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyllamabatch.raw import ffi, lib
from pyllamabatch.scheduler import Limits, Step
from pyllamabatch.scheduler.drafting import Drafted
from pyllamabatch.scheduler.view import Prices

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


GRAPH_MOST, GRAPH_STEPS = 1.0, 2.0  # see native/step/draft_prices.cpp,
GRAPH_SHARE, DEAR, SETTLED = 1 / 16, 0.1, 2


class Luck:
    """Of one request: how many tokens of its drafts are right. acceptance: of each."""

    def __init__(self, id: int, acceptance: float) -> None:
        self.acceptance = acceptance
        self._random = np.random.default_rng([id, 7])

    def right(self, n: int) -> int:
        """Of a draft of n tokens."""
        if n < 1 or self.acceptance <= 0:
            return 0
        wrong = self._random.random(n) >= self.acceptance
        return int(wrong.argmax()) if wrong.any() else n


class Before(NamedTuple):
    """What the steps before have left, see `plb_draft_graph` in native/step/plb_drafts.h. n_same:
    steps with that graph since it was new."""

    n_rows: int = 0
    owed: float = 0.0
    missed: float = 0.0
    n_same: int = 0


class Steps(NamedTuple):
    """Of a call, one line each: seconds, new graphs included, and what the scheduler is told of
    them, 0 for nothing; tokens that each slot of `Step.decode` samples; drafted tokens of each.
    rows: those of the step. gained: with those before, of the credit in `Prices`; None without.
    after: what each leaves."""

    seconds: F64
    timed: F64
    taken: I64
    n_drafted: I64
    rows: I64
    gained: list[float | None]
    after: list[Before]


class StepOf(NamedTuple):
    """One step that is decided: drafted tokens of each slot, its rows, those without drafts, and
    what it leaves."""

    n_drafted: list[int]
    rows: int
    width: int
    left: Before


def decide(step: Step, n_most: Sequence[int], luck: Sequence[Luck], limits: Limits,
           prices: Prices | None, before: Before) -> StepOf:  # fmt: skip
    """n_most: drafted tokens of each slot at most, 0 for one that has no drafts."""
    n, even = len(n_most), limits.even_rows
    width = n
    if not limits.unified:
        width = step.n_pad or int(step.decode[-1] - step.decode[0]) + 1
    chosen, wanted = list(n_most), 0
    if prices is not None:
        chosen, wanted, before = _by_price(n_most, luck, limits, width, prices, before)
    rows = width * (1 + max(chosen)) if even else n + sum(chosen)
    if any(chosen):  # some may only fill up
        room = min(limits.n_outputs or limits.n_batch, limits.n_ubatch)
        rows = max(rows, min(wanted, room if even else min(room, n + sum(step.drafts.values()))))
        if rows != before.n_rows:
            before = before._replace(n_rows=rows, missed=0.0)
    return StepOf(chosen, rows, width, before)


def _by_price(n_most: Sequence[int], luck: Sequence[Luck], limits: Limits, width: int,
              prices: Prices, before: Before) -> tuple[list[int], int, Before]:  # fmt: skip
    """Drafted tokens of each, rows, and what is left."""
    n_priced, most = len(prices.seconds), limits.n_draft_max
    seconds = np.ascontiguousarray(prices.seconds, np.float32)
    worst = np.ascontiguousarray(prices.worst, np.float32)
    acceptance = np.array([one.acceptance for one in luck])[:, None]
    chance = np.ascontiguousarray(acceptance ** np.arange(1, most + 1), np.float32)
    drafted, chosen = np.array(n_most, np.int32), np.zeros(len(n_most), np.int32)
    given = (
        ffi.new("int32_t *", n_priced),
        ffi.new("float[3]", [prices.credit, prices.gain, prices.new_graph]),
        ffi.new("plb_draft_graph *", before[:3]),
        ffi.new("int32_t *"),
    )
    native = ffi.new("plb_drafts *")
    native.n_draft_max, native.n_priced = most, given[0]
    native.seconds = ffi.from_buffer("float[]", seconds)
    native.worst = ffi.from_buffer("float[]", worst)
    native.credit, native.gain, native.new_graph = given[1], given[1] + 1, given[1] + 2
    code = lib.plb_draft_rows(
        native,
        len(n_most),
        ffi.from_buffer("int32_t[]", drafted),
        ffi.from_buffer("float[]", chance),
        width,
        limits.even_rows,
        ffi.from_buffer("int32_t[]", chosen),
        *given[2:],
    )
    assert code == 0, code
    return chosen.tolist(), given[3][0], before._replace(missed=given[2].missed)


def steps_of(
    step: Step,
    n: int,
    left: Sequence[int],
    luck: Sequence[Luck],
    limits: Limits,
    seconds_of: Callable[[int, int], tuple[float, float]],
    before: Before,
) -> Steps:
    """Up to n steps, to the end of a sequence. left: tokens to each one's end. seconds_of: of a
    step with so many rows, so many steps into the call, and of the new graph that it needs."""
    slots, left = step.decode.tolist(), list(left)
    most = [step.drafts.get(slot, 0) if one.acceptance > 0 else 0
            for slot, one in zip(slots, luck, strict=True)]  # fmt: skip
    prices, behind = step.prices, False
    seconds, timed, rows = list[float](), list[float](), list[int]()
    taken, drafted, gains = list[list[int]](), list[list[int]](), list[float | None]()
    after, in_all = list[Before](), 0.0
    for at in range(n):
        can = [min(k, m - 1) for k, m in zip(most, left, strict=True)]
        decided = decide(step, can, luck, limits, prices, before)
        right = [one.right(k) for one, k in zip(luck, decided.n_drafted, strict=True)]
        took, graph = seconds_of(decided.rows, at)
        took += graph
        tokens, drafts, new = [1 + k for k in right], any(decided.n_drafted), graph > 0
        before = decided.left
        if drafts:
            before = before._replace(n_same=0 if graph else before.n_same + 1)
            new = before.n_same < SETTLED and prices is not None and _is_dear(prices, decided)
        timed.append(0.0 if new else took)
        if prices is not None:
            gained, beyond = _gained(prices, decided, sum(tokens), took, new=new, behind=behind)
            part = GRAPH_SHARE * before.owed
            before = before._replace(owed=before.owed - part + beyond)
            prices = prices._replace(credit=prices.credit + gained - part)
            in_all += gained - part
        behind = drafts
        after.append(before)
        seconds.append(took)
        taken.append(tokens)
        drafted.append(decided.n_drafted)
        rows.append(decided.rows)
        gains.append(None if prices is None else in_all)
        left = [m - k for m, k in zip(left, tokens, strict=True)]
        if min(left) == 0:
            break
    shape = len(rows), len(slots)
    return Steps(
        np.array(seconds),
        np.array(timed),
        np.array(taken, np.int64).reshape(shape),
        np.array(drafted, np.int64).reshape(shape),
        np.array(rows, np.int64),
        gains,
        after,
    )


def _is_dear(prices: Prices, step: StepOf) -> bool:
    """A new graph."""
    return prices.new_graph > DEAR * float(prices.seconds[step.width])


def _gained(
    prices: Prices, step: StepOf, n_tokens: int, took: float, *, new: bool, behind: bool
) -> tuple[float, float]:
    """What such a step adds to the credit, as in native/step/draft_prices.cpp, and what steps to
    come have to pay of its graph, which is new. behind: one with drafts."""
    said = float(prices.seconds[step.rows])
    if any(step.n_drafted):
        plain = float(prices.seconds[step.width])
        counts = min(took, float(prices.worst[step.rows]) + GRAPH_STEPS * prices.new_graph)
        beyond = max(0.0, counts - said) if new else 0.0
        return plain / len(step.n_drafted) * n_tokens - (counts - beyond), beyond
    return -min(took - said, GRAPH_MOST * said) if behind else 0.0, 0.0


def plain(step: Step, seconds: F64, reused: npt.NDArray[np.bool_]) -> Steps:
    """Steps without drafts, which take so long. reused: whether their graph is there."""
    n = len(seconds), len(step.decode)
    rows = np.full(n[0], max(step.n_rows, step.n_pad))
    ones, none = np.ones(n, np.int64), np.zeros(n, np.int64)
    return Steps(seconds, seconds * reused, ones, none, rows, [None] * n[0], [])


def drafted_of(
    step: Step, steps: Steps, n: int, luck: Mapping[int, Luck], limits: Limits, n_slots: int
) -> Drafted:
    """What the scheduler is told of the first n of them."""
    slots = step.decode
    taken, found = np.zeros(n_slots, np.int64), np.zeros((n_slots, limits.n_draft_max))
    right = np.zeros_like(found)
    taken[slots] = steps.taken[:n].sum(0)
    for slot in slots.tolist():
        acceptance = luck[slot].acceptance
        found[slot] = acceptance > 0
        right[slot] = acceptance ** np.arange(1, limits.n_draft_max + 1)
    n_timed = np.zeros(limits.n_batch + 1, np.int64)
    speeds = np.zeros(limits.n_batch + 1)
    timed = steps.timed[:n] > 0
    np.add.at(n_timed, steps.rows[:n], timed)
    np.add.at(speeds, steps.rows[:n][timed], 1 / steps.timed[:n][timed])
    n_drafted = steps.n_drafted[:n]
    accepted = steps.taken[:n] - 1
    return Drafted(
        taken,
        int(steps.rows[:n].sum()),
        int(n_drafted.sum()),
        int(accepted.sum()),
        found,
        right,
        float(steps.seconds[:n].sum()),
        n_timed,
        np.divide(n_timed**2, speeds, where=speeds > 0, out=np.zeros_like(speeds)),
        steps.gained[n - 1],
        int((n_drafted > 0).sum()),
        (accepted[:, :, None] > np.arange(limits.n_draft_max)).sum((0, 1)),
    )
