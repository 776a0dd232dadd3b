"""What one run asks of an arm, what came of it, and the figures that follow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from pyllamabatch.compare.case import I32, Case

BURST, DS4, POISSON = "burst", "ds4", "poisson"
BENCHES = {BURST: "compare", DS4: "compare-ds4", POISSON: "compare-poisson"}
"""Protocol -> `Record.bench`."""


@dataclass(frozen=True)
class Job:
    """Requests of `tokens` generated tokens each (the first sample included).

    - burst: one for each sequence. When all have their first token the time starts, and everybody
      goes on at once: prompts and first samples are not in it.
    - ds4: one for each sequence, all with the same prompt, fired at once; the time is theirs whole.
    - poisson: they come at `arrivals` (s after the start, ascending), and wait for a free sequence.

    which: another one gives other prompts.
    """

    protocol: str
    which: int
    tokens: int
    arrivals: tuple[float, ...]

    def prompts(self, case: Case, n_vocab: int) -> I32:
        """Random tokens, shape (requests, case.pp)."""
        n = len(self.arrivals)
        if self.protocol == DS4:
            return np.repeat(case.prompts(n_vocab, self.which, 1), n, axis=0)
        return case.prompts(n_vocab, self.which, n)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**values | {"arrivals": tuple(values["arrivals"])})


def poisson_arrivals(n: int, rate: float, seed: Sequence[int]) -> tuple[float, ...]:
    """`n` arrivals of a Poisson process of `rate` per s, the first at 0: the gaps between them are
    exponentially distributed."""
    gaps = np.random.default_rng(list(seed)).exponential(1 / rate, n)
    gaps[0] = 0.0
    return tuple(np.cumsum(gaps).tolist())


@dataclass
class Served:
    """One request: when it came and when it had each token, in s on one clock."""

    arrived: float = 0.0
    times: list[float] = field(default_factory=list)
    error: str = ""  # why it did not get all its tokens


@dataclass
class Outcome:
    """`begin`: when the time started, on the same clock."""

    begin: float
    served: list[Served]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        values = json.loads(text)
        return cls(values["begin"], [Served(**one) for one in values["served"]])


@dataclass(frozen=True)
class Figures:
    """`elapsed`: from the start of the time to the last token, s. `error`: not all that was asked
    for was done."""

    elapsed: float
    detail: dict[str, float]
    error: str = ""


def figures(job: Job, outcome: Outcome) -> Figures:
    """In `detail`:

    - elapsed_seconds; total_tokens_sampled: tokens that came in the time
    - per_sequence_tokens_per_second: mean of the requests' own rates, slowest_ and fastest_ the
      extremes, fairness the slowest over the fastest. A request's rate is its tokens in the time,
      over the seconds from when it came (or from the start of the time) to its last token.
    - completed: requests that got all their tokens; requests
    - ttft_p50_s, ttft_p99_s: from a request's arrival to its first token
    - itl_p50_s, itl_p99_s: between a request's tokens, those of all requests together
    """
    begin, served = outcome.begin, outcome.served
    untimed = 1 if job.protocol == BURST else 0  # first samples
    in_time = [one.times[untimed:] for one in served]
    ends = [times[-1] for times in in_time if times]
    elapsed = max(ends, default=begin) - begin
    rates = [
        len(times) / (times[-1] - max(begin, one.arrived))
        for one, times in zip(served, in_time, strict=True)
        if times
    ]
    detail: dict[str, float] = {
        "elapsed_seconds": elapsed,
        "total_tokens_sampled": sum(map(len, in_time)),
        "completed": sum(len(one.times) == job.tokens for one in served),
        "requests": len(served),
    }
    if rates:
        detail |= {
            "per_sequence_tokens_per_second": float(np.mean(rates)),
            "slowest_tokens_per_second": min(rates),
            "fastest_tokens_per_second": max(rates),
            "fairness": min(rates) / max(rates),
        }
    firsts = [one.times[0] - one.arrived for one in served if one.times]
    gaps = np.concatenate([np.diff(one.times) for one in served] or [np.zeros(0)])
    for name, values in (("ttft", np.array(firsts)), ("itl", gaps)):
        for q in (50, 99) if values.size else ():
            detail[f"{name}_p{q}_s"] = float(np.percentile(values, q))
    return Figures(elapsed, detail, _error(job, served))


def _error(job: Job, served: list[Served]) -> str:
    lost = [one for one in served if len(one.times) != job.tokens]
    if not lost:
        return ""
    least = min(len(one.times) for one in lost)
    why = next((one.error for one in lost if one.error), "no reason given")
    return (
        f"{len(lost)} of {len(served)} requests failed, after {least} of {job.tokens} tokens: {why}"
    )
