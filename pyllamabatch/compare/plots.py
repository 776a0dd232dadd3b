"""Pictures and a page of compared arms. They need matplotlib, the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamabatch.compare.advice import advice
from pyllamabatch.compare.comparison import EACH, MEMORY, SPEED, Comparison, by_bench
from pyllamabatch.compare.summary import TITLES, cells, notes
from pyllamabatch.errors import ArgumentError
from pyllamabatch.planner.machines import GIB
from pyllamabatch.report import html
from pyllamabatch.report.plots import draw_speeds, over_counts, styled, svg
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".html")
COLOURS = {  # of Okabe and Ito's palette, which the colour-blind tell apart
    "engine": "#d55e00",
    "contexts": "#0072b2",
    "processes": "#e69f00",
    "shared": "#009e73",
    "replicas": "#cc79a7",
    "single": "#666666",
}


def save(records: Sequence[Record], path: Path) -> None:
    """A picture (.png, .svg) or a page (.html) in `path`, by its suffix. ArgumentError for
    another suffix or without records, UnsupportedOperation without matplotlib."""
    check(path)
    if not records:
        raise ArgumentError("records", records, "at least one")
    with styled() as new:
        figure = draw(records, new)
        if path.suffix == ".png":
            figure.savefig(path, dpi=150)
            return
        text = svg(figure)
    path.write_text(page(records, text) if path.suffix == ".html" else text, encoding="utf-8")


def check(path: Path) -> None:
    """What `save` raises for the path, and without matplotlib."""
    if path.suffix not in KINDS:
        raise ArgumentError("plot", str(path), f"must end in {', '.join(KINDS)}")
    with styled():
        pass


def page(records: Sequence[Record], plots: str) -> str:
    """An HTML document: advice, plots, tables and settings. `plots`: SVG text."""
    one = records[0]
    settings = {
        "machine": ", ".join(filter(None, (one.gpu_info, one.cpu_info, f"{one.n_cores} cores"))),
        "system": one.os,
        "llama.cpp": f"{one.build_commit}, {one.backends}",
        "versions": ", ".join(f"{name} {version}" for name, version in one.versions.items()),
        "model": f"{one.model_filename}, {one.model_type}",
        "seed": one.seed,
        "measured": one.test_time,
    }
    parts = [html.paragraphs(advice(records)), html.inline(plots)]
    for bench, them in by_bench(records).items():
        parts += [f"<h2>{TITLES[bench]}</h2>", cells(them).html()]
        parts.append(html.paragraphs("\n".join(notes(them))))
    parts += ["<h2>Settings</h2>", Table(["", ""], list(settings.items())).html()]
    return html.document(f"How to serve N users: {one.model_filename}", *parts)


def draw(records: Sequence[Record], new: type[Figure]) -> Figure:
    """Three panels for each bench. `new`: as `styled` yields it."""
    groups = by_bench(records)
    figure = new(figsize=(10, 3 * len(groups) + 0.3), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
    shown: dict[str, Any] = {}
    for part, (bench, them) in zip(parts, groups.items(), strict=True):
        part.suptitle(TITLES[bench], fontsize=9)
        axes = part.subplots(1, 3)
        for at, (up, name, scale) in zip(axes, panels(them), strict=True):
            if name == SPEED:
                _together(them, at)
            else:
                _lines(them, at, name, scale)
            over_counts(at, them.counts, "users", up)
        for handle, label in zip(*axes[0].get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(
        list(shown.values()), list(shown), loc="outside lower center", ncols=len(shown),
        frameon=False, fontsize=8,
    )  # fmt: skip
    return figure


def panels(them: Comparison) -> list[tuple[str, str, float]]:
    """Label, figure and its factor."""
    name = next((name for name in MEMORY if any(name in r.detail for r in them.good)), "")
    label = f"memory ({MEMORY[name]}), GiB" if name else "memory: not known here"
    memory = (label, name, 1 / GIB)
    if them.at_random:  # the rate of the requests is the speed of every arm
        return [("TTFT, p99, ms", "ttft_p99_s", 1e3), ("ITL, p99, ms", "itl_p99_s", 1e3), memory]
    return [("together, tokens/s", SPEED, 1.0), ("each, tokens/s", EACH, 1.0), memory]


def _together(them: Comparison, at: Axes) -> None:
    """Speeds; a cross at 0 for an arm without a result."""
    draw_speeds(them.good, at, COLOURS)
    if len(them.counts) > 1 and (alone := them.get("single", 1, SPEED)):
        at.axhline(alone, color=COLOURS["single"], lw=0.8, ls="--")
    label: str | None = "no result"
    for n in them.counts:
        for i, arm in enumerate(arm for arm in them.arms if them.problem(arm, n)):
            beside = n * 1.06**i
            at.plot([beside], [0], "x", color=COLOURS[arm], clip_on=False, label=label)
            label = None


def _lines(them: Comparison, at: Axes, name: str, scale: float) -> None:
    """Medians of a figure."""
    for arm in them.arms:
        found = {n: scale * v for n in them.counts if (v := them.get(arm, n, name)) is not None}
        at.plot(list(found), list(found.values()), marker="o", ms=4, label=arm, color=COLOURS[arm])
