"""Views of result rows: medians, paired ratios and a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.schema import Row
from pyllamabatch.compare.medians import median_of, median_speeds, paired_ratios, ranges, spread

__all__ = [
    "failures", "in_words", "median_of", "median_speeds", "paired_ratios", "ranges", "spread",
    "table",
]  # fmt: skip


def failures(rows: Iterable[Row]) -> list[str]:
    """A line per arm and reason that there is no result; the rows have what is cut off here."""
    reasons = dict.fromkeys((row.arm, " ".join(row.error.split())) for row in rows if row.error)
    return [f"{arm}: no result: {error[:200]}" for arm, error in reasons]


def in_words(row: Row) -> str:
    """One row for somebody who watches."""
    if row.error:
        return f"{row.arm:<24} no result: {row.error.splitlines()[-1]}"
    return f"{row.arm:<24} {row.speed_tg:8.1f} t/s"


def table(rows: Sequence[Row], base: str, first: str = "B") -> str:
    """Speed by sequences and arm, median of the repeats; in brackets the ratio to `base`; a dash
    where there is no result.  Below it why, and the largest spread of an arm."""
    good = [row for row in rows if not row.error]
    speeds, ratios = median_speeds(good), paired_ratios(good, base)
    arms = list(dict.fromkeys(row.arm for row in rows))
    widths: Mapping[str, int] = {arm: max(len(arm), 16) for arm in arms}
    lines = [
        f"| {first} | " + " | ".join(f"{arm:>{widths[arm]}}" for arm in arms) + " |",
        "|--:|" + "|".join("-" * (widths[arm] + 1) + ":" for arm in arms) + "|",
    ]
    for pl in sorted({row.pl for row in rows}):
        cells = []
        for arm in arms:
            speed, ratio = speeds.get((arm, pl)), ratios.get((arm, pl))
            if speed is None:
                text = "—"
            elif ratio is None or arm == base:
                text = f"{speed:.1f}"
            else:
                text = f"{speed:.1f} ({ratio:.3f})"
            cells.append(f"{text:>{widths[arm]}}")
        lines.append(f"| {pl} | " + " | ".join(cells) + " |")
    if good:
        widest = max(spread(good).values())
        lines += ["", f"Largest spread of an arm, (max - min) / median: {widest:.0%}"]
    return "\n".join(lines + failures(rows))
