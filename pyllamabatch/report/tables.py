"""Tables of text cells, as Markdown and as HTML, and the table of speeds that most benches show."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pyllamabatch.report.medians import median_speeds, paired_ratios, spread
from pyllamabatch.report.records import Record

NO_RESULT = "—"


@dataclass(frozen=True)
class Table:
    """`lines` of as many cells as there are `heads`. `text`: the columns of words, by their
    places; the others are numbers, which are aligned to the right."""

    heads: Sequence[str]
    lines: Sequence[Sequence[object]]
    text: Collection[int] = (0,)

    def markdown(self) -> str:
        rule = ["---" if i in self.text else "--:" for i in range(len(self.heads))]
        cells = [[str(cell).replace("|", "\\|") for cell in line] for line in self.lines]
        lines = [_bars(self.heads), f"|{'|'.join(rule)}|", *map(_bars, cells)]
        return "\n".join(lines)

    def plain(self) -> str:
        """For a terminal: columns as wide as their widest cell."""
        lines = [list(self.heads), *([str(cell) for cell in line] for line in self.lines)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i in self.text else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def html(self) -> str:
        def row(kind: str, line: Sequence[object]) -> str:
            looks = (" class=text" if i in self.text else "" for i in range(len(line)))
            cells = (
                f"<{kind}{look}>{html.escape(str(cell))}</{kind}>"
                for look, cell in zip(looks, line, strict=True)
            )
            return f"<tr>{''.join(cells)}</tr>"

        heads = [row("th", self.heads)] if any(self.heads) else []
        return "\n".join(["<table>", *heads, *(row("td", line) for line in self.lines), "</table>"])


def _bars(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def speed_table(records: Sequence[Record], base: str, first: str = "B") -> str:
    """Markdown: median speed by number of sequences and arm, in brackets the ratio to `base`.
    Below it the largest spread of an arm, and why others have no result."""
    good = [record for record in records if not record.error]
    speeds, ratios = median_speeds(good), paired_ratios(good, base)
    arms = list(dict.fromkeys(record.arm for record in records))

    def cell(arm: str, pl: int) -> str:
        speed, ratio = speeds.get((arm, pl)), ratios.get((arm, pl))
        if speed is None:
            return NO_RESULT
        return f"{speed:.1f}" if ratio is None or arm == base else f"{speed:.1f} ({ratio:.3f})"

    counts = sorted({record.pl for record in records})
    lines = [[pl, *(cell(arm, pl) for arm in arms)] for pl in counts]
    text = [Table([first, *arms], lines, text=()).markdown()]
    if good:
        widest = max(spread(good).values())
        text += ["", f"Largest spread of an arm, (max - min) / median: {widest:.0%}"]
    return "\n".join(text + failures(records))


def failures(records: Iterable[Record]) -> list[str]:
    """A line for each arm and reason that there is no result."""
    reasons = dict.fromkeys((r.arm, " ".join(r.error.split())) for r in records if r.error)
    return [f"{arm}: no result: {error[:200]}" for arm, error in reasons]


def in_words(record: Record) -> str:
    """One run, for progress."""
    if record.error:
        return f"{record.arm:<24} no result: {record.error.splitlines()[-1]}"
    return f"{record.arm:<24} {record.speed_tg:8.1f} tok/s"
