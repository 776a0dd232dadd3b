"""Rows of `pyllamabatch compare` for somebody who reads: a table, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyllamabatch.compare.advice import advice, memory_kind
from pyllamabatch.compare.medians import Comparison, by_bench
from pyllamabatch.compare.row import Row

__all__ = ["advice", "brief", "table"]

POISSON = "compare-poisson"
TITLES = {
    "compare": "All at once, decode only: prompts and first tokens are not in the time",
    "compare-ds4": "Identical completions, fired at once: prompts are in the time",
    POISSON: "Requests that come at random (Poisson): prompts are in the time",
}
GIB = 2**30

Value = Callable[[Comparison, str, int], "float | None"]


def _of(name: str, scale: float = 1.0) -> Value:
    def value(them: Comparison, arm: str, n: int) -> float | None:
        found = them.detail(arm, n, name)
        return None if found is None else found * scale

    return value


def _over(base: str, base_n: int | None = None) -> Value:
    """Not where requests come at random: how fast all are is how fast they come."""

    def value(them: Comparison, arm: str, n: int) -> float | None:
        return None if them.bench == POISSON else them.ratio(arm, n, base, base_n)

    return value


COLUMNS: tuple[tuple[str, str, Value], ...] = (
    ("tok/s", "{:.1f}", lambda them, arm, n: them.speed(arm, n)),
    ("over contexts", "{:.2f}", _over("contexts")),
    ("over single", "{:.2f}", _over("single", 1)),
    ("each, tok/s", "{:.1f}", _of("per_sequence_tokens_per_second")),
    ("TTFT p50, ms", "{:.0f}", _of("ttft_p50_s", 1e3)),
    ("p99", "{:.0f}", _of("ttft_p99_s", 1e3)),
    ("ITL p50, ms", "{:.1f}", _of("itl_p50_s", 1e3)),
    ("p99", "{:.1f}", _of("itl_p99_s", 1e3)),
    ("fairness", "{:.2f}", _of("fairness")),
    ("RSS, GiB", "{:.2f}", _of("rss_bytes", 1 / GIB)),
    ("PSS, GiB", "{:.2f}", _of("pss_bytes", 1 / GIB)),
    ("footprint, GiB", "{:.2f}", _of("footprint_bytes", 1 / GIB)),
    ("wired, GiB", "{:.2f}", _of("wired_bytes", 1 / GIB)),
    ("device, GiB", "{:.2f}", _of("device_bytes", 1 / GIB)),
    ("J/token", "{:.2f}", lambda them, arm, n: them.joules_per_token(arm, n)),
)


def table(rows: Iterable[Row]) -> str:
    """Markdown: of each bench a table with a line for each number of users and arm. Medians over
    repeats; ratios are medians of pairs in one repeat. A column that no row has is left out, and
    why an arm has no result stands in its line."""
    parts = []
    for title, (heads, lines) in tables(rows).items():
        rule = "|--:|---|" + "--:|" * (len(heads) - 2)
        parts.append("\n".join([f"{title}.", "", _line(heads), rule, *map(_line, lines)]) + "\n")
    return "\n".join(parts) or "No rows.\n"


def brief(rows: Iterable[Row]) -> str:
    """Markdown of one bench: a line for each arm, a column for each N: tokens/s of all together, in
    brackets the ratio to contexts; and what the arm takes of memory at the largest N."""
    them = Comparison(list(rows))
    memory, words = memory_kind(them)
    last = max(them.counts)
    heads = ["tok/s together", *map(str, them.counts)]
    if memory:
        heads.append(f"GiB ({words}) at {last}")
    lines = [_line(heads), "|---|" + "--:|" * (len(heads) - 1)]
    for arm in them.arms:
        cells = [_speed_cell(them, arm, n) for n in them.counts]
        if memory:
            size = them.detail(arm, last, memory)
            cells.append("" if size is None else f"{size / GIB:.2f}")
        lines.append(_line([arm, *cells]))
    return "\n".join(lines) + "\n"


def _speed_cell(them: Comparison, arm: str, n: int) -> str:
    speed, over = them.speed(arm, n), them.ratio(arm, n, "contexts")
    if speed is None:
        return "—" if them.problem(arm, n) else ""
    return f"{speed:.4g}" if over is None or arm == "contexts" else f"{speed:.4g} ({over:.2f})"


def tables(rows: Iterable[Row]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The same as cells: heads and lines by title."""
    return {TITLES.get(bench, bench): _cells(them) for bench, them in comparisons(rows).items()}


def comparisons(rows: Iterable[Row]) -> dict[str, Comparison]:
    """By bench, in the order of `TITLES`, others behind."""
    names = list(TITLES)
    groups = by_bench(rows)
    known = sorted(groups, key=lambda name: names.index(name) if name in names else len(names))
    return {bench: groups[bench] for bench in known}


def _cells(them: Comparison) -> tuple[list[str], list[list[str]]]:
    lines = [
        (n, arm, [value(them, arm, n) for _, _, value in COLUMNS])
        for n in them.counts
        for arm in them.arms
        if any((row.arm, row.pl) == (arm, n) for row in them.rows)
    ]
    used = [i for i in range(len(COLUMNS)) if any(v[i] is not None for _, _, v in lines)]
    used = used or [0]  # nobody has a result: the reasons want a column
    text = []
    for n, arm, values in lines:
        cells = ["" if values[i] is None else COLUMNS[i][1].format(values[i]) for i in used]
        if why := them.problem(arm, n):
            cells[0] = f"— {why}"
        text.append([str(n), arm, *cells])
    return ["N", "arm", *(COLUMNS[i][0] for i in used)], text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
