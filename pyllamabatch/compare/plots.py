"""Plots of compared arms: speed of all and of each over N, memory over N; one page with the table,
the plots and the advice. Needs matplotlib: `pip install pyllamabatch[plots]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamabatch.compare import html as _html
from pyllamabatch.compare.advice import GIB, memory_kind
from pyllamabatch.compare.figures import styled, svg
from pyllamabatch.compare.medians import Comparison, ranges
from pyllamabatch.compare.row import Row
from pyllamabatch.compare.summary import POISSON, TITLES, advice, comparisons, tables
from pyllamabatch.errors import ArgumentError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".html")
COLOURS = {
    "engine": "#d55e00",
    "contexts": "#0072b2",
    "processes": "#e69f00",
    "shared": "#009e73",
    "single": "#666666",
}
"""Of Okabe and Ito's palette, which also those tell apart who see fewer colours."""
LINES = ("-", "--", ":", "-.")
"""Of an arm's variants: those with another sampler."""

Panel = Callable[[Comparison, "Axes"], None]


def save(rows: Sequence[Row], path: Path) -> None:
    """A picture (.png, .svg) or a page (.html) in `path`, by its suffix. Raises ArgumentError for
    another suffix or without rows, UnsupportedOperation without matplotlib."""
    check(path)
    if not rows:
        raise ArgumentError("rows", rows, "must be one at least")
    with styled() as new:
        figure = draw(rows, new)
        if path.suffix == ".png":
            figure.savefig(path, dpi=150)
            return
        text = svg(figure)
    path.write_text(page(rows, text) if path.suffix == ".html" else text, encoding="utf-8")


def check(path: Path) -> None:
    """What `save` raises for the path, and without matplotlib."""
    if path.suffix not in KINDS:
        raise ArgumentError("path", str(path), f"must end in {', '.join(KINDS)}")
    with styled():
        pass


def page(rows: Sequence[Row], plots: str) -> str:
    """An HTML document that needs nothing else; `plots`: SVG text."""
    row = rows[0]
    settings = {
        "machine": ", ".join(filter(None, (row.gpu_info, row.cpu_info, f"{row.n_cores} cores"))),
        "system": row.os,
        "llama.cpp": f"{row.build_commit}, {row.backends}",
        "versions": ", ".join(f"{name} {version}" for name, version in row.versions.items()),
        "model": f"{row.model_filename}, {row.model_type}",
        "seed": row.seed,
        "measured": row.test_time,
    }
    parts = [_html.paragraphs(advice(rows)), plots[plots.index("<svg") :]]
    for title, (heads, lines) in tables(rows).items():
        parts += [f"<h2>{title}</h2>", _html.table(lines, heads)]
    parts += ["<h2>Settings</h2>", _html.table(settings.items())]
    return _html.document(f"How to serve N users: {row.model_filename}", *parts)


def draw(rows: Sequence[Row], new: type[Figure]) -> Figure:
    """A line of panels for each bench. `new`: as `styled` yields it."""
    groups = comparisons(rows)
    figure = new(figsize=(10, 3 * len(groups) + 0.3), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    shown: dict[str, Any] = {}
    for part, (bench, them) in zip(parts, groups.items(), strict=True):
        part.suptitle(TITLES.get(bench, bench), fontsize=9)
        axes = part.subplots(1, 3)
        for at, panel in zip(axes, panels(bench, them), strict=True):
            panel(them, at)
            at.set_xscale("log", base=2)
            at.set_xticks(them.counts, [str(count) for count in them.counts])
            at.minorticks_off()
            at.set_xlabel("users")
            at.set_ylim(bottom=0)
            at.grid(alpha=0.3)
        for handle, label in zip(*axes[0].get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=len(shown),
        frameon=False, fontsize=8,
    )  # fmt: skip
    return figure


def panels(bench: str, them: Comparison) -> tuple[Panel, Panel, Panel]:
    if bench == POISSON:  # how fast all are is how fast they come
        return (
            partial(_lines, name="ttft_p99_s", scale=1e3, label="TTFT, p99, ms"),
            partial(_lines, name="itl_p99_s", scale=1e3, label="ITL, p99, ms"),
            _memory,
        )
    each = "per_sequence_tokens_per_second"
    return (_together, partial(_lines, name=each, scale=1.0, label="each, tokens/s"), _memory)


def _together(them: Comparison, at: Axes) -> None:
    """Medians, the smallest and the largest as bars; arms without a result are crosses at 0."""
    extremes = ranges(them.good)
    for arm in them.arms:
        found = {n: s for n in them.counts if (s := them.speed(arm, n)) is not None}
        below = [s - extremes[arm, n][0] for n, s in found.items()]
        above = [extremes[arm, n][1] - s for n, s in found.items()]
        colour, line = _look(arm, them.arms)
        at.errorbar(
            list(found), list(found.values()), (below, above),
            marker="o", ms=4, capsize=2, color=colour, ls=line, label=arm,
        )  # fmt: skip
        if arm.split()[0] == "single" and len(them.counts) > 1:
            for speed in found.values():
                at.axhline(speed, color=colour, lw=0.8, ls="--")
    failed = [(n, arm) for n in them.counts for arm in them.arms if them.problem(arm, n)]
    for i, (n, arm) in enumerate(failed):
        beside = n * 1.06 ** [a for m, a in failed if m == n].index(arm)
        label = "no result" if i == 0 else None
        at.plot([beside], [0], "x", color=_look(arm, them.arms)[0], clip_on=False, label=label)
    at.set_ylabel("together, tokens/s")


def _lines(them: Comparison, at: Axes, *, name: str, scale: float, label: str) -> None:
    """Medians of a detail."""
    for arm in them.arms:
        found = {n: v for n in them.counts if (v := them.detail(arm, n, name)) is not None}
        colour, line = _look(arm, them.arms)
        values = [scale * value for value in found.values()]
        at.plot(list(found), values, marker="o", ms=4, color=colour, ls=line, label=arm)
    at.set_ylabel(label)


def _memory(them: Comparison, at: Axes) -> None:
    name, words = memory_kind(them)
    if name:
        _lines(them, at, name=name, scale=1 / GIB, label=f"memory ({words}), GiB")
    else:
        at.set_ylabel("memory: not known here")


def _look(arm: str, arms: Sequence[str]) -> tuple[str, str]:
    """Colour and line."""
    kind = arm.split()[0]
    place = [other for other in arms if other.split()[0] == kind].index(arm)
    return COLOURS.get(kind, "#000000"), LINES[place % len(LINES)]
