"""What records say together: medians over repeats, and ratios of runs that were neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from pyllamabatch.report.records import Record

Key = tuple[str, int]
"""An arm and its number of sequences."""


def speeds_of(records: Iterable[Record]) -> dict[Key, list[float]]:
    """`speed_tg` of every repeat."""
    groups: dict[Key, list[float]] = {}
    for record in records:
        groups.setdefault((record.arm, record.pl), []).append(record.speed_tg)
    return groups


def median_speeds(records: Iterable[Record]) -> dict[Key, float]:
    return {key: median(speeds) for key, speeds in speeds_of(records).items()}


def spread(records: Iterable[Record]) -> dict[Key, float]:
    """(largest - smallest) / median of the speeds."""
    return {
        key: (max(speeds) - min(speeds)) / median(speeds)
        for key, speeds in speeds_of(records).items()
    }


def pairs(
    records: Iterable[Record], base: str, base_pl: int | None = None
) -> dict[Key, list[float]]:
    """Speed over that of `base` in the same repeat of the same run, at `base_pl` or at as many
    sequences. A repeat without the base is left out.

    Runs of one repeat are neighbours in time: a machine that slows down for a while moves both
    sides of a ratio.
    """
    records = list(records)
    bases = {(r.run_id, r.repeat, r.pl): r.speed_tg for r in records if r.arm == base}
    groups: dict[Key, list[float]] = {}
    for record in records:
        reference = bases.get((record.run_id, record.repeat, base_pl or record.pl))
        if reference:
            groups.setdefault((record.arm, record.pl), []).append(record.speed_tg / reference)
    return groups


def paired_ratios(
    records: Iterable[Record], base: str, base_pl: int | None = None
) -> dict[Key, float]:
    """Medians of `pairs`."""
    return {key: median(ratios) for key, ratios in pairs(records, base, base_pl).items()}


def median_of(values: Iterable[float | None]) -> float | None:
    """The median of those that are not None; None without any."""
    there = [value for value in values if value is not None]
    return median(there) if there else None
