"""What a bench is to show: a figure, made from records, and its limit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.views import median_of, paired_ratios
from pyllamabatch.report.records import Record

Figure = Callable[[Sequence[Record]], float | None]
"""From the records of one bench to a number; None when they do not have it."""


@dataclass(frozen=True)
class Target:
    """`where`: fields that the records must have: a text is part of theirs ("" is exactly ""),
    anything else is equal. `must`: a run of the bench that misses it has failed."""

    text: str
    figure: Figure
    at_least: float | None = None
    at_most: float | None = None
    where: Mapping[str, object] = field(default_factory=dict)
    must: bool = False

    def measured(self, records: Iterable[Record]) -> float | None:
        """The figure, of the records that this target is about."""
        return self.figure([r for r in records if not r.error and self._about(r)])

    def met_by(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )

    def missed_by(self, records: Iterable[Record]) -> bool:
        """Whether they have the figure, and it is beyond the limit."""
        value = self.measured(records)
        return value is not None and not self.met_by(value)

    @property
    def limit(self) -> str:
        limits = (("≥", self.at_least), ("≤", self.at_most))
        return " and ".join(f"{sign} {value:g}" for sign, value in limits if value is not None)

    def _about(self, record: Record) -> bool:
        for name, wanted in self.where.items():
            has = getattr(record, name)
            if has != wanted and not (isinstance(wanted, str) and wanted and wanted in has):
                return False
        return True


def speed_ratio(arm: str, base: str, pl: int, *, sampling: str | None = None) -> Figure:
    """`speed_tg` of `arm` over that of `base`, paired by repeat; `sampling`: the arm's."""

    def figure(records: Sequence[Record]) -> float | None:
        pair = [r for r in records if r.pl == pl and r.arm in (arm, base)]
        if sampling:
            pair = [r for r in pair if r.arm == base or r.sampling == sampling]
        return paired_ratios(pair, base).get((arm, pl))

    return figure


def median_detail(arm: str, name: str, pl: int | None = None) -> Figure:
    """The median of `detail[name]` of an arm, of one number of sequences or of all."""
    return lambda records: median_of(
        r.detail.get(name) for r in records if r.arm == arm and pl in (None, r.pl)
    )


def worst_detail(name: str, arm: str | None = None) -> Figure:
    """The largest |`detail[name]`|, of one arm or of all."""

    def figure(records: Sequence[Record]) -> float | None:
        mine = [r.detail for r in records if arm in (None, r.arm) and name in r.detail]
        return max((abs(detail[name]) for detail in mine), default=None)

    return figure


def judged(targets: Iterable[Target], records: Sequence[Record], spec: str = ".3g") -> str:
    """A line for each target that the records measure; `spec`: how the value is written."""
    lines = []
    for target in targets:
        value = target.measured(records)
        if value is not None:
            met = "met" if target.met_by(value) else "MISSED"
            lines.append(f"{target.text}: {value:{spec}} ({target.limit}: {met})\n")
    return "".join(lines)
