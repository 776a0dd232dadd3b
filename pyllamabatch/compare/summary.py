"""Records of `pyllamabatch compare` for a reader: a table of each bench, and one in brief."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyllamabatch.compare.advice import advice, memory_kind
from pyllamabatch.compare.comparison import POISSON, Comparison, by_bench
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import NO_RESULT, Table

__all__ = ["advice", "brief", "table"]

GIB = 2**30
TITLES = {
    "compare": "All at once, decode only: prompts and first tokens are not in the time",
    "compare-ds4": "Identical completions, fired at once: prompts are in the time",
    POISSON: "Requests that come at random (Poisson): prompts are in the time",
}

Value = Callable[[Comparison, str, int], "float | None"]


def _of(name: str, scale: float = 1.0) -> Value:
    def value(them: Comparison, arm: str, n: int) -> float | None:
        found = them.detail(arm, n, name)
        return None if found is None else found * scale

    return value


def _over(base: str, base_n: int | None = None) -> Value:
    """Not where requests come at random: their rate is the speed of every arm."""
    return lambda them, arm, n: None if them.bench == POISSON else them.ratio(arm, n, base, base_n)


COLUMNS: tuple[tuple[str, str, Value], ...] = (
    ("tok/s", "{:.1f}", Comparison.speed),
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
    ("J/token", "{:.2f}", Comparison.joules_per_token),
)


def comparisons(records: Iterable[Record]) -> dict[str, Comparison]:
    """By title, in the order of `TITLES`, other benches behind."""
    groups = by_bench(records)
    names = [name for name in TITLES if name in groups]
    names += [name for name in groups if name not in TITLES]
    return {TITLES.get(name, name): groups[name] for name in names}


def table(records: Iterable[Record]) -> str:
    """Markdown of every bench: a line for each number of users and arm, with medians over
    repeats, and why an arm has no result. A column without a value is left out."""
    parts = []
    for title, them in comparisons(records).items():
        parts.append("\n".join([f"{title}.", "", cells(them).markdown(), *problems(them)]) + "\n")
    return "\n".join(parts) or "No records.\n"


def cells(them: Comparison) -> Table:
    lines = [
        (n, arm, [value(them, arm, n) for _, _, value in COLUMNS])
        for n in them.counts
        for arm in them.arms
        if any((record.arm, record.pl) == (arm, n) for record in them.records)
    ]
    used = [i for i in range(len(COLUMNS)) if i == 0 or any(v[i] is not None for _, _, v in lines)]
    text = []
    for n, arm, values in lines:
        words = ["" if (v := values[i]) is None else COLUMNS[i][1].format(v) for i in used]
        text.append([n, arm, words[0] or NO_RESULT, *words[1:]])
    return Table(["N", "arm", *(COLUMNS[i][0] for i in used)], text, text=(1,))


def problems(them: Comparison) -> list[str]:
    """A line for each arm that has no result."""
    found = [
        f"- {arm}, N = {n}: {why}"
        for n in them.counts
        for arm in them.arms
        if (why := them.problem(arm, n))
    ]
    return ["", "Without a result:", *found] if found else []


def brief(records: Iterable[Record]) -> str:
    """Markdown of one bench: a line for each arm, with the speed of all together at each N and in
    brackets the ratio to contexts; and the arm's memory at the largest N."""
    them = Comparison(list(records))
    memory, words = memory_kind(them)
    last = max(them.counts)
    heads = ["tok/s together", *map(str, them.counts)]
    lines = [[arm, *(_speed_cell(them, arm, n) for n in them.counts)] for arm in them.arms]
    if memory:
        heads.append(f"GiB ({words}) at {last}")
        for line in lines:
            size = them.detail(line[0], last, memory)
            line.append("" if size is None else f"{size / GIB:.2f}")
    return Table(heads, lines).markdown() + "\n"


def _speed_cell(them: Comparison, arm: str, n: int) -> str:
    speed, over = them.speed(arm, n), them.ratio(arm, n, "contexts")
    if speed is None:
        return NO_RESULT if them.problem(arm, n) else ""
    return f"{speed:.4g}" if over is None or arm == "contexts" else f"{speed:.4g} ({over:.2f})"
