"""Records of `pyllamabatch compare` for a reader: a table of each bench, and one in brief."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pyllamabatch.compare.comparison import POISSON, Comparison, by_bench
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import NO_RESULT, Table

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
    repeats; below it notes. A column without a value is left out."""
    parts = []
    for title, them in comparisons(records).items():
        lines = [f"{title}.", "", cells(them).markdown(), *_below(notes(them))]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) or "No records.\n"


def plain(records: Sequence[Record]) -> str:
    """For a terminal: as `table`, and what the time of each arm contains."""
    parts = []
    for title, them in comparisons(records).items():
        parts += [f"{title}.", "", cells(them).plain(), *_below(notes(them)), ""]
    includes = {record.arm: record.includes for record in records}
    parts += ["What each time contains:", *(f"- {arm}: {text}" for arm, text in includes.items())]
    return "\n".join(parts) + "\n"


def _below(lines: Sequence[str]) -> list[str]:
    return ["", *(f"- {line}" for line in lines)] if lines else []


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


def notes(them: Comparison) -> list[str]:
    """Why an arm has no result, and where arms had CPU threads of different numbers."""
    lines = [
        f"{arm}, N = {n}, has no result: {why}"
        for n in them.counts
        for arm in them.arms
        if (why := them.problem(arm, n))
    ]
    for n in them.counts:
        each = {arm: int(them.detail(arm, n, "n_threads_each") or 0) for arm in them.arms}
        many = [arm for arm in each if arm.split()[0] in ("processes", "contexts") and each[arm]]
        one = [arm for arm in each if arm not in many and each[arm]]
        if any(n * each[a] != each[b] for a in many for b in one):
            counts = [f"{arm} {n} × {each[arm]}" for arm in many]
            counts += [f"{arm} {each[arm]}" for arm in one]
            lines.append(f"CPU threads at N = {n}: {', '.join(counts)}")
    return lines
