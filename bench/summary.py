"""`python -m bench report`: Markdown and plots of records, the same for the same records."""

import argparse
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.benches import Bench, about, names_of, view_of
from bench.cache import RESULTS
from bench.targets import Target
from pyllamabatch.report.plots import draw_speeds, over_counts, styled, svg
from pyllamabatch.report.records import Record, read
from pyllamabatch.report.tables import Table

MADE_BY = "Made by `python -m bench report`"

Draw = Callable[[Sequence[Record], Path], None]
"""The plot of a setting's records, into an SVG file."""


@dataclass(frozen=True, order=True)
class Setting:
    """Records with the same setting belong into one table."""

    bench: str
    machine: str
    model: str
    work: str
    settings: str

    @property
    def short_machine(self) -> str:
        """The processor's name that matters."""
        return self.machine.split(" (")[0]


Load = tuple[int, bool, float, float]
Groups = Mapping[Setting, Sequence[Record]]
Runs = Mapping[Setting, Sequence[Sequence[Record]]]
"""The runs of each setting, the oldest first. A run is one invocation of a bench, or several of the
same arms and code: these arms are compared with each other and with nothing else."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "records", nargs="*", type=Path, help="JSONL files or folders of them (bench/results)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for README.md and plots/ (that of the records)"
    )
    parser.add_argument("--no-plots", action="store_true", help="Markdown only")


def main(options: argparse.Namespace, benches: Mapping[str, Bench]) -> int:
    sources: list[Path] = options.records or [RESULTS]
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
    page = folder / "README.md"
    if page.exists() and MADE_BY not in page.read_text(encoding="utf-8"):
        raise SystemExit(f"{page.resolve()} is no report: name another folder with --out")
    runs = runs_of(record for file in files for record in read(file))
    groups = latest(runs)
    plots: dict[Setting, str] = {}
    if not options.no_plots:
        draws = {
            word: bench.draw
            for name, bench in benches.items()
            for word in names_of(name, bench)
            if hasattr(bench, "draw")
        }
        plots = draw_all(groups, draws, folder)
    folder.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(groups, plots, benches, runs), encoding="utf-8")
    print(page)
    return 0


def runs_of(records: Iterable[Record]) -> dict[Setting, list[list[Record]]]:
    runs: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        runs.setdefault((record.run_id, record.bench), []).append(record)
    parts = (part for run in runs.values() for part in by_sampling(run))
    found: dict[Setting, list[list[Record]]] = {}
    for run in sorted(parts, key=lambda run: (run[0].test_time, run[0].run_id)):
        before = found.setdefault(setting_of(run), [])
        if before and again(before[-1], run):
            before[-1] += run
        else:
            before.append(run)
    return dict(sorted(found.items()))


def by_sampling(run: Sequence[Record]) -> list[list[Record]]:
    """Its records with each sampling. Those that sample nothing belong to the others."""
    samplings = {record.sampling for record in run}
    if "none" in samplings:
        return [list(run)]
    return [[r for r in run if r.sampling == one] for one in sorted(samplings)]


def again(before: Sequence[Record], run: Sequence[Record]) -> bool:
    """Whether a run is of the same code as the one before: with other arms or loads as well, their
    pairs count together."""

    def code(records: Sequence[Record]) -> set[str]:
        return {r.versions.get("commit", "") for r in records}

    return code(before) == code(run)


def latest(runs: Runs) -> dict[Setting, list[Record]]:
    """Of each load the records of the latest run that has it, among those with the most arms."""
    groups: dict[Setting, list[Record]] = {}
    for setting, mine in runs.items():
        chosen: dict[Load, list[Record]] = {}
        for run in mine:
            for load, records in by_load(run).items():
                if n_arms(records) >= n_arms(chosen.get(load, ())):
                    chosen[load] = records
        groups[setting] = [record for load in sorted(chosen) for record in chosen[load]]
    return groups


def by_load(records: Iterable[Record]) -> dict[Load, list[Record]]:
    loads: dict[Load, list[Record]] = {}
    for record in records:
        loads.setdefault(load_of(record), []).append(record)
    return loads


def load_of(record: Record) -> Load:
    """Sequences at once, and what else makes a load another one: n clients (`width`) ask for more
    than n streams; requests come by themselves; other processes compute."""
    detail = record.detail
    return record.pl, bool(detail.get("mixed")), detail.get("load", 0), detail.get("busy", 0)


def loads_with(target: Target, records: Sequence[Record]) -> set[Load]:
    """Of which the records of one alone have the target's figure."""
    return {load for load, mine in by_load(records).items() if target.measured(mine) is not None}


def n_repeats(records: Sequence[Record]) -> int:
    """Of the load that was repeated most often."""
    return max(len({(r.run_id, r.repeat) for r in mine}) for mine in by_load(records).values())


def n_arms(records: Iterable[Record]) -> int:
    return len({record.arm for record in records})


def setting_of(run: Sequence[Record]) -> Setting:
    one = run[0]
    machine = f"{one.cpu_info}, {one.n_cores} cores, {one.os}"
    cells = "/".join(sorted({"unified" if r.kv_unified else "streams" for r in run}))
    sampling = "/".join(sorted({r.sampling for r in run} - {"none"})) or "none"
    settings = [f"sampling {sampling}"]
    if one.pp:
        settings.insert(0, f"KV {cells}, {max(r.n_threads for r in run)} threads")
    return Setting(
        bench=one.bench,
        machine=f"{one.gpu_info} ({machine})" if one.gpu_info else machine,
        model=one.model_filename.removesuffix(".gguf"),
        work=f"{one.pp} prompt tokens, {one.tg} tokens" if one.pp else "no prompt",
        settings=", ".join(settings),
    )


def markdown(
    groups: Groups, plots: Mapping[Setting, str], benches: Mapping[str, Bench], runs: Runs
) -> str:
    lines = [
        "# Results",
        "",
        f"{MADE_BY} from the JSONL files in this folder; every record there "
        "names its machine, build, model and seeds. Figures of one table come from the same runs; "
        "tables of different machines or dates are not to be compared.",
    ]
    for name, bench in benches.items():
        mine = {s: records for s, records in groups.items() if s.bench in names_of(name, bench)}
        lines += ["", f"## {name}", "", about(bench)]
        if bench.TARGETS:
            lines += ["", targets_table(bench.TARGETS, mine, runs)]
        for setting, records in mine.items():
            lines += ["", f"### {setting.model}: {setting.machine}", ""]
            lines += [f"{setting.work}, {setting.settings}. {origin(records)}", ""]
            if setting in plots:
                lines += [f"![{setting.model}]({plots[setting]})", ""]
            lines.append(view_of(bench)(records).strip())
    known = {word for name, bench in benches.items() for word in names_of(name, bench)}
    unknown = sorted({setting.bench for setting in groups} - known)
    if unknown:
        lines += ["", f"Records of benches that this code does not have: {', '.join(unknown)}."]
    return "\n".join(lines) + "\n"


def targets_table(targets: Sequence[Target], groups: Groups, runs: Runs) -> str:
    """A line for each target and setting: by the latest run that has its arms, or by the records of
    the table where that run lacks a load for which they have the figure. Or a line that says "not
    measured"."""
    lines = []
    for target in targets:
        measured: dict[Setting, float] = {}
        for setting, records in groups.items():
            has = (run for run in reversed(runs[setting]) if target.measured(run) is not None)
            run = next(has, records)
            complete = loads_with(target, run) >= loads_with(target, records)
            value = target.measured(run if complete else records)
            if value is not None:
                measured[setting] = value
        if not measured:
            lines.append([target.text, target.limit, "not measured", "", ""])
        for setting, value in measured.items():
            met = "met" if target.met_by(value) else "**missed**"
            what = f"{setting.model}, {setting.short_machine}"
            where = f"{what}; {setting.work}, {setting.settings}"
            lines.append([target.text, target.limit, f"{value:.3g}", met, where])
    return Table(["target", "limit", "measured", "", "setting"], lines, text=(0, 3, 4)).markdown()


def origin(records: Sequence[Record]) -> str:
    """When and by which code."""
    dates = sorted({record.test_time[:10] for record in records})
    commits = sorted({record.versions.get("commit", "not recorded") for record in records})
    builds = sorted({f"b{record.build_number}" for record in records if record.build_number})
    seeds = sorted({str(record.seed) for record in records})
    return (
        f"Measured {dates[0]}{f' to {dates[-1]}' if len(dates) > 1 else ''}, "
        f"commit {', '.join(commits)}, llama.cpp {', '.join(builds)}, seed {', '.join(seeds)}, "
        f"medians of {n_repeats(records)}."
    )


def draw_all(groups: Groups, draws: Mapping[str, Draw], folder: Path) -> dict[Setting, str]:
    """One SVG in `folder`/plots for each setting that has several numbers of sequences, by the
    bench's entry in `draws`. Returns their paths from `folder`; files of plots that are not made
    again are removed."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    plots: dict[Setting, str] = {}
    for setting, records in groups.items():
        if setting.bench in draws and len({r.pl for r in records if not r.error}) > 1:
            plots[setting] = f"plots/{file_name(setting, plots.values())}"
            draws[setting.bench](records, folder / plots[setting])
    for old in (folder / "plots").glob("*.svg"):
        if f"plots/{old.name}" not in plots.values():
            old.unlink()
    return plots


def file_name(setting: Setting, taken: Collection[str]) -> str:
    """From the setting; two of the same name are counted."""
    words = f"{setting.bench} {setting.model} {setting.short_machine}".lower()
    stem = re.sub(r"[^a-z0-9.]+", "-", words).strip("-")
    numbered = (f"{stem}-{i}.svg" for i in itertools.count(2))
    names = itertools.chain([f"{stem}.svg"], numbered)
    return next(name for name in names if f"plots/{name}" not in taken)


def draw(records: Sequence[Record], path: Path) -> None:
    """Speed over the number of sequences, a line for each arm."""
    with styled() as new:
        figure = new(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        draw_speeds(records, axes)
        counts = sorted({record.pl for record in records if not record.error})
        over_counts(axes, counts, "sequences", "tokens/s")
        axes.legend(frameon=False, fontsize=8)
        path.write_text(svg(figure), encoding="utf-8")
