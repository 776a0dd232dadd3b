"""Plots of result rows: speed over the number of sequences, a line per arm."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from bench.schema import Row
from bench.summary import Draw, Setting
from pyllamabatch.report.plots import draw_speeds, over_counts, styled, svg


def draw_all(
    groups: Mapping[Setting, Sequence[Row]], draws: Mapping[str, Draw], folder: Path
) -> dict[Setting, str]:
    """One SVG in `folder`/plots per setting that has several numbers of sequences, by the bench's
    entry in `draws`: their paths from `folder`.  Files of earlier plots that are not made again are
    removed."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    plots: dict[Setting, str] = {}
    for setting, rows in groups.items():
        if setting.bench in draws and len({row.pl for row in rows if not row.error}) > 1:
            plots[setting] = f"plots/{file_name(setting, plots.values())}"
            draws[setting.bench](rows, folder / plots[setting])
    for old in (folder / "plots").glob("*.svg"):
        if f"plots/{old.name}" not in plots.values():
            old.unlink()
    return plots


def file_name(setting: Setting, taken: Collection[str]) -> str:
    """From the setting; two of the same name are counted."""
    words = re.sub(
        r"[^a-z0-9.]+", "-", f"{setting.bench} {setting.model} {setting.short_machine}".lower()
    )
    stem = words.strip("-")
    numbered = (f"{stem}-{i}.svg" for i in itertools.count(2))
    names = itertools.chain([f"{stem}.svg"], numbered)
    return next(name for name in names if f"plots/{name}" not in taken)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Medians, with the smallest and the largest as bars."""
    with styled() as new:
        figure = new(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        draw_speeds(rows, axes)
        counts = sorted({row.pl for row in rows if not row.error})
        over_counts(axes, counts, "sequences", "tokens/s")
        axes.legend(frameon=False, fontsize=8)
        path.write_text(svg(figure), encoding="utf-8")
