"""Tables of text cells, as Markdown, as plain text and as HTML."""

import html
from collections.abc import Collection, Sequence
from dataclasses import dataclass

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


def in_words(record: Record) -> str:
    """One run, for progress."""
    if record.error:
        return f"{record.arm:<24} no result: {record.error.splitlines()[-1]}"
    return f"{record.arm:<24} {record.speed_tg:8.1f} tok/s"
