"""When a step starts: at once, or a moment later because more rows are about to come.

Owners of interactive sequences ask for one token at a time. Between two steps their sequences have
nothing to compute for as long as it takes the owners to look at their tokens. So a step that starts
with the first that asks leaves the others to the next one. The scheduler knows which may be waited
for, and how long each has taken until now (`idle`); how long to wait is one small function of a
frozen value, and has no clock: the engine asks it in real time, a simulator in virtual time."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from pyllamabatch.cost.step_cost import StepCost

from ..errors import number

LEAST_SECONDS, LONGEST_SECONDS = 200e-6, 0.1
SOONEST_SECONDS = 1e-5  # that a thread which is woken can be there


@dataclass(frozen=True, slots=True)
class ExpectedSequence:
    """An interactive sequence that has nothing to compute, and is expected to have soon. Seconds.

    `idle`: since it had nothing to compute any more. `mean`: of its idle times until now
    (`idle.ReturnTime`). `returns`: the share of them that were over within a step's time."""

    idle: float
    mean: float
    returns: float = 1.0

    @property
    def wait(self) -> float:
        """How much longer it is expected to take: what is left of the mean; and one that is late by
        some time is expected to be late by as much again, as a thread is that does not get a
        core."""
        return max(abs(self.mean - self.idle), SOONEST_SECONDS)


@dataclass(frozen=True, slots=True)
class Gathering:
    """The step that could start now. Times in seconds on the scheduler's clock.

    `since`: when the first of its rows was there. `n_ready`: running sequences with something to
    compute. `expected`: the interactive ones that have nothing to compute, but have had since the
    last wait in vain. `cost`: the device's cost model, when there
    is one; `kv`: cells that are held."""

    now: float
    since: float
    n_ready: int
    expected: tuple[ExpectedSequence, ...]
    cost: StepCost | None = None
    kv: float = 0.0

    @property
    def n_expected(self) -> int:
        return len(self.expected)


class Gather(Protocol):
    """How many seconds longer to wait, for those whose `ExpectedSequence.wait` is within them;
    0 or less: not at all. Asked again when they have passed or all of those have come, never when
    none is expected."""

    def __call__(self, gathering: Gathering) -> float: ...


@dataclass(frozen=True, slots=True)
class Window:
    """Wait `seconds` from the first row on; 0 never waits. ArgumentError below 0."""

    seconds: float = 200e-6

    def __post_init__(self) -> None:
        number("seconds", self.seconds, 0)

    def __call__(self, gathering: Gathering) -> float:
        return gathering.since + self.seconds - gathering.now


@dataclass(frozen=True, slots=True)
class CostWindow:
    """Wait while it is expected to gain more than it costs, by the device's cost model.

    Say n rows are ready and k more are expected in w seconds; T(n) is what a step of n rows takes.
    Going now, the n have their tokens after T(n), and the k, which come during that step, after
    another one of all: T(n) + T(n + k). Waiting, all have them after w + T(n + k). So k sequences
    gain T(n) − w each, and n lose w + T(n + k) − T(n). In seconds of sequences:

        gain  k · T(n) − n · (T(n + k) − T(n))      price  (n + k) · w

    The same limit, w < T(n) − n / (n + k) · T(n + k), is what keeps the device's throughput: a step
    of n rows takes T(n) for what a full one does in its share n / (n + k) of T(n + k).

    Where only e of the k come (e: the sum of `returns`, T taken as straight from n to n + k),
    the gain is e / k of that and the price (n + e) · w. Of the groups of those that are expected
    first, it waits for the one with the largest gain less price, w being the `wait` of the
    last of them; not at all when that is never above 0: so never for one that is idle for
    longer than a step takes. It looks again after 2 · w, and never waits for more than
    gain / (n + e) at a time, which is what the wait can bring. Who is late is soon expected so
    late that the price is too high.

    A model of the device does not know what a step takes besides: the engine's own time and the
    waking of threads, which are more than the decode of a small model. So while one is
    expected within `least` seconds, which comes back so soon more often than not, it waits for that
    long from the first row on in any case; and for `longest` at most, whatever the gain
    (ArgumentError below 0).

    `otherwise` decides as long as there is no cost model, or only a prior that has not seen a step
    (`CostModel.absolute`).

    Rows of prompts that are in the same step are taken for one each. It makes T smaller than it is
    and the wait shorter."""

    longest: float = LONGEST_SECONDS
    least: float = LEAST_SECONDS
    otherwise: Gather = field(default_factory=Window)

    def __post_init__(self) -> None:
        number("least", self.least, 0)
        number("longest", self.longest, 0)

    def __call__(self, gathering: Gathering) -> float:
        cost = gathering.cost
        if cost is None or not cost.absolute:
            return self.otherwise(gathering)
        best = seconds = 0.0
        for wait, limit, net in groups(gathering):
            if net > best:
                best, seconds = net, min(2 * wait, limit)
        waited = gathering.now - gathering.since
        if any(rest.wait <= self.least and rest.returns >= 0.5 for rest in gathering.expected):
            seconds = max(seconds, self.least - waited)
        return min(seconds, self.longest - waited)


def groups(gathering: Gathering) -> Iterable[tuple[float, float, float]]:
    """Of the first 1, 2, ... of the expected ones: seconds until the last of them is likely to have
    come, the seconds that they are worth, and what waiting for them brings (in seconds of
    sequences, see `CostWindow`)."""
    assert gathering.cost is not None
    n, kv, predict = gathering.n_ready, gathering.kv, gathering.cost.predict
    alone = predict(n, 0, kv, n)
    come = 0.0
    soonest = sorted((rest.wait, -rest.returns) for rest in gathering.expected)
    for k, (wait, returns) in enumerate(soonest, 1):
        come -= returns
        gain = come / k * (k * alone - n * (predict(n + k, 0, kv, n + k) - alone))
        yield wait, gain / (n + come), gain - (n + come) * wait
