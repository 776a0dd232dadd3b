"""What a bench is to show: a figure, made from result rows, and its limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.report import paired_ratios
from bench.schema import Row

Figure = Callable[[Sequence[Row]], float | None]
"""From the rows of one bench to a number; None when they do not have it."""


@dataclass(frozen=True)
class Target:
    """`where`: row fields that the rows must have: a text is part of theirs ("" is exactly ""),
    anything else is equal."""

    text: str
    figure: Figure
    at_least: float | None = None
    at_most: float | None = None
    where: Mapping[str, object] = field(default_factory=dict)

    def measured(self, rows: Iterable[Row]) -> float | None:
        """The figure, of the rows that this target is about."""
        return self.figure([row for row in rows if not row.error and self._about(row)])

    def met_by(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )

    @property
    def limit(self) -> str:
        limits = (("≥", self.at_least), ("≤", self.at_most))
        return " and ".join(f"{sign} {value:g}" for sign, value in limits if value is not None)

    def _about(self, row: Row) -> bool:
        for name, wanted in self.where.items():
            has = getattr(row, name)
            if has != wanted and not (isinstance(wanted, str) and wanted and wanted in has):
                return False
        return True


def speed_ratio(arm: str, base: str, pl: int, *, sampling: str | None = None) -> Figure:
    """`speed_tg` of `arm` over that of `base`, paired by repeat; `sampling`: the arm's."""

    def figure(rows: Sequence[Row]) -> float | None:
        pair = [row for row in rows if row.pl == pl and row.arm in (arm, base)]
        if sampling:
            pair = [row for row in pair if row.arm == base or row.sampling == sampling]
        return paired_ratios(pair, base).get((arm, pl))

    return figure


def judged(targets: Iterable[Target], rows: Sequence[Row], spec: str = ".3g") -> str:
    """A line for each target that the rows measure; `spec`: how the value is written."""
    lines = []
    for target in targets:
        value = target.measured(rows)
        if value is not None:
            met = "met" if target.met_by(value) else "MISSED"
            lines.append(f"{target.text}: {value:{spec}} ({target.limit}: {met})\n")
    return "".join(lines)
