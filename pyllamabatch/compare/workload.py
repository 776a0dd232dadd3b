"""What one run asks of an arm, what came of it, and the figures that follow."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pyllamabatch.compare.case import I32, Case

BURST, DS4, POISSON = "burst", "ds4", "poisson"
BENCHES = {BURST: "compare", DS4: "compare-ds4", POISSON: "compare-poisson"}
"""Protocol -> `Record.bench`."""


@dataclass(frozen=True)
class Workload:
    """Requests of `tokens` generated tokens each, the first sample included.

    - burst: one for each sequence. The time starts when all have their first token, and all go on
      at once: prompts and first samples are not in it.
    - ds4: one for each sequence, with the same prompt, fired at once. The time is theirs whole.
    - poisson: they come at `arrivals` (s after the start, ascending) and wait for a free sequence.

    which: another one gives other prompts."""

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


def poisson_arrivals(n: int, rate: float, seed: Sequence[int]) -> tuple[float, ...]:
    """`n` arrivals of a Poisson process of `rate` per s, the first at 0: the gaps between them are
    exponentially distributed."""
    gaps = np.random.default_rng(list(seed)).exponential(1 / rate, n)
    gaps[0] = 0.0
    return tuple(np.cumsum(gaps).tolist())


@dataclass
class RequestTimes:
    """When one request came and when it had each token, in s on one clock."""

    arrived: float = 0.0
    times: list[float] = field(default_factory=list)
    error: str = ""  # why it did not get all its tokens


@dataclass
class Timings:
    """`begin`: when the time started, on the same clock. `counts`: what else the record tells."""

    begin: float
    requests: list[RequestTimes]
    counts: dict[str, float] = field(default_factory=dict)


def figures(workload: Workload, timings: Timings) -> dict[str, float]:
    """What a record has in `detail`:

    - elapsed_seconds: from the start of the time to the last token; total_tokens_sampled: tokens
      that came in the time
    - per_sequence_tokens_per_second: the mean of the requests' own rates; slowest_ and fastest_:
      the extremes; fairness: the slowest over the fastest. A request's rate is its tokens in the
      time, over the seconds from its arrival (or the start of the time) to its last token.
    - completed: requests that got all their tokens; requests
    - ttft_p50_s, ttft_p99_s: from a request's arrival to its first token
    - itl_p50_s, itl_p99_s: between a request's tokens, those of all requests together
    - draft_n, draft_n_accepted: drafted tokens that were checked, and the right ones, of an engine
      that speculates"""
    begin, requests = timings.begin, timings.requests
    untimed = 1 if workload.protocol == BURST else 0  # first samples
    in_time = [one.times[untimed:] for one in requests]
    rates = [
        len(times) / (times[-1] - max(begin, one.arrived))
        for one, times in zip(requests, in_time, strict=True)
        if times
    ]
    detail: dict[str, float] = {
        "elapsed_seconds": max((times[-1] for times in in_time if times), default=begin) - begin,
        "total_tokens_sampled": sum(map(len, in_time)),
        "completed": sum(len(one.times) == workload.tokens for one in requests),
        "requests": len(requests),
        **timings.counts,
    }
    if rates:
        detail |= {
            "per_sequence_tokens_per_second": float(np.mean(rates)),
            "slowest_tokens_per_second": min(rates),
            "fastest_tokens_per_second": max(rates),
            "fairness": min(rates) / max(rates),
        }
    firsts = [one.times[0] - one.arrived for one in requests if one.times]
    gaps = [gap for one in requests for gap in np.diff(one.times)]
    for name, values in (("ttft", firsts), ("itl", gaps)):
        for q in (50, 99) if values else ():
            detail[f"{name}_p{q}_s"] = float(np.percentile(values, q))
    return detail


def failure(workload: Workload, timings: Timings) -> str:
    """Why not all that was asked for was done; "" when it was."""
    lost = [one for one in timings.requests if len(one.times) != workload.tokens]
    if not lost:
        return ""
    least = min(len(one.times) for one in lost)
    why = next((one.error for one in lost if one.error), "no reason given")
    return (
        f"{len(lost)} of {len(timings.requests)} requests failed, "
        f"after {least} of {workload.tokens} tokens: {why}"
    )
