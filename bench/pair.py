"""Two checkouts of this repository side by side: the same bench in each, in turns.

    python -m bench pair --before ../before -- decode --model default --threads 1 -B 1,4

Each round runs the bench once in each checkout, as a child process that imports the package and the
benches of that checkout. Its compiled module lies in its package folder, or is installed editable
in an environment `.venv` of its own. The order changes with every round.

A figure is a speed (`speed_tg`) by bench, arm and load; more is better. Its ratio is that of the
medians, after over before; beside it stands the ratio of the best runs, which a busy machine
disturbs least.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median

from bench.cache import REPOSITORY

Key = tuple[str, str, str]  # bench, arm, load
Speeds = Mapping[Key, Sequence[float]]

BEFORE, AFTER = "before", "after"
LOAD = ("waiting", "mixed", "spread", "load", "clients")
"""What tells two loads of the same number of sequences apart: keys of a record's `detail`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="a checkout")
    parser.add_argument(
        "--after", type=Path, default=REPOSITORY, metavar="DIR", help="another one (this one)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (5)")
    parser.add_argument(
        "--at-least",
        type=float,
        default=0.0,
        metavar="R",
        help="exit with 1 where the mean is less",
    )
    parser.add_argument("--out", type=Path, help="folder for the records of both")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="the bench and its arguments")


def main(options: argparse.Namespace) -> int:
    words = [word for i, word in enumerate(options.words) if i > 0 or word != "--"]
    if not words:
        raise SystemExit("pair: name a bench and its arguments behind --")
    if options.rounds < 1:
        raise SystemExit(f"pair: --rounds {options.rounds}: at least 1")
    checkouts = {BEFORE: options.before.resolve(), AFTER: options.after.resolve()}
    for checkout in checkouts.values():
        check(checkout)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: folder / f"{name}.jsonl" for name in checkouts}
        for i in range(options.rounds):
            for name in (BEFORE, AFTER) if i % 2 == 0 else (AFTER, BEFORE):
                print(f"round {i + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
                run(checkouts[name], words, files[name])
        before, after = (speeds(files[name]) for name in (BEFORE, AFTER))
    middle, best = compared(before, after, median), compared(before, after, max)
    if not middle:
        raise SystemExit("pair: no figure that both have")
    print(table(before, after, middle, best))
    mean = geometric_mean(middle.values())
    print(f"\n{' '.join(words)}: {len(middle)} figures, geometric mean of the ratios: ", end="")
    print(f"{mean:.3f} of medians, {geometric_mean(best.values()):.3f} of best runs")
    return int(mean < options.at_least)


def run(checkout: Path, words: Sequence[str], out: Path) -> None:
    """The bench of a checkout. Raises SystemExit with the end of its output where it fails before
    there is a record."""
    size = out.stat().st_size if out.exists() else 0
    code = "import runpy; runpy.run_path('bench/__main__.py', run_name='__main__')"
    done = child(checkout, code, *words, "--out", str(out))
    if not out.exists() or out.stat().st_size == size:
        raise SystemExit(f"{checkout}: no result\n{(done.stdout + done.stderr)[-2000:]}")


def check(checkout: Path) -> None:
    """Raises SystemExit where Python would import another package than the checkout's: an
    installed one, or none that is built."""
    if not checkout.is_dir():
        raise SystemExit(f"{checkout}: no such folder")
    done = child(checkout, "import pyllamabatch.raw as raw; print(raw.__file__)")
    if not done.stdout.startswith(f"{checkout}{os.sep}"):
        raise SystemExit(f"{checkout}: imports {done.stdout.strip() or done.stderr[-2000:]}")


# An editable install's finder comes before PYTHONPATH.
NOT_EDITABLE = (
    "import sys; sys.meta_path[:] = "
    "[one for one in sys.meta_path if not type(one).__name__.startswith('ScikitBuild')]; "
)


def child(checkout: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`code` in a checkout, whose package lies at its top or in `src`: in the Python of its
    `.venv`, else in this one, without what is installed editable there."""
    path = [str(folder) for folder in (checkout / "src", checkout) if folder.is_dir()]
    own = checkout / ".venv" / "bin" / "python"
    return subprocess.run(
        [str(own), "-c", code, *arguments]
        if own.exists()
        else [sys.executable, "-c", NOT_EDITABLE + code, *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def speeds(file: Path) -> dict[Key, list[float]]:
    """Of the records of a file, which may be of another schema than this checkout's."""
    found: dict[Key, list[float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if not record["error"] and record["speed_tg"]:
            detail = record["detail"]
            load = [f"{name} {detail[name]:g}" for name in LOAD if name in detail]
            key = record["bench"], record["arm"], ", ".join([f"{record['pl']}", *load])
            found.setdefault(key, []).append(record["speed_tg"])
    return found


def compared(
    before: Speeds, after: Speeds, pick: Callable[[Sequence[float]], float]
) -> dict[Key, float]:
    """After over before, of what is picked from the runs of each figure that both have."""
    return {key: pick(after[key]) / pick(before[key]) for key in before if key in after}


def table(
    before: Speeds, after: Speeds, middle: Mapping[Key, float], best: Mapping[Key, float]
) -> str:
    """Medians and ratios, and below them the figures that only one has."""
    lines = ["| arm | load | before, 1/s | after, 1/s | ratio | of best runs |"]
    lines.append("|---|---|--:|--:|--:|--:|")
    for key in middle:
        speed = f"{median(before[key]):.1f} | {median(after[key]):.1f}"
        lines.append(f"| {key[1]} | {key[2]} | {speed} | {middle[key]:.3f} | {best[key]:.3f} |")
    alone = [key for key in [*before, *after] if key not in middle]
    return "\n".join([*lines, *(f"only in one: {' '.join(key)}" for key in alone)])
