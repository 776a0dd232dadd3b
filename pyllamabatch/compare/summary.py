"""Records of `pyllamabatch compare` for a reader: a table of each bench."""

from collections.abc import Iterable, Sequence

from pyllamabatch.compare.arms import EACH_ITS_OWN
from pyllamabatch.compare.comparison import EACH, JOULES, SPEED, Comparison, by_bench
from pyllamabatch.compare.workload import BENCHES, BURST, DS4, POISSON
from pyllamabatch.planner.machines import GIB
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import NO_RESULT, Table

TITLES = {
    BENCHES[BURST]: "All at once, decode only: prompts and first tokens are not in the time",
    BENCHES[DS4]: "Identical completions, fired at once: prompts are in the time",
    BENCHES[POISSON]: "Requests that come at random (Poisson): prompts are in the time",
}
BASES: dict[str, tuple[str, int | None]] = {
    "over contexts": ("contexts", None),
    "over single": ("single", 1),
}
"""Ratios of speeds. Not where requests come at random: their rate is the speed of every arm."""
COLUMNS = (
    ("tok/s", ".1f", SPEED, 1.0),
    ("over contexts", ".2f", "over contexts", 1.0),
    ("over single", ".2f", "over single", 1.0),
    ("each, tok/s", ".1f", EACH, 1.0),
    ("TTFT p50, ms", ".0f", "ttft_p50_s", 1e3),
    ("p99", ".0f", "ttft_p99_s", 1e3),
    ("ITL p50, ms", ".1f", "itl_p50_s", 1e3),
    ("p99", ".1f", "itl_p99_s", 1e3),
    ("fairness", ".2f", "fairness", 1.0),
    ("RSS, GiB", ".2f", "rss_bytes", 1 / GIB),
    ("PSS, GiB", ".2f", "pss_bytes", 1 / GIB),
    ("footprint, GiB", ".2f", "footprint_bytes", 1 / GIB),
    ("device, GiB", ".2f", "device_bytes", 1 / GIB),
    ("J/token", ".2f", JOULES, 1.0),
)
"""Head, format, figure and its factor."""


def table(records: Iterable[Record]) -> str:
    """Markdown of every bench: a line for each number of users and arm, with medians over
    repeats; below it notes. A column without a value is left out."""
    parts = []
    for bench, them in by_bench(records).items():
        lines = [f"{TITLES[bench]}.", "", cells(them).markdown(), *_below(notes(them))]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) or "No records.\n"


def plain(records: Sequence[Record]) -> str:
    """For a terminal: as `table`, and what the time of each arm contains."""
    parts = []
    for bench, them in by_bench(records).items():
        parts += [f"{TITLES[bench]}.", "", cells(them).plain(), *_below(notes(them)), ""]
    includes = {record.arm: record.includes for record in records}
    parts += ["What each time contains:", *(f"- {arm}: {text}" for arm, text in includes.items())]
    return "\n".join(parts) + "\n"


def _below(lines: Sequence[str]) -> list[str]:
    return ["", *(f"- {line}" for line in lines)] if lines else []


def cells(them: Comparison) -> Table:
    def cell(arm: str, n: int, form: str, name: str, scale: float) -> str:
        if name in BASES:
            value = None if them.at_random else them.ratio(arm, n, *BASES[name])
        else:
            value = them.get(arm, n, name)
        return "" if value is None else format(value * scale, form)

    asked = dict.fromkeys((r.pl, r.arm) for r in them.records)
    rows = sorted(asked, key=lambda row: (row[0], them.arms.index(row[1])))
    columns = [
        [head, *(cell(arm, n, form, name, scale) for n, arm in rows)]
        for head, form, name, scale in COLUMNS
    ]
    speed, *others = columns
    used = [[text or NO_RESULT for text in speed], *(c for c in others if any(c[1:]))]
    heads, *lines = zip(*used, strict=True)
    named = [[n, arm, *line] for (n, arm), line in zip(rows, lines, strict=True)]
    return Table(["N", "arm", *heads], named, text=(1,))


def notes(them: Comparison) -> list[str]:
    """Why an arm has no result, and where arms had CPU threads of different numbers."""
    lines = [
        f"{arm}, N = {n}, has no result: {why}"
        for n in them.counts
        for arm in them.arms
        if (why := them.problem(arm, n))
    ]
    for n in them.counts:
        threads = them.all(n, "n_threads_each")
        times = {arm: n if arm in EACH_ITS_OWN else 1 for arm in threads}
        if len({times[arm] * each for arm, each in threads.items()}) > 1:
            words = {arm: f"{n} × " if times[arm] > 1 else "" for arm in threads}
            counts = [f"{arm} {words[arm]}{each:.0f}" for arm, each in threads.items()]
            lines.append(f"CPU threads at N = {n}: {', '.join(counts)}")
    return lines
