"""Fair by tenant: the tenant that has been served least is next, counted in tokens of prompts and
of answers by a virtual token counter. Follows Sheng et al., Fairness in Serving Large Language
Models (OSDI 2024), algorithm 2: a prompt is charged when it is admitted, an answer token by token.
A tenant that comes back with no sequence waiting is lifted to the least counter of those that wait,
so that it can't save up what it did not use. A tenant of which no sequence waits or runs, and whose
counter is not above that least one, is as a new one would be: it is forgotten.

No tenant waits for ever, and within a tenant it is first come, first served; priorities are not
looked at. What the running sequences were served is read from the view, so the counters are true at
every step of a plan that repeats: while all decode, until another tenant would be next. A policy
object keeps the counters of one engine."""

from collections.abc import Iterable, Iterator
from math import inf

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ..policy import PlanBuilder
from ..view import SequenceView, StepView
from .composed import ComposedPolicy
from .parts import ALWAYS, LastRanked, TokenBudget, WhenItFits

F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class LeastServed:
    """The tenants' counters, by tenant number; an order, and how long a plan stands under it.
    `prompt`: the price of each prompt token; `generated`: of each generated one."""

    def __init__(self, prompt: float = 1.0, generated: float = 2.0) -> None:
        for name, value in (("prompt", prompt), ("generated", generated)):
            if not 0 < value < inf:
                raise ArgumentError(name, value, "more than 0")
        self._prompt, self._generated = prompt, generated
        self._numbers: dict[str, int] = {}  # by tenant, and these by number:
        self._unused = np.ones(1, dtype=bool)
        self._served = np.zeros(1)  # sequences that run no more, and the lifts
        self._waited = np.zeros(1, dtype=bool)  # tenants with a sequence waiting, at the last look
        self._left = -1  # the tenant that stopped waiting last

    def counters(self, view: StepView) -> dict[str, float]:
        """What each tenant was served, lifts included. A tenant that is missing: nothing."""
        service = self._service(view).tolist()
        return {tenant: service[number] for tenant, number in self._numbers.items()}

    def order(self, view: StepView) -> Iterable[SequenceView]:
        waits = self._waits(view)
        if not view.can_admit and waits.tobytes() == self._waited.tobytes():
            return view.prefilling
        counters = self._look(view, waits)
        return self._next(view, counters) if view.can_admit else view.prefilling

    def repeat(self, builder: PlanBuilder) -> int:
        """Until the counter of the tenant that is next has overtaken another one."""
        view = builder.view
        if not view.can_admit:
            return ALWAYS
        counters = self._look(view, self._waits(view))
        first = self._first(counters, view)
        running = view.running.column(self._number).astype(np.intp)
        pace = self._generated * np.bincount(running, minlength=len(counters))
        gain = pace[first] - pace
        gap = (counters - counters[first])[gain > 0] / gain[gain > 0]
        return max(1, int(min(gap.min(initial=ALWAYS), ALWAYS)))

    def ended(self, seq: SequenceView) -> None:
        """A running sequence ends or is preempted."""
        number = self._number(seq)
        self._served[number] += self._charge(seq) + self._generated * seq.turn

    # -- inside

    def _number(self, seq: SequenceView) -> int:
        number = self._numbers.get(seq.tenant)
        if number is None:
            if not self._unused.any():
                self._double()
            number = self._numbers[seq.tenant] = int(self._unused.argmax())
            self._unused[number] = False
        return number

    def _double(self) -> None:
        n = len(self._unused)
        self._unused = np.append(self._unused, np.ones(n, dtype=bool))
        self._served = np.append(self._served, np.zeros(n))
        self._waited = np.append(self._waited, np.zeros(n, dtype=bool))

    def _first(self, counters: F64, view: StepView) -> int:
        """The number of the tenant that is next: of two alike, whose sequence came first."""
        least: list[int] = (counters == counters.min()).nonzero()[0].tolist()
        if len(least) == 1 or counters[least[0]] == inf:
            return least[0]
        groups = view.waiting.split(self._number)
        return min(least, key=lambda number: next(iter(groups[number])).id)

    def _charge(self, seq: SequenceView) -> float:
        """For its prompt, once."""
        return 0.0 if seq.preemptions else self._prompt * seq.n_prompt

    def _service(self, view: StepView) -> F64:
        running = view.running
        numbers = running.column(self._number).astype(np.intp)
        service = running.column(self._charge) + self._generated * running.column("turn")
        total: F64 = self._served + np.bincount(numbers, service, minlength=len(self._served))
        return total

    def _waits(self, view: StepView) -> Flags:
        """The tenants with a sequence waiting."""
        view.running.column(self._number)  # all tenants have a number from here on
        waiting = [*view.waiting.split(self._number)]
        waits = np.zeros(len(self._served), dtype=bool)
        waits[waiting] = True
        return waits

    def _look(self, view: StepView, waits: Flags) -> F64:
        """The counters of the tenants with a sequence waiting, infinity for the others. Lifts those
        that have come since the last look."""
        counters = self._service(view)
        if waits.tobytes() != self._waited.tobytes():  # a tenth of what comparing arrays takes
            counters = self._lift(view, waits, counters)
        return np.where(waits, counters, inf)

    def _lift(self, view: StepView, waits: Flags, counters: F64) -> F64:
        """Other tenants wait than before: the counters, with those lifted that have come. The level
        that they are lifted to never falls."""
        came, stayed, left = waits & ~self._waited, waits & self._waited, self._waited & ~waits
        if left.any():
            self._left = int(np.where(left, counters, inf).argmin())
        last = counters[self._left] if self._left >= 0 else 0.0
        level = counters[stayed].min() if stayed.any() else last
        lifted: F64 = np.where(came, np.maximum(counters, level), counters)
        self._served += lifted - counters
        self._waited = waits
        self._forget(view, lifted <= level)
        return lifted

    def _forget(self, view: StepView, low: Flags) -> None:
        """Those of the `low` ones that nothing waits or runs of; not the one that left last."""
        needless = low & ~self._waited & ~self._unused
        needless[view.running.column(self._number).astype(np.intp)] = False
        needless[self._left] = False
        if needless.any():
            self._numbers = {name: n for name, n in self._numbers.items() if not needless[n]}
            self._unused |= needless

    def _next(self, view: StepView, counters: F64) -> Iterator[SequenceView]:
        yield from view.prefilling
        groups = view.waiting.split(self._number)
        begun: dict[int, Iterator[SequenceView]] = {}
        while counters[first := self._first(counters, view)] < inf:
            if first not in begun:
                begun[first] = iter(groups[first])
            seq = next(begun[first], None)
            if seq is None:
                counters[first] = inf
            else:
                yield seq
                counters[first] += self._charge(seq)


def alike(seq: SequenceView) -> int:
    """The rank of each."""
    return 0


def fair(
    *,
    prompt: float = 1.0,
    generated: float = 2.0,
    budget: int | None = None,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`prompt`, `generated`: what a token of each kind costs (the defaults are the paper's).
    `budget`, `watermark`: as in `sarathi`."""
    least_served = LeastServed(prompt, generated)
    return ComposedPolicy(
        order=least_served.order,
        admit=WhenItFits(watermark),
        budget=TokenBudget(budget),
        victim=LastRanked(alike),
        repeat=least_served.repeat,
        ended=least_served.ended,
    )
