"""Records of one bench as arms beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyllamabatch.report.medians import median_of, median_speeds, pairs
from pyllamabatch.report.records import Record

POISSON = "compare-poisson"
COMPLETE = ("compare", "compare-ds4")
"""Benches in which every sequence has one answer to complete (`detail.completed`)."""


class Comparison:
    """The arms of one bench at each number of users, as medians over repeats.

    A run that failed is no result, nor is one with an answer that was not completed.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.bench = records[0].bench
        self.arms = list(dict.fromkeys(record.arm for record in records))
        self.counts = sorted({record.pl for record in records})
        self.good = [record for record in records if not _problem(record)]
        self._speeds = median_speeds(self.good)

    def speed(self, arm: str, n: int) -> float | None:
        """Of all sequences together, tokens/s; None without a result."""
        return self._speeds.get((arm, n))

    def detail(self, arm: str, n: int, name: str) -> float | None:
        return median_of(r.detail.get(name) for r in self.good if (r.arm, r.pl) == (arm, n))

    def ratios(self, arm: str, n: int, base: str, base_n: int | None = None) -> list[float]:
        """Speed over that of `base`, of each repeat that has both."""
        return pairs(self.good, base, base_n).get((arm, n), [])

    def ratio(self, arm: str, n: int, base: str, base_n: int | None = None) -> float | None:
        return median_of(self.ratios(arm, n, base, base_n))

    def joules_per_token(self, arm: str, n: int) -> float | None:
        details = [r.detail for r in self.good if (r.arm, r.pl) == (arm, n)]
        return median_of(
            d["energy_joules"] / d["total_tokens_sampled"]
            for d in details
            if "energy_joules" in d and d.get("total_tokens_sampled")
        )

    def problem(self, arm: str, n: int) -> str:
        """Why there is no result, in a few words; "" when there is one, or none was asked for."""
        if self.speed(arm, n) is not None:
            return ""
        reasons = [_problem(r) for r in self.records if (r.arm, r.pl) == (arm, n)]
        return short(reasons[0]) if reasons else ""


def by_bench(records: Iterable[Record]) -> dict[str, Comparison]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.bench, []).append(record)
    return {bench: Comparison(group) for bench, group in groups.items()}


def _problem(record: Record) -> str:
    if record.error:
        return record.error
    completed = record.detail.get("completed")
    if record.bench in COMPLETE and completed is not None and completed < record.pl:
        return f"{completed:.0f} of {record.pl} completed"
    return "" if record.speed_tg > 0 else "no tokens"


def short(error: str, limit: int = 90) -> str:
    """The last line of a failure, cut to `limit` characters."""
    lines = [" ".join(line.split()) for line in error.splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    return text if len(text) <= limit else text[: limit - 1] + "…"
