"""Tables of a bench's records: a line for each arm, medians of the repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyllamabatch.report.medians import median_of
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import NO_RESULT, Table, failures


@dataclass(frozen=True)
class Column:
    """`value`: a key of `detail`, or what a record gives; `spec`: how its median is written."""

    head: str
    value: str | Callable[[Record], float | None]
    spec: str = ".1f"
    scale: float = 1.0

    def of(self, record: Record) -> float | None:
        if callable(self.value):
            return self.value(record)
        return record.detail.get(self.value)

    def cell(self, records: Sequence[Record]) -> str:
        middle = median_of(map(self.of, records))
        return NO_RESULT if middle is None else format(middle * self.scale, self.spec)


def by_arm(records: Sequence[Record], columns: Sequence[Column], first: str = "arm") -> str:
    """Below the table: why arms have no result."""
    good = [record for record in records if not record.error]
    lines = [
        [arm, *(column.cell([r for r in good if r.arm == arm]) for column in columns)]
        for arm in dict.fromkeys(record.arm for record in good)
    ]
    table = Table([first, *(column.head for column in columns)], lines).markdown()
    return "\n".join([table, *failures(records)])


def plain(records: Sequence[Record]) -> str:
    """For a bench without a view: speed and all details, by arm and number of sequences."""
    good = [record for record in records if not record.error]
    names = sorted({name for record in good for name in record.detail})
    columns = [Column("tokens/s", lambda record: record.speed_tg)]
    columns += [Column(name, name, ".4g") for name in names]
    lines = []
    for arm, pl in dict.fromkeys((record.arm, record.pl) for record in good):
        mine = [record for record in good if (record.arm, record.pl) == (arm, pl)]
        lines.append([arm, pl, *(column.cell(mine) for column in columns)])
    heads = ["arm", "sequences", *(column.head for column in columns)]
    return "\n".join([Table(heads, lines).markdown(), *failures(records)])
