"""Fair by tenant: the tenant that has been served least is next, counted in tokens of prompts and
of answers by a virtual token counter. Follows Sheng et al., Fairness in Serving Large Language
Models (OSDI 2024), algorithm 2: a prompt is charged when it is admitted, an answer token by token,
and a tenant that comes back with nobody in line is lifted to the least counter of those who wait,
so that it can't save up what it did not use.

No tenant waits for ever, and within a tenant it is first come, first served; priorities are not
looked at. What was served is read from the view, so the counters are true at every step of a plan
that repeats: while everybody decodes, until another tenant would be next. A policy object keeps the
lifts of one engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import inf

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ..policy import ComposedPolicy, Decodes, PlanBuilder
from ..view import SequenceView, StepView
from .parts import ALWAYS, NewestFirst, TokenBudget, WhatIsLeft, WhenItFits

F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def tenant_of(seq: SequenceView) -> str:
    return seq.tenant


class LeastServed:
    """An order, and how long a plan stands under it. `counters` by tenant number: `prompt` for
    each prompt token, `generated` for each generated one, and the lifts."""

    decodes = Decodes.FIRST

    def __init__(self, prompt: float = 1.0, generated: float = 2.0) -> None:
        for name, value in (("prompt", prompt), ("generated", generated)):
            if not 0 < value < inf:
                raise ArgumentError(name, value, "more than 0")
        self._prompt, self._generated = prompt, generated
        self._lift = np.zeros(0)
        self._waited = np.zeros(0, dtype=bool)  # who had somebody in line when we looked last
        self._left = -1  # the tenant that left the line last

    def __call__(self, view: StepView) -> Iterable[SequenceView]:
        counters = self._look(view)
        return self._next(view, counters) if view.can_admit else view.prefilling

    def repeat(self, builder: PlanBuilder) -> int:
        """Until the counter of the tenant that is next has overtaken another one."""
        view = builder.view
        if not view.can_admit:
            return ALWAYS
        counters = self._look(view)
        first = int(counters.argmin())
        pace = self._generated * view.tenants.running
        gain = pace[first] - pace
        gap = (counters - counters[first])[gain > 0] / gain[gain > 0]
        return max(1, int(min(gap.min(initial=ALWAYS), ALWAYS)))

    def _look(self, view: StepView) -> F64:
        """The counters of those who have somebody in line, infinity for the others. Lifts who has
        come since the last look."""
        tenants = view.tenants
        n_new = len(tenants) - len(self._lift)
        if n_new:
            self._lift = np.append(self._lift, np.zeros(n_new))
            self._waited = np.append(self._waited, np.zeros(n_new, dtype=bool))
        counters = self._lift + self._prompt * tenants.prompt + self._generated * tenants.generated
        waits = tenants.waiting > 0
        if waits.tobytes() != self._waited.tobytes():  # a tenth of what comparing arrays takes
            counters = self._shift(waits, counters)
        return np.where(waits, counters, inf)

    def _shift(self, waits: Flags, counters: F64) -> F64:
        """Others wait than before: lift who has come."""
        came, stayed = waits & ~self._waited, counters[waits & self._waited]
        last = counters[self._left] if self._left >= 0 else 0.0
        level = stayed.min() if len(stayed) else last
        lifted = np.where(came, np.maximum(counters, level), counters)
        self._lift += lifted - counters
        left = self._waited & ~waits
        if left.any():
            self._left = int(np.where(left, counters, inf).argmin())
        self._waited = waits
        return lifted

    def _next(self, view: StepView, counters: F64) -> Iterator[SequenceView]:
        yield from view.prefilling
        names, lines = view.tenants.names, view.waiting.split(tenant_of)
        begun: dict[int, Iterator[SequenceView]] = {}
        while counters[first := int(counters.argmin())] < inf:
            if first not in begun:
                begun[first] = iter(lines[names[first]])
            seq = next(begun[first], None)
            if seq is None:
                counters[first] = inf
            else:
                yield seq
                if not seq.preemptions:  # else it has been charged
                    counters[first] += self._prompt * seq.n_prompt


def fair(
    *,
    prompt: float = 1.0,
    generated: float = 2.0,
    budget: int | None = None,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`prompt`, `generated`: what a token of each kind costs (the defaults are the paper's).
    `budget`, `watermark`: as in `sarathi`."""
    order = LeastServed(prompt, generated)
    return ComposedPolicy(
        order=order,
        admit=WhenItFits(watermark),
        budget=TokenBudget(budget),
        chunk=WhatIsLeft(),
        victim=NewestFirst(),
        repeat=order.repeat,
    )
