"""Records of one bench as arms beside each other: one table of medians."""

from collections.abc import Collection, Iterable, Sequence
from statistics import median

from pyllamabatch.compare.workload import BENCHES, POISSON
from pyllamabatch.report.medians import pairs
from pyllamabatch.report.records import Record

SPEED, EACH = "tokens_per_second", "per_sequence_tokens_per_second"
JOULES = "joules_per_token"
SHORT = 90
MEMORY = {
    "device_bytes": "on the device",
    "pss_bytes": "PSS",
    "footprint_bytes": "footprint",
    "rss_bytes": "RSS",
}
"""Figures of memory, the one that says the most first."""


class Comparison:
    """The arms of one bench at each number of users, as medians over repeats.

    A run that failed is no result, nor is one with an answer that was not completed."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.bench = records[0].bench
        self.at_random = self.bench == BENCHES[POISSON]
        self.arms = list(dict.fromkeys(record.arm for record in records))
        self.counts = sorted({record.pl for record in records})
        self.good = [record for record in records if not self._problem(record)]
        values: dict[tuple[str, int, str], list[float]] = {}
        for record in self.good:
            for name, value in _figures(record).items():
                values.setdefault((record.arm, record.pl, name), []).append(value)
        self._medians = {key: median(found) for key, found in values.items()}

    def get(self, arm: str, n: int, name: str) -> float | None:
        """The median of a key of `detail`, of SPEED or of JOULES; None without a result."""
        return self._medians.get((arm, n, name))

    def all(self, n: int, name: str, arms: Iterable[str] = ()) -> dict[str, float]:
        """The same of all arms, or of these, that have it."""
        found = {arm: self.get(arm, n, name) for arm in arms or self.arms}
        return {arm: value for arm, value in found.items() if value is not None}

    def ratios(self, arm: str, n: int, base: str, base_n: int | None = None) -> list[float]:
        """Speed over that of `base`, of each repeat that has both."""
        return pairs(self.good, base, base_n).get((arm, n), [])

    def ratio(self, arm: str, n: int, base: str, base_n: int | None = None) -> float | None:
        ratios = self.ratios(arm, n, base, base_n)
        return median(ratios) if ratios else None

    def memory(self, n: int, arms: Collection[str]) -> tuple[str, str]:
        """The first figure of `MEMORY` that all these arms have, and its name; "" without one."""
        known = (m for m in MEMORY.items() if len(self.all(n, m[0], arms)) == len(arms))
        return next(known, ("", ""))

    def problem(self, arm: str, n: int) -> str:
        """Why there is no result, in a few words; "" when there is one, or none was asked for."""
        if self.get(arm, n, SPEED) is not None:
            return ""
        mine = (r for r in self.records if (r.arm, r.pl) == (arm, n))
        return next((short(self._problem(record)) for record in mine), "")

    def _problem(self, record: Record) -> str:
        if record.error:
            return record.error
        completed = record.detail.get("completed")
        if not self.at_random and completed is not None and completed < record.pl:
            return f"{completed:.0f} of {record.pl} completed"
        return "" if record.speed_tg > 0 else "no tokens"


def _figures(record: Record) -> dict[str, float]:
    found = record.detail | {SPEED: record.speed_tg}
    if "energy_joules" in found and found.get("total_tokens_sampled"):
        found[JOULES] = found["energy_joules"] / found["total_tokens_sampled"]
    return found


def by_bench(records: Iterable[Record]) -> dict[str, Comparison]:
    """In the order of `BENCHES`."""
    groups: dict[str, list[Record]] = {bench: [] for bench in BENCHES.values()}
    for record in records:
        groups[record.bench].append(record)
    return {bench: Comparison(group) for bench, group in groups.items() if group}


def short(error: str) -> str:
    """The last line of a failure, cut to `SHORT` characters."""
    lines = [" ".join(line.split()) for line in error.splitlines() if line.strip()]
    text = lines[-1] if lines else ""
    return text if len(text) <= SHORT else text[: SHORT - 1] + "…"
