"""Plots of runs, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyllamabatch.report.plots import styled, svg

from .simulate import Simulated

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(runs: Sequence[Simulated]) -> dict[str, str]:
    """SVG text by title: shares of requests by their times, and what ran over time (of the first
    replica). UnsupportedOperation without matplotlib."""
    drawn = {}
    with styled() as new:
        for title, fill in (("Requests by their times", _shares), ("Over time", _over_time)):
            figure = new(figsize=(9, 3), layout="constrained")
            fill(runs, figure.subplots(1, 3))
            drawn[title] = svg(figure)
    return drawn


def _shares(runs: Sequence[Simulated], axes: Sequence[Axes]) -> None:
    for at, (name, label) in zip(
        axes, (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2el", "E2EL")), strict=True
    ):
        for run in runs:
            times = (getattr(o, name) for o in run.outcomes if not o.rejected)
            found = np.sort([t for t in times if t is not None])
            if len(found):
                share = np.arange(1, len(found) + 1) / len(found)
                at.plot(1e3 * found, share, drawstyle="steps-post", lw=1.2, label=run.policy)
        at.set_xlabel(f"{label}, ms")
        at.set_ylim(0, 1)
        at.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(frameon=False, fontsize=8)


def _over_time(runs: Sequence[Simulated], axes: Sequence[Axes]) -> None:
    labels = ("requests that run", "requests that wait", "KV cells in use")
    for i, (at, label) in enumerate(zip(axes, labels, strict=True), 1):
        for run in runs:
            points = run.points[0]
            times, values = [p[0] for p in points], [p[i] for p in points]
            at.plot(times, values, lw=0.8, label=run.policy)
        at.set_xlabel("s")
        at.set_title(label, fontsize=9)
        at.set_ylim(bottom=0)
        at.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
