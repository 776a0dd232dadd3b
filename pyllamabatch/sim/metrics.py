"""What came of each request, and the figures that are made of many.

    TTFT   first token - arrival
    TPOT   (last token - first token) / (tokens - 1), of requests of two tokens at least
    ITL    time between two tokens of a request, every pair counted
    E2EL   last token - arrival = queueing + execution + preemption
    queueing    from the arrival to the first admission
    execution   in a slot, what is computed again after a preemption included
    preemption  waiting again after having been preempted
    goodput     requests a second that keep every target; ITL's is for the longest of a request

Percentiles are interpolated linearly between order statistics; those of ITL come from bins that are
0.5 % wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError

F64 = npt.NDArray[np.float64]

PERCENTILES = (50, 90, 95, 99)
SLO_NAMES = ("ttft", "tpot", "itl", "e2el")
TIMES = ("ttft", "tpot", "e2el", "queueing", "execution", "preemption")


@dataclass(slots=True)
class Outcome:
    """What came of one request. Times in s since the start of the trace; `preempted_s`: in the
    waiting line after preemptions; `longest_itl`: the longest time between two of its tokens.
    `prefix`: tokens of its prompt that were in the cache when it was admitted first. `rejected`: it
    could never fit, and nothing else of it is true."""

    id: int
    arrival: float
    n_prompt: int
    n_output: int
    tenant: str = ""
    replica: int = 0
    admitted: float = 0.0
    first: float = 0.0
    end: float = 0.0
    preempted_s: float = 0.0
    preemptions: int = 0
    longest_itl: float = 0.0
    prefix: int = 0
    rejected: bool = False

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

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
    def preemption(self) -> float:
        return self.preempted_s

    @property
    def execution(self) -> float:
        return self.e2el - self.queueing - self.preempted_s

    def keeps(self, slo: Mapping[str, float]) -> bool:
        """Every target: name -> s at most."""
        has = {"ttft": self.ttft, "tpot": self.tpot, "itl": self.longest_itl, "e2el": self.e2el}
        return all((has[name] or 0.0) <= limit for name, limit in slo.items())


def parse_slo(text: str) -> dict[str, float]:
    """ "ttft=0.5,itl=50ms" in seconds. ArgumentError for what is not one."""
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
    """Times in bins that are 0.5 % wide, from 1 µs to a day; any number of them in little memory.

    Values come as they are and are put into bins some thousands at a time."""

    LOW, RATIO = 1e-6, 1.005
    N_BINS = int(np.log(86400 / LOW) / np.log(RATIO)) + 2

    def __init__(self) -> None:
        self._sum = 0.0
        self._n = 0
        self._bins = np.zeros(self.N_BINS, dtype=np.int64)
        self._values: list[F64] = []
        self._weights: list[int] = []
        self._n_pending = 0

    def add(self, values: F64, weight: int = 1) -> None:
        """Each of `values` (s, not changed afterwards), `weight` times."""
        self._values.append(values)
        self._weights.append(weight)
        self._n_pending += len(values)
        if self._n_pending > 50_000:
            self._flush()

    def _flush(self) -> None:
        if not self._values:
            return
        values = np.concatenate(self._values)
        weights = np.repeat(self._weights, [len(v) for v in self._values])
        at = np.log(np.maximum(values, self.LOW) / self.LOW) * (1 / np.log(self.RATIO))
        bins = np.minimum(at.astype(np.int64), self.N_BINS - 1)
        self._bins += np.bincount(bins, weights, self.N_BINS).astype(np.int64)
        self._sum += float(values @ weights)
        self._n += int(weights.sum())
        self._values, self._weights, self._n_pending = [], [], 0

    def merge(self, other: Histogram) -> None:
        self._flush()
        other._flush()
        self._bins += other._bins
        self._sum += other._sum
        self._n += other._n

    @property
    def n(self) -> int:
        self._flush()
        return self._n

    @property
    def mean(self) -> float:
        n = self.n
        return self._sum / n if n else 0.0

    def percentile(self, p: float) -> float:
        """The middle of the bin in which it is; 0 when there is nothing."""
        n = self.n
        if not n:
            return 0.0
        i = int(np.searchsorted(np.cumsum(self._bins), p / 100 * n))
        return float(self.LOW * self.RATIO ** (i + 0.5))


@dataclass(slots=True)
class Load:
    """What a replica did, or several together. `seconds`: computing, and `kv_seconds`: cells that
    running sequences hold times that; `rows`: steps by their rows."""

    seconds: float = 0.0
    kv_seconds: float = 0.0
    kv_peak: int = 0
    n_cells: int = 0
    rows: dict[int, int] = field(default_factory=dict)
    itl: Histogram = field(default_factory=Histogram)
    known_tokens: int = 0
    prefix_tokens: int = 0
    prefill_rows: int = 0
    recomputed_rows: int = 0

    def merge(self, other: Load) -> None:
        self.seconds += other.seconds
        self.kv_seconds += other.kv_seconds
        self.kv_peak = max(self.kv_peak, other.kv_peak)
        self.n_cells = other.n_cells
        for n_rows, n in other.rows.items():
            self.rows[n_rows] = self.rows.get(n_rows, 0) + n
        self.itl.merge(other.itl)
        self.known_tokens += other.known_tokens
        self.prefix_tokens += other.prefix_tokens
        self.prefill_rows += other.prefill_rows
        self.recomputed_rows += other.recomputed_rows


def summarise(
    outcomes: Sequence[Outcome], loads: Iterable[Load], slo: Mapping[str, float]
) -> dict[str, float]:
    """The figures of a run, by name: times in s, rates per s, shares from 0 to 1. `duration`: from
    the first arrival to the last token."""
    total, n_replicas = Load(), 0
    for load in loads:
        total.merge(load)
        n_replicas += 1
    done = [o for o in outcomes if not o.rejected]
    found: dict[str, float] = {
        "requests": len(done),
        "rejected": len(outcomes) - len(done),
    }
    if not done:
        return found
    duration = max(o.end for o in done) - min(o.arrival for o in done)
    per_second = 1 / duration if duration > 0 else 0.0
    tokens = sum(o.n_output for o in done)
    found |= {
        "duration": duration,
        "requests_per_s": len(done) * per_second,
        "tokens_per_s": tokens * per_second,
        "total_tokens_per_s": (tokens + sum(o.n_prompt for o in done)) * per_second,
    }
    if slo:
        n_good = sum(o.keeps(slo) for o in done)
        found["goodput_per_s"] = n_good * per_second
        found["slo_share"] = n_good / len(done)
    for name in TIMES:
        values = [v for o in done if (v := getattr(o, name)) is not None]
        found |= _spread(name, np.array(values))
    if total.itl.mean:
        found["itl_mean"] = total.itl.mean
        found |= {f"itl_p{p}": total.itl.percentile(p) for p in PERCENTILES}
    found["preemptions"] = sum(o.preemptions for o in done)
    if not total.rows:
        return found
    n_steps = sum(total.rows.values())
    rows = np.array(sorted(total.rows))
    upto = np.cumsum([total.rows[n] for n in rows.tolist()])
    found |= {
        "steps": n_steps,
        "rows_mean": sum(n * k for n, k in total.rows.items()) / n_steps,
        "rows_p50": float(rows[np.searchsorted(upto, 0.5 * n_steps)]),
        "rows_max": float(rows[-1]),
        "busy": total.seconds * per_second / n_replicas,
        "kv_mean": total.kv_seconds / max(total.seconds, 1e-12) / total.n_cells,
        "kv_peak": total.kv_peak / total.n_cells,
        "prefix_share": total.prefix_tokens / max(total.known_tokens, 1),
        "prefill_rows": total.prefill_rows,
        "recomputed_rows": total.recomputed_rows,
    }
    return found


def _spread(name: str, values: F64) -> dict[str, float]:
    if not len(values):
        return {}
    found = {f"{name}_mean": float(values.mean())}
    levels = np.percentile(values, PERCENTILES).tolist()
    return found | {f"{name}_p{p}": v for p, v in zip(PERCENTILES, levels, strict=True)}
