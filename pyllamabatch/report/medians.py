"""What records say together: speeds of repeats, and ratios of runs that were neighbours."""

from collections.abc import Iterable

from pyllamabatch.report.records import Record

Key = tuple[str, int]
"""An arm and its number of sequences."""


def speeds_of(records: Iterable[Record]) -> dict[Key, list[float]]:
    """`speed_tg` of every repeat."""
    groups: dict[Key, list[float]] = {}
    for record in records:
        groups.setdefault((record.arm, record.pl), []).append(record.speed_tg)
    return groups


def pairs(
    records: Iterable[Record], base: str, base_pl: int | None = None
) -> dict[Key, list[float]]:
    """Speed over that of `base` in the same repeat of the same run, at `base_pl` or at as many
    sequences. A repeat without the base is left out.

    Runs of one repeat are neighbours in time: a machine that slows down for a while moves both
    sides of a ratio."""
    records = list(records)
    bases = {(r.run_id, r.repeat, r.pl): r.speed_tg for r in records if r.arm == base}
    groups: dict[Key, list[float]] = {}
    for record in records:
        reference = bases.get((record.run_id, record.repeat, base_pl or record.pl))
        if reference:
            groups.setdefault((record.arm, record.pl), []).append(record.speed_tg / reference)
    return groups
