"""Reports of runs, side by side: JSONL, Markdown, and one HTML file with the plots in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pyllamabatch.report import html
from pyllamabatch.report.tables import Table

from .metrics import PERCENTILES
from .simulate import Simulated

SCHEMA = 1

Summaries = Mapping[str, Mapping[str, float]]
"""The figures of each run, by its name."""

_TIMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between two tokens",
    "e2el": "end to end",
    "queueing": "queueing",
    "execution": "execution",
    "preemption": "preempted",
}
_PLAIN = {
    "requests": ("requests", "{:.0f}"),
    "rejected": ("rejected, too long", "{:.0f}"),
    "duration": ("duration, s", "{:.1f}"),
    "requests_per_s": ("requests/s", "{:.2f}"),
    "tokens_per_s": ("output tokens/s", "{:.0f}"),
    "total_tokens_per_s": ("tokens/s with prompts", "{:.0f}"),
    "goodput_per_s": ("goodput, requests/s", "{:.2f}"),
    "slo_share": ("keep every target", "{:.1%}"),
    "busy": ("time computing", "{:.1%}"),
    "steps": ("steps", "{:.0f}"),
    "rows_mean": ("rows a step, mean", "{:.1f}"),
    "rows_p50": ("rows a step, median", "{:.0f}"),
    "rows_max": ("rows a step, most", "{:.0f}"),
    "kv_mean": ("KV cells in use, mean", "{:.1%}"),
    "kv_peak": ("KV cells in use, most", "{:.1%}"),
    "prefix_share": ("prompts found in the cache", "{:.1%}"),
    "prefill_rows": ("rows of prompts", "{:.0f}"),
    "recomputed_rows": ("of these computed again", "{:.0f}"),
    "preemptions": ("preemptions", "{:.0f}"),
}


def table(summaries: Summaries) -> Table:
    """A figure a line, a run a column. Times in ms."""
    lines = []
    for name, (label, form) in _PLAIN.items():
        if any(name in figures for figures in summaries.values()):
            lines.append([label, *_cells(summaries, name, form)])
    for name, label in _TIMES.items():
        for level in ("mean", *(f"p{p}" for p in PERCENTILES)):
            key = f"{name}_{level}"
            if any(key in figures for figures in summaries.values()):
                lines.append([f"{label}, {level}, ms", *_cells(summaries, key, "{:.2f}", 1e3)])
    return Table(["", *summaries], lines)


def _cells(summaries: Summaries, name: str, form: str, scale: float = 1.0) -> list[str]:
    return [
        form.format(scale * figures[name]) if name in figures else "–"
        for figures in summaries.values()
    ]


def markdown(summaries: Summaries, title: str) -> str:
    return f"# {title}\n\n{table(summaries).markdown()}\n"


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
    summaries: Summaries, title: str, settings: Mapping[str, Any], plots: Mapping[str, str]
) -> str:
    """An HTML document that needs nothing else. `plots`: SVG text by title."""
    return html.document(
        title,
        table(summaries).html(),
        html.drawings(plots),
        "<h2>Settings</h2>",
        Table(["", ""], list(settings.items())).html(),
    )
