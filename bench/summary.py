"""`python -m bench report`: Markdown and plots of result rows, the same for the same rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import report, schema
from bench.cache import RESULTS
from bench.schema import Row
from bench.targets import Target

View = Callable[[Sequence[Row]], str]
"""Markdown of the rows of one setting."""
Draw = Callable[[Sequence[Row], Path], None]
"""Their plot, into an SVG file."""


@dataclass(frozen=True)
class Shown:
    """What the report needs of a bench."""

    about: str
    targets: tuple[Target, ...]
    view: View
    draw: Draw | None = None
    names: tuple[str, ...] = ()
    """What its rows call it, where that is not its own name alone."""


@dataclass(frozen=True, order=True)
class Setting:
    """Rows with the same setting belong into one table."""

    bench: str
    machine: str
    model: str
    work: str
    settings: str

    @property
    def short_machine(self) -> str:
        """The processor's name that matters."""
        return self.machine.split(" (")[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "rows", nargs="*", type=Path, help="JSONL files or folders of them (bench/results)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for README.md and plots/ (that of the rows)"
    )
    parser.add_argument("--no-plots", action="store_true", help="Markdown only")


def main(options: argparse.Namespace, benches: Mapping[str, Shown]) -> int:
    sources: list[Path] = options.rows or [RESULTS]
    missing = [str(path) for path in sources if not path.exists()]
    if missing:
        raise SystemExit(f"no such file or folder: {', '.join(missing)}")
    files = [
        file
        for path in sources
        for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])
    ]
    first = sources[0]
    folder: Path = options.out or (first if first.is_dir() else first.parent)
    rows = [row for file in files for row in schema.read(file)]
    groups = latest(rows)
    plots: dict[Setting, str] = {}
    if not options.no_plots:
        from bench.plots import draw_all

        drawn = {
            word: shown.draw
            for name, shown in benches.items()
            for word in shown.names or (name,)
            if shown.draw
        }
        plots = draw_all(groups, drawn, folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "README.md"
    page.write_text(markdown(groups, plots, benches), encoding="utf-8")
    print(page)
    return 0


def latest(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """Rows by setting, and of each number of sequences those of the latest run that has it, among
    those with the most arms.

    A run is one invocation of a bench: its arms are compared with each other and with nothing
    else, so a later run replaces an earlier one whole.
    """
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row.run_id, row.bench), []).append(row)
    chosen: dict[tuple[Setting, tuple[int, bool]], list[Row]] = {}
    for run in sorted(runs.values(), key=lambda run: (run[0].test_time, run[0].run_id)):
        setting = setting_of(run)
        loads: dict[tuple[int, bool], list[Row]] = {}
        for row in run:  # `width`: n clients are another load than n streams
            loads.setdefault((row.pl, bool(row.detail.get("mixed"))), []).append(row)
        for load, mine in loads.items():
            if n_arms(mine) >= n_arms(chosen.get((setting, load), ())):
                chosen[setting, load] = mine
    groups: dict[Setting, list[Row]] = {}
    for setting, load in sorted(chosen):
        groups.setdefault(setting, []).extend(chosen[setting, load])
    return groups


def n_arms(rows: Iterable[Row]) -> int:
    return len({row.arm for row in rows})


def setting_of(run: Sequence[Row]) -> Setting:
    row = run[0]
    machine = f"{row.cpu_info}, {row.n_cores} cores, {row.os}"
    cells = "/".join(sorted({"unified" if row.kv_unified else "streams" for row in run}))
    sampling = "/".join(sorted({row.sampling for row in run} - {"none"})) or "none"
    settings = [f"sampling {sampling}"]
    if row.pp:
        settings.insert(0, f"KV {cells}, {max(row.n_threads for row in run)} threads")
    return Setting(
        bench=row.bench,
        machine=f"{row.gpu_info} ({machine})" if row.gpu_info else machine,
        model=row.model_filename.removesuffix(".gguf"),
        work=f"{row.pp} prompt tokens, {row.tg} tokens" if row.pp else "no prompt",
        settings=", ".join(settings),
    )


def markdown(
    groups: Mapping[Setting, Sequence[Row]],
    plots: Mapping[Setting, str],
    benches: Mapping[str, Shown],
) -> str:
    lines = [
        "# Results",
        "",
        "Made by `python -m bench report` from the JSONL files in this folder; every row there "
        "names its machine, build, model and seeds. Figures of one table come from the same runs; "
        "tables of different machines or dates are not to be compared.",
    ]
    for name, shown in benches.items():
        names = shown.names or (name,)
        mine = {setting: rows for setting, rows in groups.items() if setting.bench in names}
        lines += ["", f"## {name}", "", shown.about]
        lines += targets_table(shown.targets, mine)
        for setting, rows in mine.items():
            lines += ["", f"### {setting.model}: {setting.machine}", ""]
            lines += [f"{setting.work}, {setting.settings}. {origin(rows)}", ""]
            if setting in plots:
                lines += [f"![{setting.model}]({plots[setting]})", ""]
            lines.append(shown.view(rows))
    known = {word for name, shown in benches.items() for word in shown.names or (name,)}
    unknown = sorted({setting.bench for setting in groups} - known)
    if unknown:
        lines += ["", f"Rows of benches that this code does not have: {', '.join(unknown)}."]
    return "\n".join(lines) + "\n"


def targets_table(targets: Sequence[Target], groups: Mapping[Setting, Sequence[Row]]) -> list[str]:
    """A line per target and setting that has its figure, or one that says "not measured"."""
    if not targets:
        return []
    lines = ["", "| target | limit | measured | | setting |", "|---|--:|--:|---|---|"]
    for target in targets:
        found = [
            (setting, value)
            for setting, rows in groups.items()
            if (value := target.measured(rows)) is not None
        ]
        if not found:
            lines.append(f"| {target.text} | {target.limit} | not measured | | |")
        for setting, value in found:
            met = "met" if target.met_by(value) else "**missed**"
            where = f"{setting.short_machine}; {setting.work}, {setting.settings}"
            lines.append(f"| {target.text} | {target.limit} | {value:.3g} | {met} | {where} |")
    return lines


def origin(rows: Sequence[Row]) -> str:
    """When and by which code."""
    dates = sorted({row.test_time[:10] for row in rows})
    commits = sorted({row.versions.get("commit", "not recorded") for row in rows})
    builds = sorted({f"b{row.build_number}" for row in rows if row.build_number})
    seeds = sorted({str(row.seed) for row in rows})
    return (
        f"Measured {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}, "
        f"commit {', '.join(commits)}, llama.cpp {', '.join(builds)}, seed {', '.join(seeds)}, "
        f"medians of {max(row.repeat for row in rows) + 1}."
    )


def plain(rows: Sequence[Row]) -> str:
    """The view of a bench that has none of its own: medians by arm and number of sequences."""
    good = [row for row in rows if not row.error]
    names = sorted({name for row in good for name in row.detail})
    lines = [
        f"| arm | sequences | tokens/s | {' | '.join(names)} |",
        f"|---|--:|--:|{'--:|' * len(names)}",
    ]
    for (arm, pl), speed in report.median_speeds(good).items():
        mine = [row for row in good if (row.arm, row.pl) == (arm, pl)]
        cells = [report.median_of(row.detail.get(name) for row in mine) for name in names]
        words = ["" if cell is None else f"{cell:.4g}" for cell in cells]
        lines.append(f"| {arm} | {pl} | {speed:.1f} | {' | '.join(words)} |")
    return "\n".join([*lines, *report.failures(rows)])
