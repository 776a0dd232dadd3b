"""Tables of a bench's records: medians of the repeats, and ratios within each."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from pyllamabatch.report.medians import Key, pairs, speeds_of
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import NO_RESULT, Table


def paired_ratios(
    records: Iterable[Record], base: str, base_pl: int | None = None
) -> dict[Key, float]:
    """Medians of `pairs`."""
    return {key: median(ratios) for key, ratios in pairs(records, base, base_pl).items()}


def median_of(values: Iterable[float | None]) -> float | None:
    """The median of those that are not None; None without any."""
    there = [value for value in values if value is not None]
    return median(there) if there else None


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


def speed_table(records: Sequence[Record], base: str, first: str = "B") -> str:
    """Markdown: median speed by number of sequences and arm, in brackets the ratio to `base`.
    Below it the largest spread of an arm, and why others have no result."""
    good = [record for record in records if not record.error]
    speeds, ratios = speeds_of(good), paired_ratios(good, base)
    arms = list(dict.fromkeys(record.arm for record in records))

    def cell(arm: str, pl: int) -> str:
        speed, ratio = median_of(speeds.get((arm, pl), ())), ratios.get((arm, pl))
        if speed is None:
            return NO_RESULT
        return f"{speed:.1f}" if ratio is None or arm == base else f"{speed:.1f} ({ratio:.3f})"

    counts = sorted({record.pl for record in records})
    lines = [[pl, *(cell(arm, pl) for arm in arms)] for pl in counts]
    text = [Table([first, *arms], lines, text=()).markdown()]
    if good:
        widest = max((max(found) - min(found)) / median(found) for found in speeds.values())
        text += ["", f"Largest spread of an arm, (max - min) / median: {widest:.0%}"]
    return "\n".join(text + failures(records))


def failures(records: Iterable[Record]) -> list[str]:
    """For below a table: a line for each arm and reason that there is no result."""
    reasons = dict.fromkeys((r.arm, " ".join(r.error.split())) for r in records if r.error)
    lines = [f"- {arm}: no result: {error[:200]}" for arm, error in reasons]
    return ["", *lines] if lines else []
