"""Fair by tenant: the tenant that has been served least is next, counted in tokens of prompts and
of answers by a virtual token counter. Follows Sheng et al., Fairness in Serving Large Language
Models (OSDI 2024), algorithm 2: a prompt is charged when it is admitted, an answer token by token.
A tenant that comes back with no sequence waiting is lifted to the least counter of those that wait,
so that it can't save up what it did not use.

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
from .parts import ALWAYS, TokenBudget, WhenItFits

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
        self._numbers: dict[str, int] = {}  # by tenant, as they came
        self._served = np.zeros(0)  # sequences that run no more, and the lifts
        self._waited = np.zeros(0, dtype=bool)  # tenants with a sequence waiting, at the last look
        self._left = -1  # the tenant that stopped waiting last

    def counters(self, view: StepView) -> dict[str, float]:
        """What each tenant was served, lifts included."""
        return dict(zip(self._numbers, self._service(view).tolist(), strict=True))

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
        first = int(counters.argmin())
        running = view.running.column(self._number).astype(np.intp)
        pace = self._generated * np.bincount(running, minlength=len(counters))
        gain = pace[first] - pace
        gap = (counters - counters[first])[gain > 0] / gain[gain > 0]
        return max(1, int(min(gap.min(initial=ALWAYS), ALWAYS)))

    def ended(self, seq: SequenceView) -> None:
        """A running sequence ends or is preempted."""
        number = int(self._number(seq))
        self._grow()
        self._served[number] += self._charge(seq) + self._generated * seq.turn

    # -- inside

    def _number(self, seq: SequenceView) -> int:
        return self._numbers.setdefault(seq.tenant, len(self._numbers))

    def _charge(self, seq: SequenceView) -> float:
        """For its prompt, once."""
        return 0.0 if seq.preemptions else self._prompt * seq.n_prompt

    def _grow(self) -> None:
        """Counters for tenants that are new."""
        n_new = len(self._numbers) - len(self._served)
        if n_new:
            self._served = np.append(self._served, np.zeros(n_new))
            self._waited = np.append(self._waited, np.zeros(n_new, dtype=bool))

    def _service(self, view: StepView) -> F64:
        running = view.running
        numbers = running.column(self._number).astype(np.intp)
        self._grow()
        service = running.column(self._charge) + self._generated * running.column("turn")
        total: F64 = self._served + np.bincount(numbers, service, minlength=len(self._served))
        return total

    def _waits(self, view: StepView) -> Flags:
        """The tenants with a sequence waiting."""
        waiting = [*view.waiting.split(self._number)]
        self._grow()
        waits = np.zeros(len(self._served), dtype=bool)
        waits[waiting] = True
        return waits

    def _look(self, view: StepView, waits: Flags) -> F64:
        """The counters of the tenants with a sequence waiting, infinity for the others. Lifts those
        that have come since the last look."""
        counters = self._service(view)
        if waits.tobytes() != self._waited.tobytes():  # a tenth of what comparing arrays takes
            counters = self._lift(waits, counters)
        return np.where(waits, counters, inf)

    def _lift(self, waits: Flags, counters: F64) -> F64:
        """Other tenants wait than before: the counters, with those lifted that have come."""
        came, stayed = waits & ~self._waited, counters[waits & self._waited]
        last = counters[self._left] if self._left >= 0 else 0.0
        level = stayed.min() if len(stayed) else last
        lifted = np.where(came, np.maximum(counters, level), counters)
        self._served += lifted - counters
        left = self._waited & ~waits
        if left.any():
            self._left = int(np.where(left, counters, inf).argmin())
        self._waited = waits
        return lifted

    def _next(self, view: StepView, counters: F64) -> Iterator[SequenceView]:
        yield from view.prefilling
        groups = view.waiting.split(self._number)
        begun: dict[int, Iterator[SequenceView]] = {}
        while counters[first := int(counters.argmin())] < inf:
            if first not in begun:
                begun[first] = iter(groups[first])
            seq = next(begun[first], None)
            if seq is None:
                counters[first] = inf
            else:
                yield seq
                counters[first] += self._charge(seq)


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
        repeat=least_served.repeat,
        ended=least_served.ended,
    )
