"""What came of each request, and the figures of a run: docs/how-to/simulate.md says what each is.

Percentiles are interpolated between order statistics; those of ITL come from bins 0.5 % wide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import median

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import ArgumentError
from pyllamabatch.scheduler import Counters

F64 = npt.NDArray[np.float64]

PERCENTILES = (50, 90, 95, 99)
SLO_NAMES = ("ttft", "tpot", "itl", "e2el")
TIMES = ("ttft", "tpot", "e2el", "queueing", "execution", "preemption")
N_POINTS = 2000  # of a load's curves; at least half as many once there are so many calls


@dataclass(slots=True)
class Outcome:
    """What came of one request. Times in seconds since the start of the trace.

    preemption: seconds in the waiting queue after preemptions. longest_itl: between two of its
    tokens. prefix: tokens of its prompt that were cached at its first admission. rejected: it can
    never fit; the other fields are meaningless then. deadline: that has ended it, with `n_output`
    tokens; it keeps no target, and without a token it has no TTFT. queueing: until its first
    admission. execution: in a slot, recomputation after a preemption included. n_drafted,
    n_accepted: drafted tokens that were checked, and of these the right ones."""

    id: int
    arrival: float
    n_prompt: int
    n_output: int
    tenant: str = ""
    replica: int = 0
    admitted: float = 0.0
    first: float = 0.0
    end: float = 0.0
    preemption: float = 0.0
    preemptions: int = 0
    longest_itl: float = 0.0
    prefix: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    rejected: bool = False
    deadline: bool = False

    @property
    def ttft(self) -> float | None:
        return self.first - self.arrival if self.n_output else None

    @property
    def e2el(self) -> float:
        return self.end - self.arrival

    @property
    def tpot(self) -> float | None:
        return (self.end - self.first) / (self.n_output - 1) if self.n_output > 1 else None

    @property
    def queueing(self) -> float:
        return self.admitted - self.arrival

    @property
    def execution(self) -> float:
        return self.e2el - self.queueing - self.preemption

    def keeps(self, slo: Mapping[str, float]) -> bool:
        """Whether it keeps every target: at most so many seconds, by name."""
        has = {"ttft": self.ttft, "tpot": self.tpot, "itl": self.longest_itl, "e2el": self.e2el}
        return not self.deadline and all((has[name] or 0.0) <= limit for name, limit in slo.items())


def parse_slo(text: str) -> dict[str, float]:
    """ "ttft=0.5,itl=50ms" in seconds, by name. Raises ArgumentError."""
    slo: dict[str, float] = {}
    for item in text.split(",") if text else ():
        name, _, value = (part.strip() for part in item.partition("="))
        scale = 1e-3 if value.endswith("ms") else 1.0
        try:
            slo[name] = float(value.removesuffix("ms").removesuffix("s")) * scale
        except ValueError:
            slo[name] = 0.0
        if name not in SLO_NAMES or not 0 < slo[name] < inf:
            raise ArgumentError("slo", item, f"{', '.join(SLO_NAMES)} = seconds, or 20ms")
    return slo


class Histogram:
    """Times in bins 0.5 % wide, from 1 µs to a day, so that any number of them needs little memory.
    Values are put into bins some thousands at a time."""

    LOW, RATIO = 1e-6, 1.005
    N_BINS = int(np.log(86400 / LOW) / np.log(RATIO)) + 2
    N_PENDING = 50_000

    def __init__(self) -> None:
        self._sum = 0.0
        self._bins = np.zeros(self.N_BINS, dtype=np.int64)
        self._pending: list[tuple[F64, int]] = []
        self._n_pending = 0

    def add(self, values: F64, weight: int = 1) -> None:
        """Each of `values` (seconds; the array must not change afterwards), `weight` times."""
        self._pending.append((values, weight))
        self._n_pending += len(values)
        if self._n_pending > self.N_PENDING:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            values = np.concatenate([values for values, _ in self._pending])
            counts, lengths = zip(*((weight, len(v)) for v, weight in self._pending), strict=True)
            weights = np.repeat(counts, lengths)
            at = np.log(np.maximum(values, self.LOW) / self.LOW) * (1 / np.log(self.RATIO))
            bins = np.minimum(at.astype(np.int64), self.N_BINS - 1)
            self._bins += np.bincount(bins, weights, self.N_BINS).astype(np.int64)
            self._sum += float(values @ weights)
            self._pending, self._n_pending = [], 0

    def merge(self, other: Histogram) -> None:
        other._flush()
        self._bins += other._bins
        self._sum += other._sum

    @property
    def n(self) -> int:
        self._flush()
        return int(self._bins.sum())

    @property
    def mean(self) -> float:
        return self._sum / self.n if self.n else 0.0

    def percentile(self, p: float) -> float:
        """The middle of its bin; 0 without values."""
        n = self.n
        i = int(np.searchsorted(np.cumsum(self._bins), p / 100 * n))
        return float(self.LOW * self.RATIO ** (i + 0.5)) if n else 0.0


@dataclass(slots=True)
class Load:
    """What a replica did. seconds: in native calls. kv_peak: most cells in use. points: (seconds,
    running requests, waiting requests, cells held), thinned out."""

    n_cells: int
    seconds: float = 0.0
    kv_peak: int = 0
    itl: Histogram = field(default_factory=Histogram)
    points: list[tuple[float, int, int, int]] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    _n_calls: int = 0
    _calls_per_point: int = 1

    def add_point(self, now: float, n_running: int, n_waiting: int, held: int) -> None:
        """A call begins. With too many points every second one goes, and calls give half as many
        from then on."""
        self._n_calls += 1
        if self._n_calls % self._calls_per_point:
            return
        self.points.append((now, n_running, n_waiting, held))
        if len(self.points) > N_POINTS:
            del self.points[::2]
            self._calls_per_point *= 2


def overloaded(outcomes: Iterable[Outcome]) -> bool:
    """More arrives than the engines can do, so the waiting queue grows: the last quarter of the
    requests waits longer than it runs, and more than twice as long as the first quarter."""
    done = sorted((o for o in outcomes if not o.rejected), key=lambda o: o.arrival)
    n = len(done) // 4
    if n < 2:
        return False
    first, last = (median(o.queueing for o in part) for part in (done[:n], done[-n:]))
    return last > max(median(o.execution for o in done[-n:]), 2 * first)


def summarise(
    outcomes: Sequence[Outcome], loads: Sequence[Load], slo: Mapping[str, float]
) -> dict[str, float]:
    """The figures of a run by name: times in seconds, rates per second, shares from 0 to 1.
    duration: from the first arrival to the last token. ArgumentError for another name in `slo`."""
    for name in slo.keys() - {*SLO_NAMES}:
        raise ArgumentError("slo", name, f"one of {', '.join(SLO_NAMES)}")
    done = [o for o in outcomes if not o.rejected]
    found: dict[str, float] = {
        "requests": len(done),
        "rejected": len(outcomes) - len(done),
        "deadlines": sum(o.deadline for o in done),
        "preemptions": sum(o.preemptions for o in done),
    }
    if not done:
        return found
    duration = max(o.end for o in done) - min(o.arrival for o in done)
    per_second = 1 / duration if duration > 0 else 0.0
    found |= {
        "overloaded": overloaded(done),
        "duration": duration,
        "requests_per_s": len(done) * per_second,
        "tokens_per_s": sum(o.n_output for o in done) * per_second,
    }
    if slo:
        n_good = sum(o.keeps(slo) for o in done)
        found |= {"goodput_per_s": n_good * per_second, "slo_share": n_good / len(done)}
    for name in TIMES:
        values = np.array([v for o in done if (v := getattr(o, name)) is not None])
        if len(values):
            found[f"{name}_mean"] = float(values.mean())
            levels = np.percentile(values, PERCENTILES).tolist()
            found |= {f"{name}_p{p}": v for p, v in zip(PERCENTILES, levels, strict=True)}
    itl = Histogram()
    for load in loads:
        itl.merge(load.itl)
    if itl.n:
        found["itl_mean"] = itl.mean
        found |= {f"itl_p{p}": itl.percentile(p) for p in PERCENTILES}
    counters = [load.counters for load in loads]
    if n_steps := sum(c.steps for c in counters):
        found |= {
            "steps": n_steps,
            "rows_mean": sum(c.rows for c in counters) / n_steps,
            "busy": sum(load.seconds for load in loads) * per_second / len(loads),
            "kv_peak": max(load.kv_peak / load.n_cells for load in loads),
            "prefix_share": sum(c.prefix_tokens for c in counters)
            / max(sum(c.known_tokens for c in counters), 1),
            "recomputed_rows": sum(c.recomputed_rows for c in counters),
        }
        if n_drafted := sum(c.drafted_tokens for c in counters):
            n_accepted = sum(c.accepted_tokens for c in counters)
            found |= {"drafted_tokens": n_drafted, "accepted_tokens": n_accepted}
    return found
