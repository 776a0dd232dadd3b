"""Runs side by side: a table, who wins, JSONL with every figure, and a page with plots."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pyllamabatch.report import html
from pyllamabatch.report.plots import styled, svg
from pyllamabatch.report.tables import NO_RESULT, Table
from pyllamabatch.sim.simulate import Simulated

SCHEMA = 1
WIN = 0.02  # a smaller difference is none

Summaries = Mapping[str, Mapping[str, float]]
"""The figures of each run, by its policy."""

SHOWN = {
    "rejected": ("rejected, too long", "{:.0f}"),
    "deadlines": ("ended by their deadline", "{:.0f}"),
    "goodput_per_s": ("goodput, requests/s", "{:.2f}"),
    "tokens_per_s": ("output tokens/s", "{:.0f}"),
    **{
        f"{name}_p{p}": (f"{name.upper()} p{p}, ms", "ms")
        for name in ("ttft", "itl", "e2el")
        for p in (50, 99)
    },
    "preemptions": ("preemptions", "{:.0f}"),
    "drafted_tokens": ("drafted tokens", "{:.0f}"),
    "accepted_tokens": ("of these right", "{:.0f}"),
    "prefix_share": ("prompts found in the cache", "{:.1%}"),
}
"""The figures of the table: label, and format or "ms" for a time. JSONL has all figures."""

CONTEST = {"goodput_per_s": 1, "tokens_per_s": 1, "ttft_p99": -1, "itl_p99": -1, "e2el_p50": -1}
"""Figures that policies are compared by: 1 where more is better, -1 where less is."""


def table(summaries: Summaries) -> Table:
    """A figure a line, a run a column. A figure that is 0 or missing in every run is left out."""
    lines = [["overloaded", *("yes" if f.get("overloaded") else "no" for f in summaries.values())]]
    lines += [
        [label, *(_cell(figures.get(name), form) for figures in summaries.values())]
        for name, (label, form) in SHOWN.items()
        if any(figures.get(name) for figures in summaries.values())
    ]
    return Table(["", *summaries], lines)


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return NO_RESULT
    return f"{1e3 * value:.2f}" if form == "ms" else form.format(value)


def verdict(summaries: Summaries) -> list[str]:
    """Sentences: which policy wins by each figure of `CONTEST`."""
    words = []
    for name, sign in CONTEST.items():
        found = {run: figures[name] for run, figures in summaries.items() if name in figures}
        if len(found) < 2:
            continue
        best, second, *_ = sorted(found, key=lambda run: -sign * found[run])
        more, less = sorted((found[best], found[second]), reverse=True)
        label, form = SHOWN[name]
        if more <= (1 + WIN) * less:
            words.append(f"{label}: no winner, {best} and {second} are within {WIN:.0%}.")
        else:
            shown = _cell(found[best], form), _cell(found[second], form)
            words.append(f"{label}: {best} wins with {shown[0]}; next is {second} with {shown[1]}.")
    return words


def markdown(summaries: Summaries, title: str) -> str:
    words = "\n".join(f"- {line}" for line in verdict(summaries))
    return f"# {title}\n\n{table(summaries).markdown()}\n" + (f"\n{words}\n" if words else "")


def jsonl(
    runs: Sequence[Simulated], summaries: Summaries, settings: Mapping[str, Any]
) -> Iterator[str]:
    """Lines: the settings, then of each run its figures and every request."""
    yield json.dumps({"kind": "settings", "schema": SCHEMA, **settings})
    for run in runs:
        yield json.dumps({"kind": "summary", "policy": run.policy, **summaries[run.policy]})
        for outcome in run.outcomes:
            yield json.dumps({"kind": "request", "policy": run.policy, **asdict(outcome)})


def page(
    runs: Sequence[Simulated], summaries: Summaries, title: str, settings: Mapping[str, Any]
) -> str:
    """An HTML document with plots. UnsupportedOperation without matplotlib."""
    return html.document(
        title,
        table(summaries).html(),
        html.paragraphs("\n".join(verdict(summaries))),
        html.drawings(plots(runs)),
        "<h2>Settings</h2>",
        Table(["", ""], list(settings.items()), text=(0, 1)).html(),
    )


def plots(runs: Sequence[Simulated]) -> dict[str, str]:
    """SVG text by title: shares of requests by their times, and the first replica's curves."""
    with styled() as new:
        shares = new(figsize=(9, 3.2), layout="constrained")
        columns = shares.subplots(1, 3, sharey=True)
        for at, name in zip(columns, ("ttft", "tpot", "e2el"), strict=True):
            for run in runs:
                times = (getattr(o, name) for o in run.outcomes if not o.rejected)
                found = np.sort([1e3 * time for time in times if time is not None])
                share = np.arange(1, len(found) + 1) / max(len(found), 1)
                at.plot(found, share, drawstyle="steps-post", lw=1.2, label=run.policy)
            at.set(xlabel=f"{name.upper()}, ms", ylim=(0, 1))
        shares.axes[0].set_ylabel("share of requests")
        labels = shares.axes[0].get_legend_handles_labels()
        shares.legend(*labels, loc="outside lower center", ncols=4, frameon=False)
        curves = new(figsize=(9, 1.2 + 1.4 * len(runs)), layout="constrained")
        grid = curves.subplots(len(runs), 3, sharex=True, sharey="col", squeeze=False)
        for run, axes in zip(runs, grid, strict=True):
            times, *values_of = np.array(run.loads[0].points).reshape(-1, 4).T
            for at, values in zip(axes, values_of, strict=True):
                at.plot(times, values, lw=0.8)
                at.set_ylim(bottom=0)
            axes[0].set_ylabel(run.policy)
        for at, label in zip(grid[0], ("running", "waiting", "KV cells held"), strict=True):
            at.set_title(label)
        for at in grid[-1]:
            at.set_xlabel("s")
        for at in (*shares.axes, *curves.axes):
            at.grid(alpha=0.3)
        return {"Requests by their times": svg(shares), "Over time, first replica": svg(curves)}
