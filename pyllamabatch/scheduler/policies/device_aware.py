"""The default: as many tokens a second as the device gives, first tokens soon, no long stall.

Prompts are computed as soon as they come: the sooner they are, the more sequences decode together.
A step takes no longer than `stall` seconds for that, or than the ITL target of a request that has
one, by the cost model. In a pool a prompt waits where one more sequence would slow down all of them
by more than it saves. And sequences decode in turns where several narrow steps are faster than a
wide one (`width`)."""

from __future__ import annotations

from dataclasses import dataclass

from ..policy import Admit, PlanBuilder, Verdict
from ..view import SequenceView, StepView
from .composed import ComposedPolicy
from .parts import ALWAYS, STALL_SECONDS, TokenBudget, WhenItFits, WithinTarget
from .speculate import ByGain
from .width import Turns, measured

LEAST_LOSS = 0.01  # of all requests' time, for which a newcomer waits


@dataclass(frozen=True, slots=True)
class PromptsSoon:
    """Rows of a step: as `within`; in a pool also no more than its `otherwise`. There rows that
    decode cost next to nothing beside those of a prompt, so the more steps a prompt takes, the more
    of them it carries. In streams the two never share a ubatch."""

    within: WithinTarget

    def __call__(self, view: StepView) -> int:
        rows = self.within(view)
        if not view.limits.unified or not len(view.decoding):
            return rows
        return min(rows, self.within.otherwise(view))


@dataclass(frozen=True, slots=True)
class WhileItPays:
    """As `otherwise`. In a pool the rows of each look over the cells of all: there a sequence waits
    where no number of those that wait, computed beside the running ones, would take less time for
    each request than these alone. Idle ones do not count: they may never end."""

    otherwise: Admit

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        verdict = self.otherwise(builder, seq)
        view = builder.view
        n = len(view.decoding) + len(view.prefilling) + len(builder.admitted)
        if verdict is not Verdict.ADMIT or not (view.limits.unified and n and measured(view.cost)):
            return verdict
        own = (view.kv.attended + builder.promised + seq.remaining) / (n + 1)
        rows = max(1, min(seq.remaining, view.limits.n_ubatch))
        calls, tokens = seq.remaining / rows, max(1, seq.max_tokens - seq.generated)
        cost = view.cost

        def each(m: int) -> float:
            """Seconds of such a request beside m - 1 others: its tokens, and its prompt, which
            comes with a row of each."""
            kv = own * m
            alone = cost.predict(m, 0, kv, m)
            edge = max((rows for rows in cost.edges if rows < m), default=m)  # they may take turns
            token = min(alone / m, cost.predict(edge, 0, kv, m) / edge)
            return tokens * token + calls * (cost.predict(m + rows, rows, kv, m + 1) - alone)

        now, most = each(n), min(view.limits.n_seq_max, n + len(view.waiting))
        more = {n + 1, most, *(rows for rows in cost.edges if n < rows < most)}
        pays = any(each(m) <= (1 + LEAST_LOSS) * now for m in sorted(more))
        return Verdict.ADMIT if pays else Verdict.STOP


def device_aware(
    *,
    stall: float = STALL_SECONDS,
    itl: float = 0.1,
    gain: float = 0.04,
    watermark: float = 0.01,
) -> ComposedPolicy:
    """`stall`: seconds that a step may take for prompts while sequences without an ITL target
    decode. `itl`, `gain`: see `Turns`. `watermark`: see `WhenItFits`."""
    return ComposedPolicy(
        admit=WhileItPays(WhenItFits(watermark)),
        budget=PromptsSoon(WithinTarget(TokenBudget(), stall)),
        repeat=ALWAYS,
        width=Turns(itl, gain),
        speculate=ByGain(),
    )
