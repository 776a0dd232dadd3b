"""What rows say together: medians over repeats, and ratios of runs that were neighbours in time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from pyllamabatch.compare.row import Row

COMPLETE = ("compare", "compare-ds4")
"""Benches in which every sequence has one answer to complete (`detail.completed`)."""


def median_speeds(rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """Median `speed_tg` by (arm, pl)."""
    return {key: median(values) for key, values in _speeds(rows).items()}


def ranges(rows: Iterable[Row]) -> dict[tuple[str, int], tuple[float, float]]:
    """Smallest and largest `speed_tg` by (arm, pl)."""
    return {key: (min(values), max(values)) for key, values in _speeds(rows).items()}


def _speeds(rows: Iterable[Row]) -> dict[tuple[str, int], list[float]]:
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.pl), []).append(row.speed_tg)
    return groups


def spread(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """(largest - smallest) / median of `speed_tg` by (arm, pl)."""
    middle = median_speeds(rows)
    return {key: (high - low) / middle[key] for key, (low, high) in ranges(rows).items()}


def pairs(
    rows: Iterable[Row], base: str, base_pl: int | None = None
) -> dict[tuple[str, int], list[float]]:
    """speed_tg / (speed_tg of `base` in the same repeat of the same run, at the same pl or at
    `base_pl`), by (arm, pl).

    Runs of one repeat are neighbours in time, so a machine that slows down for a while moves both
    sides of a ratio.  A repeat without the base is left out.
    """
    rows = list(rows)
    bases = {(r.run_id, r.repeat, r.pl): r.speed_tg for r in rows if r.arm == base}
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        reference = bases.get((row.run_id, row.repeat, base_pl or row.pl))
        if reference:
            groups.setdefault((row.arm, row.pl), []).append(row.speed_tg / reference)
    return groups


def paired_ratios(
    rows: Iterable[Row], base: str, base_pl: int | None = None
) -> dict[tuple[str, int], float]:
    """Medians of `pairs`."""
    return {key: median(values) for key, values in pairs(rows, base, base_pl).items()}


def median_of(values: Iterable[float | None]) -> float | None:
    """Median of those that are there."""
    there = [value for value in values if value is not None]
    return median(there) if there else None


class Comparison:
    """Rows of one bench, as arms beside each other for each number of users.

    A run that failed, or in which not everybody's answer was completed, is no result.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.bench = rows[0].bench
        self.arms = list(dict.fromkeys(row.arm for row in rows))
        self.counts = sorted({row.pl for row in rows})
        self.good = [row for row in rows if not _problem(row)]
        self._speeds = median_speeds(self.good)

    def speed(self, arm: str, n: int) -> float | None:
        """Of all sequences together, tokens per s; None without a result."""
        return self._speeds.get((arm, n))

    def detail(self, arm: str, n: int, name: str) -> float | None:
        return median_of(r.detail.get(name) for r in self.good if (r.arm, r.pl) == (arm, n))

    def ratios(self, arm: str, n: int, base: str, base_n: int | None = None) -> list[float]:
        """Speed over that of `base`, of each repeat that has both."""
        return pairs(self.good, base, base_n).get((arm, n), [])

    def ratio(self, arm: str, n: int, base: str, base_n: int | None = None) -> float | None:
        return median_of(self.ratios(arm, n, base, base_n))

    def joules_per_token(self, arm: str, n: int) -> float | None:
        mine = [r.detail for r in self.good if (r.arm, r.pl) == (arm, n)]
        return median_of(
            d["energy_joules"] / d["total_tokens_sampled"]
            for d in mine
            if "energy_joules" in d and d.get("total_tokens_sampled")
        )

    def problem(self, arm: str, n: int) -> str:
        """Why there is no result, in a few words; "" when there is one, or nobody tried."""
        if self.speed(arm, n) is not None:
            return ""
        mine = [_problem(row) for row in self.rows if (row.arm, row.pl) == (arm, n)]
        return short(mine[0]) if mine else ""


def by_bench(rows: Iterable[Row]) -> dict[str, Comparison]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.bench, []).append(row)
    return {bench: Comparison(mine) for bench, mine in groups.items()}


def _problem(row: Row) -> str:
    if row.error:
        return row.error
    completed = row.detail.get("completed")
    if row.bench in COMPLETE and completed is not None and completed < row.pl:
        return f"{completed:.0f} of {row.pl} completed"
    return "" if row.speed_tg > 0 else "no tokens"


def short(error: str, limit: int = 90) -> str:
    """The last line of a failure, cut to `limit` characters."""
    lines = [" ".join(line.split()) for line in error.splitlines() if line.strip()]
    text = (lines or [""])[-1].replace("|", "/")
    return text if len(text) <= limit else text[: limit - 1] + "…"
