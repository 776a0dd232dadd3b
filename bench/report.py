"""Views of result rows: medians, paired ratios and a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from bench.schema import Row


def median_speeds(rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """Median `speed_tg` by (arm, pl)."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.pl), []).append(row.speed_tg)
    return {key: median(values) for key, values in groups.items()}


def paired_ratios(rows: Iterable[Row], base: str) -> dict[tuple[str, int], float]:
    """Median over repeats of speed_tg / (speed_tg of `base` in the same repeat and at the same pl).

    Runs of one repeat are neighbours in time, so a machine that slows down for a while moves both
    sides of a ratio.  A repeat without the base is left out.
    """
    rows = list(rows)
    bases = {(r.run_id, r.repeat, r.pl): r.speed_tg for r in rows if r.arm == base}
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        reference = bases.get((row.run_id, row.repeat, row.pl))
        if reference:
            groups.setdefault((row.arm, row.pl), []).append(row.speed_tg / reference)
    return {key: median(values) for key, values in groups.items()}


def spread(rows: Iterable[Row]) -> dict[tuple[str, int], float]:
    """(largest - smallest) / median of `speed_tg` by (arm, pl)."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row.arm, row.pl), []).append(row.speed_tg)
    return {key: (max(v) - min(v)) / median(v) for key, v in groups.items()}


def decode_table(rows: Sequence[Row], base: str) -> str:
    """Decode speed by sequences (B) and arm; in brackets the ratio to `base`."""
    speeds, ratios = median_speeds(rows), paired_ratios(rows, base)
    arms = list(dict.fromkeys(row.arm for row in rows))
    widths: Mapping[str, int] = {arm: max(len(arm), 16) for arm in arms}
    lines = [
        "| B | " + " | ".join(f"{arm:>{widths[arm]}}" for arm in arms) + " |",
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
    return "\n".join(lines)
